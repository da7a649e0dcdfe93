"""``jax_ep.dispatch``: send every token to the ranks that hold its experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Integer

from jax_ep._core import arguments
from jax_ep._core.flight import Flight
from jax_ep._core.numerics import expert_ids
from jax_ep._core.types import (
    DispatchConfig,
    Dispatched,
    DispatchLayout,
    DropPolicy,
    Handle,
    Layout,
    Quantized,
    RowScaleFormat,
    UnusedRows,
    is_latency,
)
from jax_ep._groups.group import Group, latency_sms_of, sms_of_passes
from jax_ep._groups.tuning import rows_name
from jax_ep._ops import (
    bounds,
    checks,
    drops,
    flights,
    gpu_room,
    gradients,
    masked,
    modes,
    quantized,
)
from jax_ep._ops.options import DispatchOptions, PlanOptions

# None in the signature stands for these. With a handle, an argument that is None is the handle's.
_DEFAULT_LAYOUT: Layout = "expert"
_DEFAULT_ALIGNMENT = 1


def dispatch(
    x: Array | Quantized,
    topk_idx: Integer[Array, "tokens top_k"] | None = None,
    topk_weights: Float[Array, "tokens top_k"] | None = None,
    *,
    group: Group,
    num_experts: int | None = None,
    layout: DispatchLayout | None = None,
    alignment: int | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    rank_capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    quantization: Literal["fp8"] | None = None,
    output: quantized.Output | None = None,
    scale_format: RowScaleFormat = "f32",
    unused_rows: UnusedRows | None = None,
    handle: Handle | None = None,
    config: DispatchConfig | None = None,
) -> Dispatched:
    """Send every token to the ranks that hold its top-k experts.

    Call it inside ``jax.shard_map`` over the whole mesh of ``group``; shapes are those that one rank
    sees. With T tokens, hidden size H, top-k K, E experts, R ranks and L = E / R local experts,
    expert e lives on rank ``e // L``. In pseudocode, rank d receives in layout "expert"::

        rows = []
        for expert in range(d * L, (d + 1) * L):
            for source in range(R):
                for token in range(T):
                    if expert in topk_idx[source][token]:
                        rows.append(x[source][token])
            pad rows with zeros to a multiple of alignment
        pad rows with zeros to C

    Example: two ranks, two experts each, K = 2, ``alignment=2``::

        rank 0: x = [a, b]   topk_idx = [[0, 2], [3, 0]]
        rank 1: x = [c, d]   topk_idx = [[2, 3], [0, -1]]

        rank 0: tokens = [a, b, d, 0 | ...]         group_sizes = [4, 0]   counts = [3, 0]
        rank 1: tokens = [a, c, b, c | ...]         group_sizes = [2, 2]   counts = [2, 2]

    The order is fixed, so the rows are the same bits in every run and on every backend. The
    operation and its two layouts are those of DeepEP (https://github.com/deepseek-ai/DeepEP).

    Gradients: ``x`` receives the sum of its rows' cotangents (``combine``), ``topk_weights`` those of
    its rows' weights; with ``quantization`` and dense output the gradient is straight-through. Rows
    that did not fit have none. In forward mode (``jax.jvp``) tangents take the same routes, by a second
    dispatch, and derivatives of any order work.

    Args:
        x: ``[T, H]`` bf16, f16 or f32 with rows of a multiple of 16 bytes, or ``Quantized`` rows with
            H a multiple of 128. For gradients on GPUs in layout "expert" a row has at most
            32 MiB / (R − 1).
        topk_idx: ``[T, K]`` expert ids, −1 for none; K ≤ 32. Any integer dtype; ids are cast to int32.
            An id out of range or repeated within a token counts as −1 and in ``num_invalid``.
        topk_weights: ``[T, K]`` float32 that travel with the rows, or None. bfloat16 and float16
            are taken too and travel as float32; their gradient has the dtype that was given.
        group: The group, from ``create_group``.
        num_experts: E over the whole group; a multiple of R, on GPUs at most 4096.
        layout: "expert" (the default): one row per (token, local expert), grouped by expert. "token":
            one row per (token, rank), ordered by (source rank, token). "masked": as "expert", but each
            expert has S rows at a fixed place, of which the first ``counts`` are used, for matmuls that
            take ``[L, S, H]`` and counts. On GPUs it takes mode "latency".
        alignment: Layout "expert": each expert's rows are padded with zeros to a multiple of it. The
            default, 1, pads nothing: ``grouped_dot`` and ``jax.lax.ragged_dot`` take groups of any
            size. Give the height of a tile, say 128, to a matmul of your own that works on whole
            tiles of one expert; the default capacity then grows by up to L·(alignment − 1) rows.
        capacity: Rows C of the result. None: room that always suffices, N = R·T·min(K, L) and
            C = roundup(N + min(L, N)·(alignment − 1), alignment), or R·T in layout "token". With
            less room, experts share it evenly: each keeps what comes to it up to a level, which is the
            highest multiple of ``alignment`` for which all rows fit. ``alignment`` rows more go to
            each of the experts with the lowest ids that lose some, as far as there is room. Of an
            expert (in layout "token", of a rank), the rows that come first in the order above are kept.
            Where the group spans hosts, more than 2^20 rows must be asked for. In layout "masked",
            S = C / L, and None is S = roundup(R·T, alignment).
        capacity_factor: Instead of ``capacity``, layout "expert": every expert keeps at most
            ``ceil(capacity_factor · R·T·K / E)`` rows.
        rank_capacity_factor: Instead of ``capacity``, layout "expert": C is
            ``ceil(rank_capacity_factor · T·K)`` rounded up to ``alignment``, or the room that always
            suffices if that is less. T·K rows come to each rank under even routing. Experts with many
            rows take the room that others leave, so at the same memory fewer rows are lost than with
            ``capacity_factor``; it may be given beside it.
        drop_policy: Which rows of an expert are dropped for ``capacity_factor``. "position" (the
            default): those that come last in the order above. "score": each source rank drops for
            itself, so that every expert gets at most ``ceil(capacity_factor · T·K / E)`` rows of it,
            those with the highest ``topk_weights`` (of equal ones, the first); so Megatron-Core's
            policy "probs" does. The ranks then add up E counts, by a collective of XLA's.
        quantization: "fp8": rows travel as float8_e4m3fn with one scale per 128 channels.
        output: With fp8: "dense" (default for arrays) gives rows in the dtype of ``x``, "quantized"
            (the only one for ``Quantized`` x) gives ``Quantized`` rows, which have neither gradient nor
            tangents.
        scale_format: "f32" or "ue8m0", as in ``jax_ep.quantize``; "ue8m0_packed" is "ue8m0", and the
            scales of the rows received are the words that ``jax_ep.pack_scales`` makes of them. With
            it output is "quantized", and the scales of ``Quantized`` x must be powers of two. In mode
            "latency" on GPUs the op itself writes the words; otherwise XLA packs them behind it.
        unused_rows: What the rows past the last group (layout "token": past the last row that came)
            hold. "zero" (the default): zeros. "undefined": anything, NaN too, so that GPUs need not
            write them; with room for any routing, most rows may be unused. Their weights are zeros all
            the same, and so are the rows if ``alignment`` is more than 1. In layout "masked" it is
            for all rows past the counts, and "undefined" is the default. Choose it if what reads the
            rows goes by ``group_sizes``, as ``grouped_dot`` does. The handle keeps it for the gradient
            of ``combine`` too, whose unused rows are then as undefined.
        handle: The handle of an earlier dispatch, to send along the same routes without a new plan.
            It holds the routes and the capacities, so leave out ``topk_idx`` and
            ``capacity_factor``. ``num_experts``, ``layout``, ``alignment``, ``capacity`` and
            ``unused_rows`` may be left out too; else they must equal those of the handle.
        config: How to use the machine; None takes the defaults. In mode "latency", which the default
            "auto" takes for few tokens in groups made for it, and with a new plan, GPUs plan and
            dispatch in one launch; along a handle they dispatch as in "throughput".

    Returns:
        What this rank received, with C rows; in layout "masked" with L times S.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for any other argument that does not fit; the text says what would.
    """

    def issue(num_sms: int, latency: bool) -> Flight:
        return flights.in_line(group, num_sms)

    out = dispatch_by(
        issue,
        x,
        topk_idx,
        topk_weights,
        group=group,
        num_experts=num_experts,
        layout=layout,
        alignment=alignment,
        capacity=capacity,
        capacity_factor=capacity_factor,
        rank_capacity_factor=rank_capacity_factor,
        drop_policy=drop_policy,
        quantization=quantization,
        output=output,
        scale_format=scale_format,
        unused_rows=unused_rows,
        handle=handle,
        config=config,
    )
    assert isinstance(out, Dispatched)  # for the type checker: it is not in flight
    return out


def dispatch_by(
    issue: flights.Issue,
    x: Array | Quantized,
    topk_idx: Integer[Array, "tokens top_k"] | None = None,
    topk_weights: Float[Array, "tokens top_k"] | None = None,
    *,
    group: Group,
    num_experts: int | None = None,
    layout: DispatchLayout | None = None,
    alignment: int | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    rank_capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    quantization: Literal["fp8"] | None = None,
    output: quantized.Output | None = None,
    scale_format: RowScaleFormat = "f32",
    unused_rows: UnusedRows | None = None,
    handle: Handle | None = None,
    config: DispatchConfig | None = None,
    order: Callable[[Any], Any] = lambda routes: routes,
    send: Callable[..., Any] | None = None,
) -> Any:
    """``dispatch``, issued as ``issue`` says, along ``order(routes)``: of a handle, or ``topk_idx``.

    ``send`` is given where the op is in flight. In latency mode on GPUs it does the first half of the
    op, and its result is returned; ``dispatched`` makes what the second half gives into the result.
    """
    op = "dispatch"
    checks.check_group(op, group)
    arguments.check_config(op, config)
    arguments.check_rows(op, "x", x)
    values = x.values if isinstance(x, Quantized) else x
    quantize_as, packs_scales = quantized.check(op, x, quantization, output, scale_format)
    arguments.check_one_of(op, "unused_rows", unused_rows, (None, "zero", "undefined"))
    dense_output = output != "quantized"
    moved = rows_name(values.dtype, quantize_as, dense_output)
    if handle is not None:
        checks.check_handle(op, handle, group)
    is_masked = layout == "masked" if handle is None else handle.masked
    if handle is None:
        checks.check_topk_idx(op, topk_idx, values.shape[0])
        assert topk_idx is not None  # for the type checker: check_topk_idx raises if it is None
        topk_idx = expert_ids(topk_idx)
        checks.check_experts(op, num_experts, topk_idx.shape[1], group)
        assert num_experts is not None
        alignment = _DEFAULT_ALIGNMENT if alignment is None else alignment
        checks.check_layout(op, _DEFAULT_LAYOUT if layout is None else layout, alignment)
        of_plan: Layout = "token" if layout == "token" else "expert"
        gpu_room.check_choices_fit(op, topk_idx, group)
        if is_masked:
            alignment = masked.rows_of_expert(
                op,
                capacity,
                (capacity_factor, rank_capacity_factor),
                alignment=alignment,
                sources=group.size * topk_idx.shape[0],
                experts=num_experts // group.size,
            )
            capacity = num_experts // group.size * alignment
        checks.check_bounds(op, capacity, capacity_factor, rank_capacity_factor, of_plan, alignment)
        checks.check_drop_policy(op, drop_policy, capacity_factor)
        config = modes.choose(
            "dispatch",
            values,
            topk_idx,
            group=group,
            layout=of_plan,
            moved=moved,
            config=config,
            in_flight=send is not None,
            masked=is_masked,
        )
        limits = bounds.Bounds(capacity, capacity_factor, rank_capacity_factor, drop_policy)
        rows, rows_of_expert = bounds.room(
            op,
            limits,
            group=group,
            num_experts=num_experts,
            layout=of_plan,
            alignment=alignment,
            shape=topk_idx.shape,
        )
        plan_options = PlanOptions(
            group,
            num_experts,
            of_plan,
            capacity=rows,
            alignment=alignment,
            expert_capacity=alignment if is_masked else rows_of_expert,
            masked=is_masked,
            config=config,
            unused_rows=unused_rows or ("undefined" if is_masked else "zero"),
        )
        gpu_room.check_latency_fits(op, "x", values, topk_idx, group, config)
        checks.check_topk_weights(op, topk_weights, topk_idx.shape)
        topk_idx, correct = drops.before_plan(
            op, limits, topk_idx, topk_weights, group=group, num_experts=num_experts
        )
        if is_masked and topk_idx.shape[0] > 0:
            masked.check_mode(op, group, config)
        in_line = send is None or is_latency(config)
        if not gradients.takes_one_call(group, len(values), in_line=in_line):
            handle = _name(correct(gradients.plan(plan_options, topk_idx)), "jax_ep.handle")
    else:
        checks.check_not_given(op, "topk_idx", topk_idx)
        checks.check_not_given(op, "capacity_factor", capacity_factor)
        checks.check_not_given(op, "rank_capacity_factor", rank_capacity_factor)
        checks.check_not_given(
            op, "drop_policy", None if drop_policy == "position" else drop_policy
        )
        checks.check_as_in_handle(op, "num_experts", num_experts, handle.num_experts)
        checks.check_as_in_handle(op, "layout", layout, "masked" if is_masked else handle.layout)
        checks.check_as_in_handle(op, "alignment", alignment, handle.alignment)
        checks.check_as_in_handle(op, "capacity", capacity, handle.capacity)
        checks.check_as_in_handle(op, "unused_rows", unused_rows, handle.unused_rows)
        if handle.topk_idx.shape[0] != values.shape[0]:
            raise arguments.value_error(
                op,
                "x",
                f"the {handle.topk_idx.shape[0]} tokens that the handle was made for",
                f"{values.shape[0]} tokens",
                "leave the handle out to make a new plan",
            )
    gpu_room.check_chunk_fits(op, "x", values, group)
    ids = topk_idx if handle is None else handle.topk_idx
    assert ids is not None
    checks.check_topk_weights(op, topk_weights, ids.shape)
    topk_weights = None if topk_weights is None else topk_weights.astype(jnp.float32)
    num_tokens, requested = values.shape[0], None if config is None else config.num_sms
    if one_launch := handle is None and is_latency(config):
        num_sms = latency_sms_of(group, num_tokens=num_tokens, requested=requested)
    else:
        num_sms = sms_of_passes(
            group,
            {"dispatch": moved, "combine": rows_name(values.dtype)},
            layout=(plan_options if handle is None else handle).layout,
            hidden=values.shape[1],
            num_tokens=num_tokens,
            requested=requested,
        )
    options = DispatchOptions(
        group=group,
        scale_format=quantize_as,
        dense_output=dense_output,
        packs_scales=packs_scales,
        config=config,
        flight=issue(num_sms, one_launch),
    )
    if handle is None:
        x, topk_weights, topk_idx = gradients.vary_together(group, x, topk_weights, topk_idx)
        given = plan_options, options, x, topk_weights, order(topk_idx)
        if send is not None:
            checks.check_drops_in_one_call(op, drop_policy)
            return send(*given)
        tokens, weights, handle = gradients.plan_and_dispatch(*given)
        handle = _name(correct(handle), "jax_ep.handle")
    else:
        x, topk_weights, handle = gradients.vary_together(group, x, topk_weights, handle)
        tokens, weights = gradients.dispatch(options, x, topk_weights, order(handle))
    return dispatched(tokens, weights, handle)


def dispatched(tokens: Array | Quantized, weights: Array | None, handle: Handle) -> Dispatched:
    """The result of a dispatch."""
    tokens, weights = _name((tokens, weights), "jax_ep.dispatch")
    if handle.masked:
        tokens, weights = masked.split(handle, (tokens, weights))
    return Dispatched(tokens=tokens, weights=weights, handle=handle)


def _name(tree, name: str):
    """Name every leaf, so that ``jax.checkpoint`` policies can save it."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), tree)
