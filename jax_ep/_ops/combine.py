"""``jax_ep.combine``: bring the expert outputs home and sum them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_ep._core import arguments
from jax_ep._core.flight import Flight
from jax_ep._core.types import DispatchConfig, Handle, Quantized, is_latency
from jax_ep._groups.group import Group, latency_sms_of, sms_of_passes
from jax_ep._groups.tuning import rows_name
from jax_ep._ops import checks, flights, gpu_room, gradients, masked, modes
from jax_ep._ops.options import CombineOptions


def combine(
    rows: Float[Array, "*capacity hidden"],
    handle: Handle,
    *,
    group: Group,
    weights: Float[Array, "*capacity"] | None = None,
    config: DispatchConfig | None = None,
) -> Float[Array, "tokens hidden"]:
    """Bring the expert outputs of each token home and sum them.

    It reverses ``dispatch``: row c of this rank is added to the token that it came from. Call it
    inside ``jax.shard_map`` over the whole mesh of ``group``. In pseudocode, on rank r::

        for token in range(T):
            y[token] = sum(weight * row for every kept row of (r, token), on every rank)

    Sums have a fixed order and fixed roundings: each rank adds its rows of a token in float32, by
    ascending local expert, and rounds to the row dtype; the home rank adds these partial sums in
    float32, by ascending rank, and rounds again. So the bits never depend on timing.

    Example (the routes of the example in ``dispatch``)::

        rank 0: rows = [p, q, r, - | ...]           y = [p + s, u + q]
        rank 1: rows = [s, t, u, v | ...]           y = [t + v, r]

    Gradients: ``rows`` receive the cotangent of their token (``dispatch`` along the handle), scaled
    by their weight if there are weights; ``weights`` receive the dot product of row and cotangent. In
    forward mode (``jax.jvp``) there is one more combine for the tangents of the rows, and one for those
    of the weights, and derivatives of any order work.

    Args:
        rows: ``[C, H]`` bf16, f16 or f32: the expert outputs, in the order of the dispatched rows; in
            layout "masked" ``[L, S, H]``.
            Padding and unused rows are not read. On GPUs a row has at most 32 MiB / (R − 1) in
            layout "expert", and at most 106240 bytes for gradients with ``weights``.
        handle: The handle of the dispatch.
        group: The group of the handle.
        weights: ``[C]`` factors of the rows (layout "expert"), or ``[L, S]`` in layout "masked", such
            as the ``weights`` that dispatch returned; float32, or bfloat16 or float16, which is cast
            to it. None sums the rows as they are. It is cheaper to multiply by the weights before the
            down projection.
        config: How to use the machine; None takes the defaults. The default mode, "auto", takes
            "latency" for few tokens in groups made for it, whatever mode the dispatch had.

    Returns:
        ``[T, H]`` in the dtype of ``rows``; zero for tokens without rows.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for any other argument that does not fit; the text says what would.
    """

    def issue(num_sms: int, latency: bool) -> Flight:
        return flights.in_line(group, num_sms)

    return combine_by(issue, rows, handle, group=group, weights=weights, config=config)


def combine_by(
    issue: flights.Issue,
    rows: Float[Array, "*capacity hidden"],
    handle: Handle,
    *,
    group: Group,
    weights: Float[Array, "*capacity"] | None = None,
    config: DispatchConfig | None = None,
    order: Callable[[Handle], Handle] = lambda handle: handle,
    send: Callable[..., Any] | None = None,
) -> Any:
    """``combine``, issued as ``issue`` says, along ``order(handle)``.

    ``send`` is as in ``dispatch_by``; ``combined`` makes what the second half gives into the result.
    """
    op = "combine"
    checks.check_group(op, group)
    arguments.check_config(op, config)
    checks.check_handle(op, handle, group)
    if isinstance(rows, Quantized):
        raise arguments.type_error(
            op, "rows", "an array", "Quantized", "turn it into a dense one with jax_ep.dequantize"
        )
    if handle.masked:
        rows = masked.join(op, "rows", handle, rows)
        weights = None if weights is None else masked.join(op, "weights", handle, weights)
    arguments.check_rows(op, "rows", rows)
    if rows.shape[0] != handle.capacity:
        raise arguments.value_error(
            op,
            "rows",
            f"the {handle.capacity} rows of the dispatch",
            f"shape {rows.shape}",
            "keep padding and unused rows in place",
        )
    name = rows_name(rows.dtype)
    config = modes.choose(
        "combine",
        rows,
        handle.topk_idx,
        group=group,
        layout=handle.layout,
        moved=name,
        config=config,
        in_flight=send is not None,
    )
    gpu_room.check_latency_fits(op, "rows", rows, handle.topk_idx, group, config)
    if not is_latency(config):
        gpu_room.check_sums_fit(op, "rows", rows, handle.layout, group)
    _check_weights(op, weights, handle)
    weights = None if weights is None else weights.astype(jnp.float32)
    rows, weights, handle = gradients.vary_together(group, rows, weights, handle)
    num_tokens, requested = handle.topk_idx.shape[0], None if config is None else config.num_sms
    if is_latency(config):
        num_sms = latency_sms_of(group, num_tokens=num_tokens, requested=requested)
    else:
        num_sms = sms_of_passes(
            group,
            {"combine": name, "dispatch": name},
            layout=handle.layout,
            hidden=rows.shape[1],
            num_tokens=num_tokens,
            requested=requested,
        )
    latency = is_latency(config) and num_tokens > 0
    options = CombineOptions(group, config, issue(num_sms, latency))
    handle = order(handle)
    if send is not None and latency and group.backend == "cuda":
        return send(options, rows, weights, handle)
    if weights is None:
        y = gradients.combine(options, rows, handle)
    else:
        y = gradients.combine_weighted(options, rows, weights, handle)
    return combined(y)


def combined(y: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
    """The result of a combine."""
    return checkpoint_name(y, "jax_ep.combine")


def _check_weights(op: str, weights: Array | None, handle: Handle) -> None:
    if weights is None:
        return
    checks.check_float_weights(op, "weights", weights)
    if handle.layout != "expert":
        raise arguments.value_error(
            op,
            "weights",
            "None in layout 'token', whose rows each sum several experts",
            f"shape {weights.shape}",
            "multiply the expert outputs before summing them into rows",
        )
    if weights.shape != (handle.capacity,):
        raise arguments.value_error(
            op,
            "weights",
            f"shape ({handle.capacity},), one for each row",
            f"shape {weights.shape}",
            "pass the weights that dispatch returned, or one factor for each of its rows",
        )
