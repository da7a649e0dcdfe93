"""``jax_ep.grouped_mlp``: the MLPs of experts, for the rows that ``dispatch`` brought."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._core import arguments
from jax_ep._core.types import UnusedRows
from jax_ep._grouped_dot.api import ProductSms, check_num_sms, check_operands
from jax_ep._moe.activations import Activation, GatedActivation, activate
from jax_ep._moe.experts import Products


def grouped_mlp(
    rows: Float[Array, "rows hidden"],
    gate: Float[Array, "_ _ _"] | None,  # whose shapes are checked below, with better texts
    up: Float[Array, "_ _ _"],
    down: Float[Array, "_ _ _"],
    group_sizes: Int32[Array, " groups"],
    *,
    row_weights: Float32[Array, " rows"] | None = None,
    activation: Activation = jax.nn.silu,
    num_sms: int | None = None,
    unused_rows: UnusedRows = "zero",
) -> Float[Array, "rows hidden"]:
    """Put each group of rows through the MLP of its group.

    In pseudocode, for every row of every group::

        inner = activation(row @ gate[group]) * (row @ up[group])     # products summed in float32
        out = (inner * row_weight) @ down[group]

    It computes what three calls of ``grouped_dot`` do, in less time on Hopper GPUs: the rows are read
    once for gate and up projection and once for the gradient of both, and the gradient of the rows is
    the sum of two products that is never rounded in between. Rows past the last group cost nothing in
    the products if ``unused_rows`` is "undefined". It is what ``jax_ep.moe`` calls with the results of
    ``dispatch``; use it to build a layer of your own::

        out = jax_ep.dispatch(x, topk_idx, topk_weights, ..., unused_rows="undefined")
        rows = jax_ep.grouped_mlp(
            out.tokens, gate, up, down, out.group_sizes,
            row_weights=out.weights, unused_rows="undefined",
        )
        y = jax_ep.combine(rows, out.handle, group=group)

    Both modes of differentiation work, in any order, under ``jax.checkpoint`` too. See ``grouped_dot``
    for what the kernels need.

    Args:
        rows: ``[C, H]``, those of a group side by side, bf16, f16 or f32.
        gate: ``[L, H, F]`` in the dtype of ``rows``, or None for MLPs without a gate, whose inner
            channels are ``activation(row @ up[group])``.
        up: ``[L, H, F]``.
        down: ``[L, F, H]``.
        group_sizes: ``[L]`` int32 rows of each group; their sum is at most C.
        row_weights: ``[C]`` factors of the outputs, applied to the inner channels, which are fewer;
            None for 1.
        activation: Activation function of the gate, or of ``up`` without one; or of both, a
            ``GatedActivation``. It gets float32.
        num_sms: SMs that the kernels may occupy, as in ``grouped_dot``.
        unused_rows: What rows past the last group are, in the result and in the gradient of ``rows``:
            "zero" or "undefined". Those of ``rows`` and ``row_weights`` are not read into any other
            row. Their gradients for ``row_weights`` are undefined in either case.

    Returns:
        ``[C, H]`` in the dtype of ``rows``.

    Raises:
        TypeError: if the dtypes of rows and matrices differ, if ``num_sms`` is no int, or for a
            ``GatedActivation`` without a gate.
        ValueError: if the shapes do not fit each other, if ``num_sms`` is below 1, or for another
            ``unused_rows``.
    """
    op = "grouped_mlp"
    check_num_sms(op, num_sms)
    arguments.check_one_of(op, "unused_rows", unused_rows, ("zero", "undefined"))
    for name, matrices in (("gate", gate), ("up", up)):
        if matrices is not None:
            check_operands(op, "rows", rows, name, matrices, group_sizes)
    if gate is not None and gate.shape != up.shape:
        raise arguments.value_error(
            op, "gate", f"the shape of up, {up.shape}", gate.shape, "pass two of one shape"
        )
    if down.shape != (up.shape[0], up.shape[2], rows.shape[1]) or down.dtype != rows.dtype:
        raise arguments.value_error(
            op,
            "down",
            f"{(up.shape[0], up.shape[2], rows.shape[1])} {rows.dtype}",
            f"{down.shape} {down.dtype}",
            "pass one matrix [inner, hidden] for each group, in the dtype of rows",
        )
    if gate is None and isinstance(activation, GatedActivation):
        raise arguments.type_error(
            op, "activation", "a function of up", "GatedActivation", "pass gate, or such a function"
        )
    sms = ProductSms(num_sms, num_sms, num_sms)
    products = Products(up=sms, down=sms, unused_rows=unused_rows)
    inner = activate(*products.of_rows(rows, gate, up, group_sizes), activation)
    if row_weights is not None:
        inner = inner * row_weights[:, None]
    return products.of_inner(inner.astype(rows.dtype), down, group_sizes)
