"""Which experts a layer has: those of jax_ep, with their options, or a function of the user's own."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jax_ep._core.types import Dispatched, UnusedRows
from jax_ep._groups.group import Group
from jax_ep._moe.activations import Activation
from jax_ep._moe.experts import Beside, GroupedDot, apply_experts, products
from jax_ep._moe.own_experts import ExpertFunction, apply_own
from jax_ep._moe.params import MoEParams, moe_partition_specs
from jax_ep._moe.tensor_axis import once


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """The static settings of a layer's experts, hashable; see ``moe``.

    Attributes:
        activation: Of the experts of jax_ep and of the shared expert.
        grouped_dot: The user's own product, or None.
        function: The user's own experts, or None for those of jax_ep.
        tensor_axis: The mesh axis that inner channels are split over, or None.
        specs: The spec of each leaf of ``params.experts``.
    """

    activation: Activation
    grouped_dot: GroupedDot | None
    function: ExpertFunction | None
    tensor_axis: str | None = None
    specs: tuple[PartitionSpec, ...] = ()

    @property
    def unused_rows(self) -> UnusedRows:
        """What dispatch leaves in rows past the last group.

        Experts of jax_ep go by group sizes. A function of the user's own may read all rows.
        """
        of_jax_ep = self.grouped_dot is None and self.function is None
        return "undefined" if of_jax_ep else "zero"

    def partition_specs(self, params: MoEParams, group: Group) -> MoEParams:
        """The spec of each weight, with which it enters ``shard_map``."""
        specs = moe_partition_specs(params, group=group, tensor_axis=self.tensor_axis)
        of_own = jax.tree.unflatten(jax.tree.structure(params.experts), self.specs)
        return specs._replace(experts=of_own)

    def apply(
        self, out: Dispatched, params: MoEParams, beside: Beside
    ) -> Float[Array, "rows hidden"]:
        """The outputs of the local experts for the rows that came, weighted.

        With a tensor axis, they are parts whose sum over the axis is the outputs.
        """
        if self.function is not None:
            return apply_own(out, self.function, params.experts)
        params = params._replace(down_bias=once(params.down_bias, self.tensor_axis))
        assert params.up is not None
        gated = params.gate is not None
        dots = products(self.grouped_dot, beside, params.up.shape[-1], gated=gated)
        return apply_experts(out, params, dots, self.activation)
