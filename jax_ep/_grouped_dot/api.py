"""Matmuls of grouped rows, each group with a matrix of its own.

``jax.lax.ragged_dot`` multiplies every row with every matrix on CPU (and GPU) and masks the
products of other groups. Here a loop walks over tiles of the rows of each group. Its trip count
follows from the rows in use, so neither other groups' matrices nor unused rows cost anything.

On Hopper GPUs, kernels (``hopper/``) do the same much faster. Forward and backward need only two:
the product itself and the gradient of the matrices.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._core.batching import batched_alike

logger = logging.getLogger("jax_ep")

_TILE = 128  # rows; 64 to 256 are equally fast, more wastes work on groups of few rows


@dataclasses.dataclass(frozen=True)
class ProductSms:
    """SMs that the kernels of a grouped product and of its gradients may occupy; None for all.

    Attributes:
        forward: Of the product itself.
        d_lhs: Of the gradient of the rows. If this one has fewer SMs than that of the matrices, it
            comes first, because it is beside an op that was started just before.
        d_rhs: Of the gradient of the matrices.
    """

    forward: int | None = None
    d_lhs: int | None = None
    d_rhs: int | None = None


def grouped_dot(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups inner outer"],
    group_sizes: Int32[Array, " groups"],
    *,
    num_sms: int | None = None,
) -> Float[Array, "rows outer"]:
    """Multiply each group of rows with the matrix of its group.

    In pseudocode::

        start = 0
        for group, size in enumerate(group_sizes):
            out[start : start + size] = lhs[start : start + size] @ rhs[group]
            start += size
        out[start:] = 0

    Products are summed in float32 and rounded to the dtype of ``lhs``. The gradient of ``rhs`` is
    summed in float32 too. Rows past the last group are not read, give zeros and have no gradient.

    On Hopper GPUs, fast kernels run where the inner and outer channels are multiples of 128.
    With other channels a loop runs, and a warning says so once. The kernels make float32 products
    of three products of bfloat16 halves, exact to about 2⁻¹⁶ of the operands.

    The kernels run one block on each streaming multiprocessor (SM) until all is done. So an op in
    flight beside them finds no SM, unless ``num_sms`` leaves it some (``Ticket.free_sms``).

    This is the default of ``jax_ep.moe``, which also takes another function with the first three
    arguments and this result, such as ``jax.lax.ragged_dot``.

    Args:
        lhs: ``[C, H]`` rows, those of a group side by side.
        rhs: ``[L, H, F]`` matrices, in the dtype of ``lhs``.
        group_sizes: ``[L]`` int32 rows of each group, such as ``Dispatched.group_sizes``; their sum
            is at most C.
        num_sms: SMs that the kernels may occupy, those of the gradients too; 1 or more. None, and
            any number from that of the GPU on, takes all. It never changes results, and has no
            meaning where no kernel runs.

    Returns:
        ``[C, F]`` in the dtype of ``lhs``.

    Raises:
        TypeError: if the dtypes of ``lhs`` and ``rhs`` differ, or if ``num_sms`` is no int.
        ValueError: if the shapes do not fit each other, or if ``num_sms`` is below 1.
    """
    _check_num_sms(num_sms)
    return grouped_dot_on(ProductSms(num_sms, num_sms, num_sms), lhs, rhs, group_sizes)


def grouped_dot_on(
    sms: ProductSms,
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups inner outer"],
    group_sizes: Int32[Array, " groups"],
) -> Float[Array, "rows outer"]:
    """``grouped_dot`` whose products have numbers of SMs of their own."""
    op = "grouped_dot"
    if lhs.dtype != rhs.dtype:
        raise arguments.type_error(
            op, "rhs", f"dtype {lhs.dtype} as lhs", f"dtype {rhs.dtype}", "cast one of them"
        )
    groups = group_sizes.shape[0]
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.shape[:2] != (groups, lhs.shape[1]):
        raise arguments.value_error(
            op,
            "rhs",
            f"[groups, inner, outer] for lhs [rows, inner] {lhs.shape} and {groups} groups",
            f"shape {rhs.shape}",
            "pass one matrix for each group",
        )
    operands = batched_alike(lhs, rhs, group_sizes)
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    return _grouped_dot(sms, *(_compat.cast_varying(x, axes) for x in operands))


def _check_num_sms(num_sms: Any) -> None:
    if num_sms is None:
        return
    wanted, fix = ("a positive int or None", "pass the number of SMs that it may occupy")
    if not arguments.is_int(num_sms):
        got = type(num_sms).__name__
        raise arguments.type_error("grouped_dot", "num_sms", wanted, got, fix)
    if num_sms < 1:
        raise arguments.value_error("grouped_dot", "num_sms", wanted, num_sms, fix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(sms: ProductSms, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return _rows_by_matrices(lhs, rhs, group_sizes, contract=0, num_sms=sms.forward)


def _grouped_dot_fwd(
    sms: ProductSms, lhs: Array, rhs: Array, group_sizes: Array
) -> tuple[Array, Any]:
    return _grouped_dot(sms, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


@_compat.backward
def _grouped_dot_bwd(sms: ProductSms, residuals: Any, d_out: Array) -> tuple[Array, Array, None]:
    lhs, rhs, group_sizes = residuals
    d_lhs = _rows_by_matrices(d_out, rhs, group_sizes, contract=1, num_sms=sms.d_lhs)
    if sms.d_lhs is not None and sms.d_rhs is None:
        d_lhs, d_out = lax.optimization_barrier((d_lhs, d_out))
    return d_lhs, _rows_by_rows(lhs, d_out, group_sizes, num_sms=sms.d_rhs), None


_grouped_dot.defvjp(_grouped_dot_fwd, _grouped_dot_bwd)


def _rows_by_matrices(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups a b"],
    group_sizes: Int32[Array, " groups"],
    *,
    contract: int,
    num_sms: int | None,
) -> Float[Array, "rows outer"]:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed."""
    loop = functools.partial(_loop_rows_by_matrices, contract=contract)
    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], rhs.shape[2 - contract])
    if kernels is None:
        return loop(lhs, rhs, group_sizes)
    fast = functools.partial(kernels.rows_by_matrices, contract=contract, num_sms=num_sms)
    return lax.platform_dependent(lhs, rhs, group_sizes, cuda=fast, default=loop)


