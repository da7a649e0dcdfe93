"""The primitive of a native call: ``jax.ffi.ffi_call``, but that each call knows its ordinal.

Ranks that fall out of step must find out before they mix their data. Kind and static arguments do not
tell two equal layers of a model apart; their places in the program do. So every call has an attribute
``ordinal``, which is set when JAX lowers the program, since only then there is a program to count in.

Ordinals count all calls of a module, 0, 1, 2, …, and not each kind by itself: so one call more or less
shifts those of all calls behind it, whatever their kinds. JAX lowers equations in program order, so
ordinals depend on the program only, and processes that lower the same program give the same ones. What
JAX lowers once and uses several times (a function under ``jax.jit`` that is called twice, the body of a
loop) has the same ordinals in all its uses. Op by op, without ``jax.jit``, each call is a module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep import _compat
from jax_ep._backends.region import behind_last, lower_in_order
from jax_ep._core.batching import one_by_one


def native_call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array | jax.ShapeDtypeStruct,
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    ordered: bool = False,
    in_line: bool = False,
    **attributes: Any,
) -> list[jax.Array]:
    """Call an FFI target, which gets an attribute ``ordinal`` (int32) too.

    The call is pure on purpose: XLA may drop or move it only in the one program that all ranks share,
    and a side effect would keep ``jax.checkpoint`` from differentiating it. Under ``vmap`` there is a
    call for each element. It has no gradient.

    Args:
        target: Its name.
        results: Shapes and dtypes.
        operands: Arrays. A ``jax.ShapeDtypeStruct`` without elements stands for an operand that is
            absent: the target gets an array of that shape.
        scratch: Shapes and dtypes of scratch memory, which the target gets as results more.
        ordered: Whether the call comes behind the last one of its channel (attribute "channel"), by
            ``region.lower_in_order``: so on GPUs.
        in_line: Whether an ordered call comes behind the last one of channel 0, in line with the
            program, whatever its channel.
        attributes: Integers of NumPy.

    Returns:
        The results. They vary over the mesh axes that the first operand varies over. Others may vary
        over more where results do not depend on it: groups side by side that are given the same have
        the same results, though the coordinates of their ranks differ.
    """
    with jax.named_scope(target):  # for profiles: all calls are of one primitive
        return _native_call_p.bind(
            *(x for x in operands if not isinstance(x, jax.ShapeDtypeStruct)),
            target=target,
            results=tuple(results),
            # Made where the call is lowered: as inputs of shard_map, arrays without elements crash
            # XLA's partitioner (Shardy, jaxlib 0.11.2), and JAX makes constants into inputs where
            # shard_map stands in a differentiated scan or runs op by op.
            absent=tuple(x if isinstance(x, jax.ShapeDtypeStruct) else None for x in operands),
            scratch=tuple(scratch),
            ordered=ordered,
            in_line=in_line,
            attributes=tuple(sorted(attributes.items())),
        )


def _abstract(*operands: Any, results: Sequence[jax.ShapeDtypeStruct], **_: Any) -> list[Any]:
    return [_compat.aval_like(operands[0], x.shape, x.dtype) for x in results]


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    absent: Sequence[jax.ShapeDtypeStruct | None],
    scratch: Sequence[jax.ShapeDtypeStruct],
    ordered: bool,
    in_line: bool,
    attributes: tuple[tuple[str, Any], ...],
) -> Any:
    del results  # they are ctx.avals_out
    given, types = iter(operands), iter(ctx.avals_in)
    values = [
        next(given) if x is None else mlir.ir_constant(np.zeros(x.shape, x.dtype)) for x in absent
    ]
    avals = [next(types) if x is None else jax.core.ShapedArray(x.shape, x.dtype) for x in absent]
    given_attributes = dict(attributes)
    ordinal = np.int32(_compat.next_in_module(ctx))

    def call(ctx: mlir.LoweringRuleContext, values: Sequence[Any]) -> Any:
        lower = jax.ffi.ffi_lowering(target)
        return lower(ctx, *values, **given_attributes, ordinal=ordinal)

    ctx = ctx.replace(avals_in=avals)
    if not ordered:
        return call(ctx, values)
    channel = 0 if in_line else int(given_attributes["channel"])
    return lower_in_order(ctx, call, values, scratch=scratch, channel=channel, name=target)


# The ends of the names of targets that do half of an op.
_HALVES = ("_start", "_done")


def _batch(
    operands: Sequence[Any], dims: Sequence[int | None], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """One call for each element, one after the other."""
    sizes = {x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None}
    if params["target"].endswith(_HALVES) and sizes != {1}:
        raise NotImplementedError(
            "jax_ep: an op in flight in mode 'latency' has no batch, because a channel holds one op at "
            "a time; under vmap, use dispatch and combine, or mode='throughput'."
        )
    return one_by_one(functools.partial(_native_call_p.bind, **params), operands, dims)


def behind_last_call(values: Sequence[jax.Array]) -> list[jax.Array]:
    """``values``, which XLA has only once the last call in line before this was issued, on GPUs.

    That call is found where JAX lowers the program, so to JAX nothing depends on it: not what
    ``jax.checkpoint`` computes again, where the call may not be needed.
    """
    return _behind_last_call_p.bind(*values)


def _lower_behind(ctx: mlir.LoweringRuleContext, *values: Any) -> Any:
    return behind_last(ctx, values)


def _batch_behind(values: Sequence[Any], dims: Sequence[Any]) -> tuple[list[jax.Array], list[Any]]:
    return _behind_last_call_p.bind(*values), list(dims)


_behind_last_call_p = Primitive("jax_ep_behind_last_call")
_behind_last_call_p.multiple_results = True
_behind_last_call_p.def_abstract_eval(lambda *avals: list(avals))
_behind_last_call_p.def_impl(lambda *values: list(values))  # op by op, all is in order
_compat.register_lowering_of_each(_behind_last_call_p, _lower_behind)
batching.primitive_batchers[_behind_last_call_p] = _batch_behind
ad.primitive_jvps[_behind_last_call_p] = lambda primals, tangents: (
    _behind_last_call_p.bind(*primals),
    list(tangents),
)

_native_call_p = Primitive("jax_ep_call")
_native_call_p.multiple_results = True
_native_call_p.def_abstract_eval(_abstract)
_compat.register_lowering_of_each(_native_call_p, _lower)
batching.primitive_batchers[_native_call_p] = _batch
