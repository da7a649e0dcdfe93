"""Checks, while tracing, that GPU kernels have room for rows."""

from __future__ import annotations

import jax

from jax_ep._core import arguments, limits
from jax_ep._core.types import Layout
from jax_ep._groups.group import Group


def check_sums_fit(
    op: str, argument: str, rows: jax.Array, layout: Layout, group: Group, what: str = "on GPUs"
) -> None:
    """GPUs can sum such rows: in layout "expert", one row of each peer must fit their ring."""
    if group.backend != "cuda" or layout != "expert":
        return
    _check_row_bytes(op, argument, rows, limits.max_summed_row_bytes(group.size), what)


def check_weighted_gradient_fits(op: str, argument: str, rows: jax.Array, group: Group) -> None:
    """GPUs can take the gradient of ``combine`` with weights for such rows."""
    if group.backend == "cuda":
        what = "for gradients with weights on GPUs"
        _check_row_bytes(op, argument, rows, limits.max_vjp_row_bytes(), what)


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
