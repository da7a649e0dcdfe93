"""What calls of native targets have in common: attributes, operands that stand for a rank, the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jax_ep import _compat
from jax_ep._backends import shapes_of
from jax_ep._backends.primitive import native_call
from jax_ep._core import arguments
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import DispatchConfig, Handle, Layout, is_latency
from jax_ep._groups import tuning
from jax_ep._groups.group import Group, sms_of

LAYOUTS = {"expert": 0, "token": 1}
QUANTIZATIONS = {None: 0, "f32": 1, "ue8m0": 2}


def coords(group: Group) -> Int32[Array, "2"]:
    """This rank within its group, and which of the groups side by side it is."""
    rank = lax.axis_index(group.axis_names)
    others = group.other_axes
    instance = lax.axis_index(others) if others else jnp.int32(0)
    axes = frozenset(_compat.varying_axes(rank) | _compat.varying_axes(instance))
    return jnp.stack([_compat.cast_varying(rank, axes), _compat.cast_varying(instance, axes)])


def attributes(
    group: Group,
    num_experts: int,
    layout: Layout,
    config: DispatchConfig | None,
    *,
    op: tuning.TunedOp,
    num_tokens: int,
    hidden: int = 0,
    rows: str = "",
    flight: Flight = IN_LINE,
) -> dict[str, Any]:
    """The attributes that every op of a group has. The number of SMs is that found for such rows."""
    requested = None if config is None else config.num_sms
    if is_latency(config):  # 0: as many as the kernels have use for
        num_sms = 0 if group.backend != "cuda" else requested or flight.most_sms or 0
    else:
        num_sms = sms_of(
            group,
            op=op,
            layout=layout,
            rows=rows,
            hidden=hidden,
            num_tokens=num_tokens,
            requested=requested,
        )
    return {
        "num_ranks": np.int32(group.size),
        "num_experts": np.int32(num_experts),
        "layout": np.int32(LAYOUTS[layout]),
        "group_id": np.int64(group.id),
        "timeout_ms": np.int64(min(group.timeout * 1000, 2**62)),
        "num_sms": np.int32(num_sms if flight.most_sms is None else min(num_sms, flight.most_sms)),
        "channel": np.int32(flight.channel),
    }


def spans_hosts(group: Group) -> bool:
    """Whether the group's calls are those over a network."""
    return group.transport == "nvshmem"


def call(
    group: Group,
    op: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    **attributes: Any,
) -> list[Array]:
    """The call of an op; scratch memory is what the target takes on GPUs."""
    on_gpus = group.backend == "cuda"
    if not op.startswith("latency_"):
        check_no_absent(group, op)
    target = f"jax_ep_network_{op}" if spans_hosts(group) else f"jax_ep_{op}"
    if on_gpus and attributes["channel"] > 0:
        target += "_async"  # not for command buffers
    return native_call(
        target,
        results,
        *operands,
        scratch=scratch if on_gpus else (),
        ordered=on_gpus,
        **attributes,
    )


def check_no_absent(group: Group, op: str) -> None:
    """On GPUs, only latency mode has ops of groups with absent ranks."""
    if group.backend == "cuda" and group.absent_ranks:
        raise arguments.value_error(
            {"plan": "dispatch", "combine_vjp": "combine"}.get(op, op),
            "group",
            "one without absent ranks on GPUs, except in mode 'latency' with a new plan",
            f"absent_ranks={group.absent_ranks}",
            "make it with latency_tokens= and latency_hidden= that suffice, and leave out handle= of "
            "dispatch; gradients need all ranks",
        )


def routes(handle: Handle, group: Group) -> tuple[Any, ...]:
    """The operands that are a handle."""
    no_expert_idx = jax.ShapeDtypeStruct((0, handle.topk_idx.shape[1]), jnp.int32)
    names = shapes_of.ENTRIES if spans_hosts(group) else shapes_of.ROUTES
    return (
        handle.topk_idx,
        *(getattr(handle, name) for name in names),
        handle.recv_src,
        no_expert_idx if handle.expert_idx is None else handle.expert_idx,
    )


def optional(x: Array | None) -> Any:
    """``x``, or what stands for an absent operand."""
    return jax.ShapeDtypeStruct((0,), jnp.float32) if x is None else x
