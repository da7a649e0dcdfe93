"""Checks, while tracing, that GPU kernels have room for rows."""

from __future__ import annotations

import jax

from jax_ep._core import arguments, limits
from jax_ep._core.types import DispatchConfig, Layout, is_latency
from jax_ep._groups import network
from jax_ep._groups.group import Group
from jax_ep._groups.latency_mode import MOST_ENTRIES


def check_sums_fit(
    op: str, argument: str, rows: jax.Array, layout: Layout, group: Group, what: str = "on GPUs"
) -> None:
    """GPUs can sum rows like these: in layout "expert" one of each peer must fit their ring."""
    check_chunk_fits(op, argument, rows, group)
    if group.transport != "peer" or layout != "expert":
        return
    _check_row_bytes(op, argument, rows, limits.max_summed_row_bytes(group.size), what)


def check_weighted_gradient_fits(op: str, argument: str, rows: jax.Array, group: Group) -> None:
    """GPUs can take the gradient of ``combine`` with weights of rows like these."""
    check_chunk_fits(op, argument, rows, group)
    if group.transport == "peer":
        what = "for gradients with weights on GPUs"
        _check_row_bytes(op, argument, rows, limits.max_vjp_row_bytes(), what)


def check_latency_fits(
    op: str,
    argument: str,
    rows: jax.Array,
    topk_idx: jax.Array,
    group: Group,
    config: DispatchConfig | None,
) -> None:
    """Latency mode, if it is asked for, has room for such rows; on all platforms alike."""
    if not is_latency(config):
        return
    num_tokens, channels = topk_idx.shape[0], _latency_channels(rows)
    sizes = f"latency_tokens={num_tokens}, latency_hidden="
    if group.latency_tokens == 0:
        raise arguments.value_error(
            op,
            "config",
            "a mode other than 'latency' for a group without inboxes",
            "mode='latency'",
            f"make the group with create_group(..., {sizes}{channels})",
        )
    for what, size, most in _latency_limits(rows, topk_idx, group):
        if size > most:
            raise arguments.value_error(
                op,
                argument,
                f"at most {most} {what} in mode 'latency'",
                size,
                "make the group with larger latency_tokens= or latency_hidden= (up to 512 tokens), or "
                "use mode='throughput'",
            )
    if channels == 0:
        raise arguments.value_error(
            op, argument, "rows with channels in mode 'latency'", 0, "use mode='throughput'"
        )


def fits_latency(rows: jax.Array, topk_idx: jax.Array, group: Group) -> bool:
    """Whether latency mode has room for such rows, and anything to do."""
    if topk_idx.shape[0] == 0 or _latency_channels(rows) == 0:
        return False
    return all(size <= most for _, size, most in _latency_limits(rows, topk_idx, group))


def _latency_channels(rows: jax.Array) -> int:
    """Channels of 16 bits that inboxes of latency mode need for a row."""
    return rows.shape[1] * max(rows.dtype.itemsize // 2, 1)


def _latency_limits(
    rows: jax.Array, topk_idx: jax.Array, group: Group
) -> tuple[tuple[str, int, int], ...]:
    """What latency mode has bounds for: its name, its size here, and the bound."""
    num_tokens, top_k = topk_idx.shape
    return (
        ("tokens a rank", num_tokens, group.latency_tokens),
        ("channels of 16 bits", _latency_channels(rows), group.latency_hidden),
        ("entries of topk_idx over all ranks", group.size * num_tokens * top_k, MOST_ENTRIES),
    )


def check_chunk_fits(op: str, argument: str, rows: jax.Array, group: Group) -> None:
    """Where the group spans hosts, a chunk of the network has room for a row."""
    if group.transport == "nvshmem":
        most = network.settings_of(group.id).max_row_bytes
        what = "between hosts (JAX_EP_NETWORK_CHUNK_BYTES)"
        _check_row_bytes(op, argument, rows, most, what)


def check_choices_fit(op: str, topk_idx: jax.Array, group: Group) -> None:
    """Where the group spans hosts, a message of the plan has room for all choices of a rank."""
    if group.transport != "nvshmem":
        return
    most = network.settings_of(group.id).max_choices
    if topk_idx.size > most:
        raise arguments.value_error(
            op,
            "topk_idx",
            f"at most {most} entries between hosts (JAX_EP_NETWORK_CHOICES)",
            f"{topk_idx.shape[0]} tokens of {topk_idx.shape[1]}",
            "split the tokens over several calls, or set the variable to more before the first group "
            "that spans hosts is made",
        )


def _check_row_bytes(op: str, argument: str, rows: jax.Array, most: int, what: str) -> None:
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    if row_bytes > most:
        raise arguments.value_error(
            op,
            argument,
            f"rows of at most {most} bytes {what}",
            f"hidden {rows.shape[1]} of {rows.dtype} = {row_bytes} bytes",
            "use a narrower dtype or split hidden over several calls, or make the group with "
            "backend='reference'",
        )
