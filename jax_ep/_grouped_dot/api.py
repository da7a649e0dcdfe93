"""Matmuls of grouped rows, each group with a matrix of its own.

``jax.lax.ragged_dot`` multiplies every row with every matrix on CPU (and GPU) and masks the
products of other groups. Here a loop (``loops.py``) walks over tiles of the rows of each group.

On Hopper GPUs, kernels (``hopper/``) do the same much faster. Forward and backward need only two:
the product itself and the gradient of the matrices. Both have a form for two matrices a group, which
gate and up projection are (``grouped_dot_pair``): rows are read once, and the gradient of the rows is
summed where it is computed.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int32

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._core.batching import batched_alike
from jax_ep._core.types import UnusedRows
from jax_ep._grouped_dot import forms
from jax_ep._grouped_dot.forms import ALL_SMS as ALL_SMS
from jax_ep._grouped_dot.forms import ProductSms as ProductSms


def grouped_dot(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups inner outer"],
    group_sizes: Int32[Array, " groups"],
    *,
    num_sms: int | None = None,
    unused_rows: UnusedRows = "zero",
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
        unused_rows: What rows past the last group are, in the result and in the gradient of ``lhs``:
            "zero", or "undefined", possibly NaN, which GPUs need not write.

    Returns:
        ``[C, F]`` in the dtype of ``lhs``.

    Raises:
        TypeError: if the dtypes of ``lhs`` and ``rhs`` differ, or if ``num_sms`` is no int.
        ValueError: if the shapes do not fit each other, if ``num_sms`` is below 1, or for another
            ``unused_rows``.
    """
    op = "grouped_dot"
    check_num_sms(op, num_sms)
    arguments.check_one_of(op, "unused_rows", unused_rows, ("zero", "undefined"))
    check_operands(op, "lhs", lhs, "rhs", rhs, group_sizes)
    sms = ProductSms(num_sms, num_sms, num_sms)
    return grouped_dot_on(sms, unused_rows, lhs, rhs, group_sizes)


def grouped_dot_on(
    sms: ProductSms,
    unused_rows: UnusedRows,
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups inner outer"],
    group_sizes: Int32[Array, " groups"],
) -> Float[Array, "rows outer"]:
    """``grouped_dot`` whose products have numbers of SMs of their own."""
    operands = batched_alike(lhs, rhs, group_sizes)
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    lhs, rhs, group_sizes = (_compat.cast_varying(x, axes) for x in operands)
    return forms.product(sms, unused_rows == "zero", lhs, rhs, group_sizes)


def grouped_dot_pair(
    sms: ProductSms,
    unused_rows: UnusedRows,
    lhs: Float[Array, "rows inner"],
    rhs: tuple[Float[Array, "groups inner outer"], Float[Array, "groups inner outer"]],
    group_sizes: Int32[Array, " groups"],
) -> tuple[Float[Array, "rows outer"], Float[Array, "rows outer"]]:
    """The products of the same rows with two matrices a group, of one shape.

    Kernels read the rows once, forward and for the gradient of the matrices, and sum both parts of the
    gradient of the rows in float32. In plain JAX it is ``grouped_dot_on`` twice.
    """
    operands = batched_alike(lhs, *rhs, group_sizes)
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    lhs, first, second, group_sizes = (_compat.cast_varying(x, axes) for x in operands)
    return forms.product(sms, unused_rows == "zero", lhs, (first, second), group_sizes)


def check_operands(
    op: str, rows_name: str, rows: Array, name: str, matrices: Array, group_sizes: Array
) -> None:
    """Raise the error of a product whose matrices do not fit its rows."""
    if rows.dtype != matrices.dtype:
        wanted = f"dtype {rows.dtype} as {rows_name}"
        raise arguments.type_error(op, name, wanted, f"dtype {matrices.dtype}", "cast one of them")
    groups = group_sizes.shape[0]
    if rows.ndim != 2 or matrices.ndim != 3 or matrices.shape[:2] != (groups, rows.shape[1]):
        raise arguments.value_error(
            op,
            name,
            f"[groups, inner, outer] for {rows_name} [rows, inner] {rows.shape} and {groups} groups",
            f"shape {matrices.shape}",
            "pass one matrix for each group",
        )


def check_num_sms(op: str, num_sms: Any) -> None:
    """Raise the error of a number of SMs that is none."""
    if num_sms is None:
        return
    wanted, fix = ("a positive int or None", "pass the number of SMs that it may occupy")
    if not arguments.is_int(num_sms):
        raise arguments.type_error(op, "num_sms", wanted, type(num_sms).__name__, fix)
    if num_sms < 1:
        raise arguments.value_error(op, "num_sms", wanted, num_sms, fix)
