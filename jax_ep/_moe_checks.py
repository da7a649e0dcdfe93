"""Errors of ``moe`` about its arguments, while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _checks, _compat
from jax_ep._group import Group
from jax_ep._moe_params import MoEParams


def check_group(group: Any) -> None:
    """``group`` is a Group, and the call is on global arrays."""
    _check_is_group("moe", group)
    manual = [name for name in _compat.manual_axes() if name in group.mesh.axis_names]
    if manual:
        raise _checks.value_error(
            "moe",
            "group",
            "a call outside shard_map, on global arrays",
            f"{tuple(manual)} as manual axes",
            "call it outside, or use jax_ep.dispatch and jax_ep.combine inside",
        )


def check_layer(op: str, *, group: Any, num_experts: Any, top_k: Any) -> None:
    """The settings of a Flax layer fit each other, so that its weights can be made."""
    _check_is_group(op, group)
    _checks.check_num_experts(op, num_experts, group)
    check_top_k(top_k, num_experts, op=op)


def _check_is_group(op: str, group: Any) -> None:
    if not isinstance(group, Group):
        raise _checks.type_error(
            op,
            "group",
            "a Group",
            type(group).__name__,
            "make one with jax_ep.create_group(mesh, axis_name) outside jit",
        )


def check_top_k(top_k: Any, num_experts: int, *, op: str = "moe") -> None:
    """A token can have so many experts."""
    if not _checks.is_int(top_k):
        raise _checks.type_error(
            op, "top_k", "a Python int", type(top_k).__name__, "pass the experts of a token"
        )
    most = min(num_experts, _checks.MAX_TOP_K)
    if not 1 <= top_k <= most:
        raise _checks.value_error(
            op, "top_k", f"1 to {most} experts a token", top_k, "choose a number in that range"
        )


def check_x(x: Any) -> None:
    """``x`` is an array of tokens."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise _checks.type_error("moe", "x", "an array", type(x).__name__, "convert it first")
    if x.ndim == 0:
        raise _checks.value_error(
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
        raise _checks.type_error(
            "moe",
            "mask",
            "a boolean array or None",
            getattr(mask, "dtype", type(mask).__name__),
            "cast it with astype(bool)",
        )
    if mask.shape != shape:
        raise _checks.value_error(
            "moe", "mask", f"shape {shape}, one entry for each token", mask.shape, "reshape it"
        )


def check_params(params: Any, hidden: int, num_experts: int) -> None:
    """``params`` are weights of these sizes."""
    if not isinstance(params, MoEParams):
        raise _checks.type_error(
            "moe",
            "params",
            "jax_ep.MoEParams",
            type(params).__name__,
            "make the weights with jax_ep.init_moe_params, or put yours into jax_ep.MoEParams",
        )
    for name in ("router_kernel", "gate", "up", "down", "router_bias"):
        weight = getattr(params, name)
        optional = name == "router_bias"
        if not isinstance(weight, jax.Array | np.ndarray) and not (optional and weight is None):
            raise _checks.type_error(
                "moe",
                f"params.{name}",
                "an array or None" if optional else "an array",
                type(weight).__name__,
                "make the weights with jax_ep.init_moe_params",
            )
    intermediate = params.gate.shape[-1] if params.gate.ndim else 0
    expected = {
        "router_kernel": (hidden, num_experts),
        "gate": (num_experts, hidden, intermediate),
        "up": (num_experts, hidden, intermediate),
        "down": (num_experts, intermediate, hidden),
        "router_bias": (num_experts,),
    }
    for name, shape in expected.items():
        weight = getattr(params, name)
        if weight is not None and weight.shape != shape:
            raise _checks.value_error(
                "moe",
                f"params.{name}",
                f"shape {shape} for hidden {hidden}, {num_experts} experts and intermediate "
                f"{intermediate}",
                weight.shape,
                "make the weights with jax_ep.init_moe_params of the same sizes",
            )
