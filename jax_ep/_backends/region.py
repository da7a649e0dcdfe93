"""How native calls on GPUs are lowered so that XLA keeps their order, and runs some beside others.

**Order.** Calls of one channel use the same workspace and, on GPUs, wait for each other's peers: all
processes must issue them in one order, whatever XLA's scheduler finds. So each call is given a result
of the call before it on its channel, which it does not read: the dependency costs nothing. In line with
the program that is a token, a result of its own that nobody writes. The chain runs through what JAX
lowers into one block: a traced function, the body of a loop.

**Regions.** A call on a channel other than 0 becomes a function call that XLA runs on a stream of its
own, as a pair of start and done. XLA schedules other work between the two and keeps the buffers alive.
``jax.experimental.compute_on`` makes such regions too. But where a region has several results, that
gives one more pair for each, and those take the place of real ones on the stream: the element of a
tuple inherits the annotation of the call. A barrier over the whole tuple keeps it away (jaxlib
0.10.2 to 0.12.0), as long as all elements are used. So a region has no token: the next call comes
behind its smallest result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import ShapedArray
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir

from jax_ep import _compat

Lower = Callable[[mlir.LoweringRuleContext, Sequence[Any]], Sequence[Any]]

# Channel 1 takes the stream of XLA's collectives, which the latency-hiding scheduler knows best, and
# channel n the additional stream n - 1. Ops of channel 0 run in line.
_COLLECTIVE_STREAM = "collective"


def stream_of(channel: int) -> str:
    """XLA's name of the stream that the regions of a channel run on."""
    return _COLLECTIVE_STREAM if channel == 1 else str(channel - 1)


def lower_in_order(
    ctx: mlir.LoweringRuleContext,
    lower: Lower,
    values: Sequence[Any],
    *,
    scratch: Sequence[Any],
    channel: int,
    name: str,
) -> list[Any]:
    """Lower a call behind the last one of its channel, as a region of its own unless it is 0.

    Args:
        ctx: The context of the call, whose ``avals_out`` are the results that are wanted.
        lower: Lowers the call itself, given a context and operands; its results are those wanted, then
            the scratch memory, then the token.
        values: The operands of the call but for the last one, ``after``.
        scratch: Shapes and dtypes of the scratch memory.
        channel: The channel.
        name: What the region is called in profiles.

    Returns:
        The results that are wanted.
    """
    notes = _compat.notes_of_lowering(ctx)
    key = ("jax_ep", ir.InsertionPoint.current.block, channel)
    absent = np.zeros((0,), np.int32)
    after, after_aval = notes.get(key) or (
        mlir.ir_constant(absent),
        ShapedArray(absent.shape, absent.dtype),
    )
    token = ShapedArray((1,), np.dtype(np.int32))
    wanted = ctx.avals_out
    inner = ctx.replace(
        avals_in=[*ctx.avals_in, after_aval],
        avals_out=[*wanted, *(ShapedArray(x.shape, x.dtype) for x in scratch), token],
    )

    def call(operands: Sequence[Any]) -> list[Any]:
        return list(lower(inner, operands))

    if channel == 0:
        results = call([*values, after])
        notes[key] = results[-1], token
    else:
        results = _region(ctx, call, [*values, after], wanted, channel, name)
        smallest = min((i for i, x in enumerate(wanted) if x.size), key=lambda i: wanted[i].size)
        notes[key] = results[smallest], wanted[smallest]
    return results[: len(wanted)]


def behind_last(ctx: mlir.LoweringRuleContext, values: Sequence[Any]) -> list[Any]:
    """``values`` behind the last call in line with the program, if there is one in this block."""
    key = ("jax_ep", ir.InsertionPoint.current.block, 0)
    if (last := _compat.notes_of_lowering(ctx).get(key)) is None:
        return list(values)
    return list(stablehlo.OptimizationBarrierOp([*values, last[0]]).results)[: len(values)]


def _region(
    ctx: mlir.LoweringRuleContext,
    call: Callable[[Sequence[Any]], list[Any]],
    values: Sequence[Any],
    avals: Sequence[Any],
    channel: int,
    name: str,
) -> list[Any]:
    """``call(values)`` as a function that XLA runs on the stream of ``channel``."""
    types = [value.type for value in values]
    module = ctx.module_context.module
    function = func.FuncOp(name, ir.FunctionType.get(types, []), ip=ir.InsertionPoint(module.body))
    function.attributes["sym_visibility"] = ir.StringAttr.get("private")
    ctx.module_context.symbol_table.insert(function)  # which makes the name unique
    block = function.add_entry_block()
    # XLA replaces arrays without elements by constants, which would split the tuple.
    kept = [i for i, aval in enumerate(avals) if aval.size > 0]
    with ir.InsertionPoint(block):
        results = call(list(block.arguments))
        whole = results[kept[0]] if len(kept) == 1 else stablehlo.tuple([results[i] for i in kept])
        func.ReturnOp([whole])
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(types, [whole.type]))
    started = func.CallOp([whole.type], ir.FlatSymbolRefAttr.get(function.name.value), [*values])
    started.operation.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(
        {
            "_xla_stream_annotation": ir.StringAttr.get(stream_of(channel)),
            "inlineable": ir.StringAttr.get("false"),
        }
    )
    (result,) = elements = list(started.results)
    if len(kept) > 1:
        elements = [stablehlo.get_tuple_element(result, i) for i in range(len(kept))]
        elements = list(stablehlo.OptimizationBarrierOp(elements).results)
    present = dict(zip(kept, elements, strict=True))
    return [
        present[i] if i in present else mlir.ir_constant(np.zeros(aval.shape, aval.dtype))
        for i, aval in enumerate(avals)
    ]
