"""The MLPs of a layer: those of the local experts, and the shared one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from jax_ep._core.types import Dispatched, Quantized, UnusedRows
from jax_ep._grouped_dot.api import ALL_SMS, ProductSms, grouped_dot_on, grouped_dot_pair
from jax_ep._moe.activations import Activation, activate
from jax_ep._moe.biases import add_bias
from jax_ep._moe.params import MoEParams, SharedExpert

GroupedDot = Callable[[Array, Array, Array], Array]

# An op takes about as long as a grouped product of its rows with this many columns, on H200s: dispatch
# with 8 ranks over NVLink. With fewer ranks it is less, because fewer rows cross a link.
_COLUMNS_OF_AN_OP = 1024


class Beside(NamedTuple):
    """The ops in flight beside the experts of a chunk, in either pass.

    Attributes:
        free_sms: The SMs that they leave to the experts; None where they hold none.
        num_ops: How many there are, one after the other.
    """

    free_sms: int | None = None
    num_ops: int = 0


@dataclasses.dataclass(frozen=True)
class Products:
    """The grouped products of MLPs.

    Attributes:
        own: The user's own function, which then makes all of them and leaves no SMs; None for
            ``jax_ep.grouped_dot``.
        up: The SMs of the products with gate and up projection.
        down: The SMs of the product with the down projection.
        unused_rows: What rows past the last group are in the results of ``jax_ep.grouped_dot``.
    """

    own: GroupedDot | None = None
    up: ProductSms = ALL_SMS
    down: ProductSms = ALL_SMS
    unused_rows: UnusedRows = "undefined"

    def of_rows(
        self, rows: Array, gate: Array | None, up: Array, group_sizes: Array
    ) -> tuple[Array | None, Array]:
        """The products with the gate, None where there is none, and with the up projection."""
        if self.own is not None:
            gated = None if gate is None else self.own(rows, gate, group_sizes)
            return gated, self.own(rows, up, group_sizes)
        if gate is None:
            return None, grouped_dot_on(self.up, self.unused_rows, rows, up, group_sizes)
        return grouped_dot_pair(self.up, self.unused_rows, rows, (gate, up), group_sizes)

    def of_inner(self, inner: Array, down: Array, group_sizes: Array) -> Array:
        """The product of the inner channels with the down projection."""
        if self.own is not None:
            return self.own(inner, down, group_sizes)
        return grouped_dot_on(self.down, self.unused_rows, inner, down, group_sizes)


def products(
    own: GroupedDot | None, beside: Beside, intermediate: int, *, gated: bool = True
) -> Products:
    """The products of experts of that width F, some of which leave SMs to the ops beside them.

    An op is usually shorter than the experts. So only the first products of each pass leave SMs, as
    many as take the time of the ops; the others take all.

    Args:
        own: The user's own function, or None.
        beside: What is beside the experts.
        intermediate: F.
        gated: Whether the product with the gate is among them, in one kernel with the up projection's.
    """
    free = beside.free_sms
    if own is not None or free is None:
        return Products(own)
    leaving = -(-beside.num_ops * _COLUMNS_OF_AN_OP // max(intermediate, 1))
    second, third = (free if leaving >= number else None for number in (2, 3))
    # Backward the down projection comes first: the gradient of its rows, then that of its matrices.
    return Products(
        up=ProductSms(forward=free, d_lhs=third, d_rhs=third),
        down=ProductSms(forward=third if gated else second, d_lhs=free, d_rhs=second),
    )


def apply_experts(
    out: Dispatched, params: MoEParams, dots: Products, activation: Activation
) -> Float[Array, "rows hidden"]:
    """The outputs of the local experts for the rows that came, weighted."""
    rows, weights, sizes = out.tokens, out.weights, out.group_sizes
    assert weights is not None and not isinstance(rows, Quantized)  # as was asked of dispatch
    gate, up, down = (_cast(w, rows) for w in (params.gate, params.up, params.down))
    assert up is not None and down is not None
    biases = (params.gate_bias, params.up_bias, params.down_bias)
    expert_of_row = None if all(bias is None for bias in biases) else out.expert_of_row

    def biased(product: Array, bias: Array | None, weights: Array | None = None) -> Array:
        if bias is None:
            return product
        assert expert_of_row is not None
        return add_bias(product, bias, expert_of_row, weights)

    gated, product = dots.of_rows(rows, gate, up, sizes)
    if gated is not None:
        gated = biased(gated, params.gate_bias)
    inner = activate(gated, biased(product, params.up_bias), activation)
    # The down projection is linear: its few input channels are cheaper to weight than its outputs.
    weighted = (inner * weights[:, None]).astype(out.tokens.dtype)
    outputs = dots.of_inner(weighted, down, sizes)
    return biased(outputs, params.down_bias, weights).astype(outputs.dtype)


def shared_inner(
    x: Float[Array, "tokens hidden"], shared: SharedExpert, activation: Activation
) -> Float[Array, "tokens inner"]:
    """The inner channels of the shared expert."""
    gate, up = _cast(shared.gate, x), shared.up.astype(x.dtype)
    return activate(None if gate is None else x @ gate, x @ up, activation).astype(x.dtype)


def shared_outputs(
    inner: Float[Array, "tokens inner"], shared: SharedExpert
) -> Float[Array, "tokens hidden"]:
    """The outputs of the shared expert for its inner channels."""
    return inner @ shared.down.astype(inner.dtype)


def _cast(weight: Array | None, like: Array) -> Array | None:
    return None if weight is None else weight.astype(like.dtype)
