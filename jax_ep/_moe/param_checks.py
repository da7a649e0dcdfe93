"""Errors of ``moe`` about its weights and its experts, while tracing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._groups.group import Group
from jax_ep._moe.activations import GatedActivation
from jax_ep._moe.checks import check_function
from jax_ep._moe.local_experts import LocalExperts
from jax_ep._moe.params import MoEParams, SharedExpert, moe_partition_specs

_MAKE = "make the weights with jax_ep.init_moe_params"
_OF_JAX_EP = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_REQUIRED = ("router_kernel", "up", "down")


def check_experts(
    params: Any,
    hidden: int,
    num_experts: int,
    group: Group,
    experts: LocalExperts,
    expert_specs: Any,
) -> LocalExperts:
    """``experts`` with their specs, after a check that they and ``params`` fit each other."""
    check_function("activation", experts.activation)
    for name, function in (("grouped_dot", experts.grouped_dot), ("experts", experts.function)):
        if function is not None:
            check_function(name, function)
    if not isinstance(params, MoEParams):
        raise arguments.type_error(
            "moe",
            "params",
            "jax_ep.MoEParams",
            type(params).__name__,
            f"{_MAKE}, or put yours into jax_ep.MoEParams",
        )
    own = experts.function is not None
    _check_is_array("router_kernel", params.router_kernel)
    _check_is_array("router_bias", params.router_bias, optional=True)
    if own:
        _check_only_own(params, experts.grouped_dot)
    else:
        _check_only_of_jax_ep(params, expert_specs, experts.activation)
    up = None if own else params.up
    intermediate = up.shape[-1] if up is not None and up.ndim else 0
    _check_shapes(params, hidden, num_experts, intermediate)
    _check_shared(params.shared, hidden, experts.activation)
    check_widths("moe", params, experts.tensor_axis, group)
    specs = _check_own(params, num_experts, group, expert_specs) if own else ()
    if own and experts.tensor_axis is not None:
        _check_names_axis(specs, experts.tensor_axis)
    return dataclasses.replace(experts, specs=specs)


def _check_is_array(name: str, weight: Any, *, optional: bool = False, fix: str = _MAKE) -> None:
    if isinstance(weight, jax.Array | np.ndarray) or (optional and weight is None):
        return
    raise arguments.type_error(
        "moe",
        f"params.{name}",
        "an array or None" if optional else "an array",
        type(weight).__name__,
        fix,
    )


def _check_only_of_jax_ep(params: MoEParams, expert_specs: Any, activation: Any) -> None:
    """There are weights for the experts of jax_ep, and none for a function of the user's own."""
    if params.experts is not None:
        raise arguments.value_error(
            "moe",
            "params.experts",
            "None without experts=",
            f"a pytree of type {type(params.experts).__name__}",
            "pass experts=, the function that these are the weights of",
        )
    if expert_specs is not None:
        raise arguments.value_error(
            "moe",
            "expert_specs",
            "None without experts=",
            expert_specs,
            "leave it out: moe splits the experts of jax_ep over the group",
        )
    _check_gate("gate", params.gate, activation)
    for name in _OF_JAX_EP:
        _check_is_array(name, getattr(params, name), optional=name not in _REQUIRED)
    if params.gate is None and params.gate_bias is not None:
        raise arguments.value_error(
            "moe",
            "params.gate_bias",
            "None for experts without a gate",
            f"shape {params.gate_bias.shape}",
            "use up_bias, or give the experts a gate",
        )


def _check_gate(name: str, gate: Any, activation: Any) -> None:
    """There is a gate if the activation is of gate and up projection."""
    if gate is None and isinstance(activation, GatedActivation):
        raise arguments.value_error(
            "moe",
            f"params.{name}",
            "an array with a GatedActivation, which takes gate and up",
            None,
            "give the expert a gate, or pass an activation of one argument",
        )


def _check_only_own(params: MoEParams, grouped_dot: Any) -> None:
    """There are weights for a function of the user's own, and none for the experts of jax_ep."""
    for name in _OF_JAX_EP:
        if getattr(params, name) is not None:
            raise arguments.value_error(
                "moe",
                f"params.{name}",
                "None with experts=, a function of your own",
                "weights",
                "put the weights of that function into params.experts",
            )
    if grouped_dot is not None:
        raise arguments.value_error(
            "moe",
            "grouped_dot",
            "None with experts=, a function of your own",
            type(grouped_dot).__name__,
            "call your product in that function",
        )
    if params.experts is None:
        raise arguments.value_error(
            "moe",
            "params.experts",
            "the weights of experts=, a pytree of arrays",
            None,
            "pass MoEParams(router_kernel=…, experts=…), with () for a function without weights",
        )


def _check_shapes(params: MoEParams, hidden: int, num_experts: int, intermediate: int) -> None:
    expected = {
        "router_kernel": (hidden, num_experts),
        "gate": (num_experts, hidden, intermediate),
        "up": (num_experts, hidden, intermediate),
        "down": (num_experts, intermediate, hidden),
        "router_bias": (num_experts,),
        "gate_bias": (num_experts, intermediate),
        "up_bias": (num_experts, intermediate),
        "down_bias": (num_experts, hidden),
    }
    for name, shape in expected.items():
        weight = getattr(params, name)
        if weight is not None and weight.shape != shape:
            raise arguments.value_error(
                "moe",
                f"params.{name}",
                f"shape {shape} for hidden {hidden}, {num_experts} experts and intermediate "
                f"{intermediate}",
                weight.shape,
                f"{_MAKE} of the same sizes",
            )