def _rows_by_rows(
    lhs: Float[Array, "rows inner"],
    d_out: Float[Array, "rows outer"],
    group_sizes: Int32[Array, " groups"],
    *,
    num_sms: int | None,
) -> Float[Array, "groups inner outer"]:
    """``lhs.T @ d_out`` over the rows of each group."""
    kernels = _kernels(lhs.dtype, len(lhs), lhs.shape[1], d_out.shape[1])
    if kernels is None:
        return _loop_rows_by_rows(lhs, d_out, group_sizes)
    fast = functools.partial(kernels.rows_by_rows, num_sms=num_sms)
    return lax.platform_dependent(lhs, d_out, group_sizes, cuda=fast, default=_loop_rows_by_rows)


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


def _loop_rows_by_matrices(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups a b"],
    group_sizes: Int32[Array, " groups"],
    *,
    contract: int,
) -> Float[Array, "rows outer"]:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed."""
    rows, outer = lhs.shape[0], rhs.shape[2 - contract]
    out = _zeros((rows, outer), lhs.dtype, like=lhs)
    if rows == 0:
        return out

    def group(out: Array, operands: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = operands

        def tile(index: Array, out: Array) -> Array:
            first, mine = _tile(start, size, index, rows)
            block = lax.dynamic_slice_in_dim(lhs, first, len(mine))
            product = lax.dot_general(
                block,
                matrix,
                (((1,), (contract,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            # A tile at the end of its group reaches into rows that other groups write.
            before = lax.dynamic_slice_in_dim(out, first, len(mine))
            after = jnp.where(mine[:, None], product.astype(out.dtype), before)
            return lax.dynamic_update_slice_in_dim(out, after, first, axis=0)

        return _for_each_tile(size, rows, tile, out), None

    return lax.scan(group, out, (rhs, *_bounds(group_sizes)))[0]


def _loop_rows_by_rows(
    lhs: Float[Array, "rows inner"],
    d_out: Float[Array, "rows outer"],
    group_sizes: Int32[Array, " groups"],
) -> Float[Array, "groups inner outer"]:
    """``lhs.T @ d_out`` over the rows of each group."""
    (rows, inner), outer = lhs.shape, d_out.shape[1]
    if rows == 0:
        return _zeros((group_sizes.shape[0], inner, outer), lhs.dtype, like=lhs)

    def group(_: None, bounds: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = bounds

        def tile(index: Array, total: Array) -> Array:
            first, mine = _tile(start, size, index, rows)
            block = lax.dynamic_slice_in_dim(lhs, first, len(mine))
            cotangent = lax.dynamic_slice_in_dim(d_out, first, len(mine))
            # Both are masked, because unused rows may hold NaN, which must not reach the sum.
            return total + lax.dot_general(
                jnp.where(mine[:, None], block, 0),
                jnp.where(mine[:, None], cotangent, 0),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        total = _zeros((inner, outer), jnp.float32, like=lhs)
        return None, _for_each_tile(size, rows, tile, total).astype(lhs.dtype)

    return lax.scan(group, None, _bounds(group_sizes))[1]


def _bounds(group_sizes: Int32[Array, " groups"]) -> tuple[Array, Array]:
    """First row and number of rows of each group."""
    return jnp.cumsum(group_sizes) - group_sizes, group_sizes


def _for_each_tile(
    size: Int32[Array, ""], rows: int, tile: Callable[[Array, Array], Array], carry: Array
) -> Array:
    """``carry = tile(index, carry)`` for each tile of a group of ``size`` rows."""
    height = min(_TILE, rows)
    # Computed, since vmap with spmd_axis_name fails on a constant where the bound is batched: a
    # constant has no mesh, so JAX cannot make it vary over the axis (0.10.2 to 0.12.0).
    first = size - size
    return lax.fori_loop(first, (size + height - 1) // height, tile, carry)


def _tile(
    start: Int32[Array, ""], size: Int32[Array, ""], index: Int32[Array, ""], rows: int
) -> tuple[Array, Array]:
    """First row of a tile, moved up so that it ends within the rows; and a mask of its own rows."""
    height = min(_TILE, rows)
    wanted = start + index * height
    first = jnp.minimum(wanted, rows - height)
    row = first + jnp.arange(height, dtype=jnp.int32)
    return first, (row >= wanted) & (row < start + size)


def _zeros(shape: tuple[int, ...], dtype: Any, *, like: Array) -> Array:
    return _compat.cast_varying(jnp.zeros(shape, dtype), _compat.varying_axes(like))
