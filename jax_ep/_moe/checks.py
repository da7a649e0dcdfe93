"""Errors of ``moe`` about its arguments, while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _compat
from jax_ep._core import arguments, balancing
from jax_ep._core.quantize import check_scale_format
from jax_ep._groups.group import Group
from jax_ep._moe.params import SharedExpert
from jax_ep._moe.placement import why_not_usable
from jax_ep._ops import checks as op_checks


def check_group(group: Any) -> None:
    """``group`` is a Group, and its axes and mesh fit those of the context of the call."""
    op_checks.check_is_group("moe", group)
    manual = [name for name in _compat.manual_axes() if name in group.axis_names]
    if manual:
        raise arguments.value_error(
            "moe",
            "group",
            f"a call outside shard_map over the axes of the group, {group.axis_names}",
            f"{tuple(manual)} as manual axes",
            "call it outside, or use jax_ep.dispatch and jax_ep.combine inside",
        )
    sizes, own = _compat.context_axis_sizes(), dict(group.mesh.shape)
    if sizes and list(sizes.items()) != list(own.items()):
        raise arguments.value_error(
            "moe",
            "group",
            f"a group of the mesh in use, {sizes}",
            f"one made on a mesh {own}",
            "make the group on the mesh that jax.set_mesh was given",
        )


def check_layer(
    op: str, *, group: Any, num_experts: Any, num_used_experts: Any, top_k: Any
) -> None:
    """The settings of a Flax layer fit each other, so that its weights can be made."""
    op_checks.check_is_group(op, group)
    op_checks.check_num_experts(op, num_experts, group)
    check_num_used(op, num_used_experts, num_experts)
    check_top_k(top_k, num_used_experts or num_experts, op=op)


def check_num_used(op: str, num_used_experts: Any, num_experts: int) -> None:
    """``num_used_experts`` is None or an int from 1 to ``num_experts``."""
    if num_used_experts is not None:
        balancing.check_num_used(op, num_used_experts, num_experts)


def check_top_k(top_k: Any, num_experts: int, *, op: str = "moe") -> None:
    """``top_k`` is an int from 1 to the number of experts, and not above what ops take."""
    if not arguments.is_int(top_k):
        raise arguments.type_error(
            op, "top_k", "a Python int", type(top_k).__name__, "pass the experts of a token"
        )
    most = min(num_experts, op_checks.MAX_TOP_K)
    if not 1 <= top_k <= most:
        raise arguments.value_error(
            op, "top_k", f"1 to {most} experts a token", top_k, "choose a number in that range"
        )


def check_x(x: Any) -> None:
    """``x`` is an array of tokens."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise arguments.type_error("moe", "x", "an array", type(x).__name__, "convert it first")
    if x.ndim == 0:
        raise arguments.value_error(
            "moe",
            "x",
            "at least one dimension, [..., hidden]",
            "a scalar",
            "give each token its channels in the last dimension",
        )


def check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    """``mask`` is None or says of each token whether it takes part."""
    if mask is None:
        return
    if not isinstance(mask, jax.Array | np.ndarray) or mask.dtype != jnp.bool_:
        raise arguments.type_error(
            "moe",
            "mask",
            "a boolean array or None",
            getattr(mask, "dtype", type(mask).__name__),
            "cast it with astype(bool)",
        )
    if mask.shape != shape:
        raise arguments.value_error(
            "moe", "mask", f"shape {shape}, one entry for each token", mask.shape, "reshape it"
        )


def check_placement(group: Group, **named: Any) -> None:
    """Arrays that were put on devices lie on those of the group, in the same order."""
    for path, array in jax.tree_util.tree_leaves_with_path(named):
        reason = why_not_usable(array, group.mesh)
        if reason is not None:
            argument = ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            raise arguments.value_error(
                "moe",
                argument,
                f"an array on the mesh of the group, {dict(group.mesh.shape)}",
                reason,
                "put it there with jax.device_put(…, NamedSharding(group.mesh, spec)), or make mesh "
                "and group alike",
            )


def check_dispatch_options(
    *,
    alignment: Any,
    capacity: Any,
    capacity_factor: Any,
    rank_capacity_factor: Any,
    drop_policy: Any,
    quantization: Any,
    scale_format: Any,
    config: Any,
) -> None:
    """The options for ``dispatch`` are static values, so that ``jax.jit`` can hash them."""
    op_checks.check_layout("moe", "expert", alignment)
    op_checks.check_bounds(
        "moe", capacity, capacity_factor, rank_capacity_factor, "expert", alignment
    )
    op_checks.check_drop_policy("moe", drop_policy, capacity_factor)
    arguments.check_one_of("moe", "quantization", quantization, (None, "fp8"))
    check_scale_format("moe", scale_format)
    arguments.check_config("moe", config)


def check_overlap(overlap: Any, num_chunks: Any, shared: SharedExpert | None) -> None:
    """``overlap`` names something that the layer has to compute, in chunks that can be made."""
    arguments.check_one_of("moe", "overlap", overlap, (None, "shared_expert", "chunks"))
    if overlap == "shared_expert" and shared is None:
        raise arguments.value_error(
            "moe",
            "overlap",
            "None or 'chunks' without a shared expert",
            repr(overlap),
            "leave it out",
        )
    if not arguments.is_int(num_chunks):
        raise arguments.type_error(
            "moe",
            "num_chunks",
            "a Python int",
            type(num_chunks).__name__,
            "pass the number of chunks",
        )
    if num_chunks < 2:
        raise arguments.value_error(
            "moe", "num_chunks", "2 or more", num_chunks, "leave out overlap='chunks' for one chunk"
        )


def check_function(argument: str, function: Any) -> None:
    """``function`` can be called, and ``jax.jit`` can tell it from others by its hash."""
    if not callable(function):
        raise arguments.type_error(
            "moe", argument, "a function", type(function).__name__, "leave it out for the default"
        )
    try:
        hash(function)
    except TypeError:
        raise arguments.type_error(
            "moe",
            argument,
            "a function that can be hashed",
            f"one of type {type(function).__name__} that cannot",
            "give its class a __hash__ beside __eq__, or pass a plain function",
        ) from None