def _check_shared(shared: Any, hidden: int, activation: Any) -> None:
    if shared is None:
        return
    if not isinstance(shared, SharedExpert):
        raise arguments.type_error(
            "moe",
            "params.shared",
            "jax_ep.SharedExpert or None",
            type(shared).__name__,
            "put the weights of the shared expert into jax_ep.SharedExpert",
        )
    _check_gate("shared.gate", shared.gate, activation)
    for name, weight in shared._asdict().items():
        _check_is_array(f"shared.{name}", weight, optional=name == "gate")
    intermediate = shared.up.shape[-1] if shared.up.ndim else 0
    up = (hidden, intermediate)
    expected = {"gate": up, "up": up, "down": (intermediate, hidden)}
    for name, shape in expected.items():
        weight = getattr(shared, name)
        if weight is not None and weight.shape != shape:
            raise arguments.value_error(
                "moe",
                f"params.shared.{name}",
                f"shape {shape} for hidden {hidden} and a shared expert of {intermediate}",
                weight.shape,
                f"{_MAKE} of the same sizes",
            )


def _check_own(
    params: MoEParams, num_experts: int, group: Group, expert_specs: Any
) -> tuple[PartitionSpec, ...]:
    """The spec of each leaf of ``params.experts``, which can be split so."""
    leaves = jax.tree_util.tree_leaves_with_path(params.experts)
    for path, leaf in leaves:
        name = "experts" + jax.tree_util.keystr(path)
        _check_is_array(name, leaf, fix="make every leaf an array")
        if leaf.size == 0:
            raise arguments.value_error(
                "moe", f"params.{name}", "an array with elements", leaf.shape, "leave it out"
            )
        if expert_specs is None and leaf.shape[:1] != (num_experts,):
            raise arguments.value_error(
                "moe",
                f"params.{name}",
                f"a first dimension of {num_experts} experts",
                f"shape {leaf.shape}",
                "pass expert_specs, which say how each leaf is split over the mesh",
            )
    specs = moe_partition_specs(params, group=group, expert_specs=expert_specs).experts
    flat = tuple(jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)))
    for (path, leaf), spec in zip(leaves, flat, strict=True):
        _check_spec(jax.tree_util.keystr(path), leaf, spec, group)
    return flat


def check_widths(op: str, params: MoEParams, tensor_axis: str | None, group: Group) -> None:
    """The inner channels of experts and shared expert can be split over the axis."""
    if tensor_axis is None:
        return
    size = group.mesh.shape[tensor_axis]
    shared = params.shared
    widths = {
        "params.up": ("F", params.up),
        "params.shared.up": ("S", None if shared is None else shared.up),
    }
    for name, (symbol, weight) in widths.items():
        if weight is not None and weight.shape[-1] % size:
            raise arguments.value_error(
                op,
                name,
                f"inner channels {symbol} that are a multiple of the {size} positions along "
                f"tensor_axis={tensor_axis!r}",
                f"{symbol} = {weight.shape[-1]}",
                "pad them with zeros, or use a mesh with a smaller axis",
            )


def _check_names_axis(specs: tuple[PartitionSpec, ...], tensor_axis: str) -> None:
    """Some spec splits over the axis, or each position would add the whole outputs to the sum."""
    if any(tensor_axis in _axes(entry) for spec in specs for entry in spec):
        return
    raise arguments.value_error(
        "moe",
        "expert_specs",
        f"a spec that names tensor_axis={tensor_axis!r}, because the outputs of experts= are added "
        "over this axis",
        specs,
        "split the weights over it, and let the function return its part of the sum",
    )


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a spec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_spec(name: str, leaf: Any, spec: Any, group: Group) -> None:
    """``leaf`` can be split as ``spec`` says."""
    if not isinstance(spec, PartitionSpec):
        raise arguments.type_error(
            "moe",
            f"expert_specs{name}",
            "a PartitionSpec",
            type(spec).__name__,
            "write jax.P('expert') or the like",
        )
    sizes = {a: n for a, n in group.mesh.shape.items() if a not in _compat.manual_axes()}
    names = [_axes(entry) for entry in spec]
    unknown = [axis for each in names for axis in each if axis not in sizes]
    if unknown:
        raise arguments.value_error(
            "moe",
            f"expert_specs{name}",
            f"axes among {tuple(sizes)}",
            spec,
            "name axes of the mesh",
        )
    parts = [math.prod(sizes[axis] for axis in each) for each in names]
    fits = len(parts) <= leaf.ndim and not any(
        n % part for n, part in zip(leaf.shape, parts, strict=False)
    )
    if not fits:
        raise arguments.value_error(
            "moe",
            f"params.experts{name}",
            f"a shape that {spec} splits evenly, into {tuple(parts)} parts",
            leaf.shape,
            "change the shape, or the spec in expert_specs",
        )
