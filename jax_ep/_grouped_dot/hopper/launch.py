"""Shared by the kernels: bringing operands into form, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep import _compat
from jax_ep._core import numerics
from jax_ep._grouped_dot.hopper.custom_call import Kernel, custom_call, pallas_kernel

_ROW_MULTIPLE = 8  # rows of a tile in shared memory


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` as the sum of two bfloat16 arrays, up to 2⁻¹⁶ of it."""
    high = numerics.round_to(x, jnp.bfloat16)  # XLA would drop a pair of casts
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def pad_rows(x: jax.Array) -> jax.Array:
    """``x`` with zeros below it, up to a number of rows that kernels can load."""
    return jnp.pad(x, ((0, -x.shape[0] % _ROW_MULTIPLE), (0, 0)))


def launch(
    kernel: Kernel,
    *operands: jax.Array,
    outs: tuple[jax.ShapeDtypeStruct, ...],
    num_sms: int | None,
) -> tuple[jax.Array, ...]:
    """Runs the body of ``kernel`` in one block on each SM, or on ``num_sms`` of them if that is less.

    A block takes every n-th tile, n being the number of blocks, which may be any from 1 on. So each
    tile is computed in the same way, whatever the number.
    """
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    operands = tuple(_compat.cast_varying(x, axes) for x in operands)
    blocks = _compat.num_multiprocessors()
    blocks = blocks if num_sms is None else min(num_sms, blocks)
    return tuple(_launch_p.bind(*operands, kernel=kernel, outs=outs, blocks=blocks))


def _abstract(*operands: Any, kernel: Kernel, outs: Sequence[Any], blocks: int) -> Any:
    del kernel, blocks
    return [_compat.aval_like(operands[0], out.shape, out.dtype) for out in outs]


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    kernel: Kernel,
    outs: tuple[jax.ShapeDtypeStruct, ...],
    blocks: int,
) -> Any:
    if not ctx.is_forward_compat():  # other versions must understand an exported program
        avals: Sequence[Any] = ctx.avals_in
        given = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals)
        call = custom_call(kernel, blocks, outs, *given)
        if call is not None:
            return jax.ffi.ffi_lowering(call.target)(ctx, *operands, **dict(call.attributes))
    lower = mlir.lower_fun(pallas_kernel(kernel, blocks, outs), multiple_results=True)
    return lower(ctx, *operands)


def _batch(
    operands: Sequence[Any], dims: Sequence[int | None], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """One launch for each element, one after the other."""
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(slices: Sequence[jax.Array]) -> list[jax.Array]:
        rest = iter(slices)
        return _launch_p.bind(
            *(x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)), **params
        )

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


_launch_p = Primitive("jax_ep_grouped_dot")
_launch_p.multiple_results = True
_launch_p.def_abstract_eval(_abstract)
_launch_p.def_impl(lambda *xs, **params: jax.jit(lambda *ys: _launch_p.bind(*ys, **params))(*xs))
mlir.register_lowering(_launch_p, _lower, platform="cuda")
batching.primitive_batchers[_launch_p] = _batch
