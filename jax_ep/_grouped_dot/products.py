"""The grouped products that forward and backward passes consist of: a kernel of ``hopper/`` or a loop.

A product of one of two matrices a group, or of both, comes with or without zeros past the last group
(``clears``). ``num_sms`` bounds the SMs of kernels; None takes all.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep import _compat
from jax_ep._grouped_dot import loops

logger = logging.getLogger("jax_ep")

Pair = tuple[Array, Array]


def rows_by_matrices(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups a b"],
    group_sizes: Int32[Array, " groups"],
    *,
    contract: int,
    clears: bool,
    num_sms: int | None,
) -> Float[Array, "rows outer"]:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed."""
    loop = functools.partial(loops.rows_by_matrices, contract=contract, clears=clears)
    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], rhs.shape[2 - contract])
    if kernels is None:
        return loop(lhs, rhs, group_sizes)
    fast = functools.partial(
        kernels.rows_by_matrices, contract=contract, clears=clears, num_sms=num_sms
    )
    return lax.platform_dependent(lhs, rhs, group_sizes, cuda=fast, default=loop)


def rows_by_rows(
    lhs: Float[Array, "rows inner"],
    d_out: Float[Array, "rows outer"],
    group_sizes: Int32[Array, " groups"],
    *,
    num_sms: int | None,
) -> Float[Array, "groups inner outer"]:
    """``lhs.T @ d_out`` over the rows of each group."""
    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], d_out.shape[1])
    if kernels is None:
        return loops.rows_by_rows(lhs, d_out, group_sizes)
    fast = functools.partial(kernels.rows_by_rows, num_sms=num_sms)
    return lax.platform_dependent(lhs, d_out, group_sizes, cuda=fast, default=loops.rows_by_rows)


def rows_by_pair(
    lhs: Float[Array, "rows inner"],
    rhs: Pair,
    group_sizes: Int32[Array, " groups"],
    *,
    clears: bool,
    num_sms: int | None,
) -> Pair:
    """Each row times both matrices of its group."""

    def loop(lhs: Array, rhs: Pair, group_sizes: Array) -> Pair:
        each = functools.partial(loops.rows_by_matrices, contract=0, clears=clears)
        return each(lhs, rhs[0], group_sizes), each(lhs, rhs[1], group_sizes)

    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], rhs[0].shape[2])
    if kernels is None:
        return loop(lhs, rhs, group_sizes)
    fast = functools.partial(kernels.rows_by_pair, clears=clears, num_sms=num_sms)
    return lax.platform_dependent(lhs, rhs, group_sizes, cuda=fast, default=loop)


def sum_of_pair(
    lhs: Pair,
    rhs: Pair,
    group_sizes: Int32[Array, " groups"],
    *,
    clears: bool,
    num_sms: int | None,
) -> Float[Array, "rows outer"]:
    """The sum of two products of rows with the transposed matrices of their groups.

    Kernels sum both in float32; loops round each to the dtype of the rows first.
    """

    def loop(lhs: Pair, rhs: Pair, group_sizes: Array) -> Array:
        each = functools.partial(loops.rows_by_matrices, contract=1, clears=clears)
        return each(lhs[0], rhs[0], group_sizes) + each(lhs[1], rhs[1], group_sizes)

    kernels = _kernels(lhs[0].dtype, len(lhs[0]), lhs[0].shape[1], rhs[0].shape[1])
    if kernels is None:
        return loop(lhs, rhs, group_sizes)
    fast = functools.partial(kernels.sum_of_pair, clears=clears, num_sms=num_sms)
    return lax.platform_dependent(lhs, rhs, group_sizes, cuda=fast, default=loop)


def pair_by_rows(
    lhs: Float[Array, "rows inner"],
    d_outs: Pair,
    group_sizes: Int32[Array, " groups"],
    *,
    num_sms: int | None,
) -> Pair:
    """``lhs.T @ d_out`` over the rows of each group, for both of two."""

    def loop(lhs: Array, d_outs: Pair, group_sizes: Array) -> Pair:
        first, second = d_outs
        each = loops.rows_by_rows
        return each(lhs, first, group_sizes), each(lhs, second, group_sizes)

    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], d_outs[0].shape[1])
    if kernels is None:
        return loop(lhs, d_outs, group_sizes)
    fast = functools.partial(kernels.pair_by_rows, num_sms=num_sms)
    return lax.platform_dependent(lhs, d_outs, group_sizes, cuda=fast, default=loop)


def _kernels(dtype: Any, rows: int, inner: int, outer: int) -> Any:
    """The module of the kernels for such operands, or None. A warning says why a GPU uses none."""
    if not _compat.targets_hopper():
        return None
    from jax_ep._grouped_dot import hopper as kernels

    reason = kernels.why_not(dtype, rows, inner, outer)
    if reason is None:
        return kernels
    if rows > 0:
        _warn_of_loop(reason)
    return None


@functools.cache
def _warn_of_loop(reason: str) -> None:
    logger.warning("grouped_dot goes through a slow loop, not its GPU kernels: %s", reason)
