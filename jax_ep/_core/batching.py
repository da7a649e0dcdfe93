"""What ``vmap`` makes of ops: operands batched alike, and one call for each element.

``jax.vmap(..., spmd_axis_name=)`` gives each device along that axis a part of the batch, so what is
batched varies over the axis and what is not does not. Where an op with a custom gradient gets both,
JAX (0.10.2 to 0.12.0) refuses to mix them in the op, or sums the gradient of what is not batched over
the parts of one device only. So the ops call ``batched_alike`` first: inside such a ``vmap`` it
repeats what is not batched, and the gradient of the repetition is the sum over all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep import _compat


def batched_alike(*operands: Any) -> tuple[Any, ...]:
    """The same pytrees of arrays; ``vmap`` with ``spmd_axis_name`` batches all or none of them.

    Elsewhere it does nothing, a plain ``vmap`` included.
    """
    if not _compat.is_in_spmd_vmap():
        return operands
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, _alike_p.bind(*leaves))


def one_by_one(
    f: Callable[..., list[jax.Array]], operands: Sequence[Any], dims: Sequence[int | None]
) -> tuple[list[jax.Array], list[int]]:
    """A batching rule: the results of ``f`` for each element, one after the other."""
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(slices: Sequence[jax.Array]) -> list[jax.Array]:
        rest = iter(slices)
        return f(*(x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)))

    outputs = lax.map(one, mapped)
    return outputs, [0] * len(outputs)


def _batch(axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, Any]:
    names = _compat.spmd_axes(axis_data)
    if names and any(d is not None for d in dims):
        operands = [
            _batched(axis_data.size, names, *pair) for pair in zip(operands, dims, strict=True)
        ]
        dims = [0] * len(operands)
    return _alike_p.bind(*operands), dims


def _batched(size: int, names: tuple[str, ...], x: jax.Array, dim: int | None) -> jax.Array:
    """``x`` with a leading dimension of ``size`` elements."""
    if dim is not None:
        return jnp.moveaxis(x, dim, 0)
    if set(names) <= set(_compat.manual_axes()) and _compat.tracks_varying_axes(names):
        x = _compat.cast_varying(x, frozenset(names))
    return lax.broadcast(x, (size,))


_alike_p = Primitive("jax_ep_batched_alike")
_alike_p.multiple_results = True
_alike_p.def_impl(lambda *operands: list(operands))
_alike_p.def_abstract_eval(lambda *operands: list(operands))
mlir.register_lowering(_alike_p, lambda ctx, *operands: operands)
ad.primitive_jvps[_alike_p] = lambda primals, tangents: (_alike_p.bind(*primals), list(tangents))
batching.fancy_primitive_batchers[_alike_p] = _batch
