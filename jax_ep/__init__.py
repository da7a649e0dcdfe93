"""Expert-parallel dispatch and combine for JAX.

``jax_ep.dispatch`` sends the tokens of a mixture-of-experts layer to the ranks of their experts,
``jax_ep.combine`` brings the outputs home; both work inside jitted, sharded and differentiated
functions. Begin with ``jax_ep.create_group``. This file is the index of the public names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jax_ep import _compat, _environment, reference, routing
from jax_ep._core.quantize import dequantize, pack_scales, quantize
from jax_ep._core.types import DispatchConfig, Dispatched, Handle, Quantized
from jax_ep._errors import CommunicationError, errors
from jax_ep._grouped_dot.api import grouped_dot
from jax_ep._groups.create import create_group
from jax_ep._groups.group import Group
from jax_ep._moe.activations import GatedActivation, clamped_swiglu
from jax_ep._moe.grouped_mlp import grouped_mlp
from jax_ep._moe.layer import moe
from jax_ep._moe.own_experts import ExpertFunction
from jax_ep._moe.params import (
    MoEParams,
    PartitionNames,
    SharedExpert,
    init_moe_params,
    moe_partition_specs,
)
from jax_ep._moe.report import MoEAux
from jax_ep._ops.combine import combine
from jax_ep._ops.dispatch import dispatch
from jax_ep._ops.overlap import Ticket, combine_done, combine_start, dispatch_done, dispatch_start
from jax_ep._version import __version__

_environment.raise_cpu_thread_count(_compat.num_started_cpu_devices())

if TYPE_CHECKING:
    import jax_ep.linen as linen
    import jax_ep.nnx as nnx

__all__ = [
    "CommunicationError",
    "DispatchConfig",
    "Dispatched",
    "ExpertFunction",
    "GatedActivation",
    "Group",
    "Handle",
    "MoEAux",
    "MoEParams",
    "PartitionNames",
    "Quantized",
    "SharedExpert",
    "Ticket",
    "__version__",
    "clamped_swiglu",
    "combine",
    "combine_done",
    "combine_start",
    "create_group",
    "dequantize",
    "dispatch",
    "dispatch_done",
    "dispatch_start",
    "errors",
    "grouped_dot",
    "grouped_mlp",
    "init_moe_params",
    "linen",
    "moe",
    "moe_partition_specs",
    "nnx",
    "pack_scales",
    "quantize",
    "reference",
    "routing",
]

_LAZY = ("linen", "nnx")  # they import flax, which jax_ep itself does not need


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jax_ep.{name}")
    raise AttributeError(f"module 'jax_ep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
