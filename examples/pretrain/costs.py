"""A model of a training step's time on H200s: matmuls, attention, rows and weights that travel.

Each part is work over a rate. Rates of matmuls are those of the records in ``benchmarks/results/``,
those of dispatch and combine come from ``jax_ep.scale``, and what nobody measured is counted in bytes
at the rate of the memory or the link. Work between matmuls (norms, activations, residuals) is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from examples.pretrain import flops
from examples.pretrain.blockwise import block_size
from examples.pretrain.config import Config
from jax_ep import scale

# Of grouped_dot_h200.json: 32768 rows, 7168 x 2048, 32 groups in bfloat16; the mean of three passes,
# and a dense product of the same size.
GROUPED_TFLOPS = 640.0
DENSE_TFLOPS = 725.0
PEAK_TFLOPS = 989.0  # of the data sheet, without sparsity; MFU is a share of it
# Bytes of memory for each score of the blockwise attention, counted in the program that XLA compiles
# for H200s, with blocks of 1024 positions and heads of 192 and 128 channels. Forward, float32 scores
# are written, read for their maximum and for their exponents, which are written in bfloat16 and read:
# 16, and 3 for the sums of a row. Backward, two arrays of float32 are written and read, and two of
# bfloat16: 26, and 12 for the sums of gradients.
SCORE_BYTES = {"forward": 19, "backward": 38}
# Of the optimizer for each weight: four float32 arrays are read, three are written.
OPTIMIZER_BYTES = 28

Kind = Literal["compute", "rows", "weights"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        name: What it is, with the resource that bounds it.
        kind: "compute", "rows" (dispatch and combine) or "weights" (gathers and scatters).
        seconds: Of one GPU in a step.
    """

    name: str
    kind: Kind
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time of a step. It is not a measurement.

    Attributes:
        parts: What it is made of.
        step_s: Weights travel beside the computation, as XLA schedules them, and rows do not.
        best_s: Rows travel beside it too, as overlap="chunks" aims at.
        tokens_per_s: Of all GPUs, from ``step_s``.
        mfu: Operations of the model (``flops.py``) over the peak, from ``step_s``.
        bound: The name of the longest part.
    """

    parts: tuple[Part, ...]
    step_s: float
    best_s: float
    tokens_per_s: float
    mfu: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Place:
    """How ranks that exchange something lie on hosts.

    Attributes:
        hosts: Hosts that they are on.
        on_host: Ranks of one host.
    """

    hosts: int
    on_host: int

    @classmethod
    def of(cls, ranks: int, stride: int, per_host: int) -> Place:
        """Those of ``ranks`` ranks, each ``stride`` devices after the last one."""
        on_host = max(1, min(ranks, per_host // stride))
        return cls(-(-ranks // on_host), on_host)

    def gather(self, total_bytes: float, machine: scale.Machine = scale.H200) -> tuple[float, str]:
        """Seconds until every rank has ``total_bytes``, of which each had an equal part, and the bound.

        They come to each host once, over the NICs of its ranks, and to each rank over NVLink.
        """
        nic = total_bytes * (self.hosts - 1) / self.hosts / self.on_host / machine.nic_gbs
        nvlink = total_bytes * (self.on_host - 1) / self.on_host / machine.nvlink_gbs
        return max((nic / 1e9, "network"), (nvlink / 1e9, "NVLink"))


def estimate(
    config: Config, mesh: Mapping[str, int], num_weights: Mapping[str, int], *, per_host: int
) -> Estimate:
    """The time of a step.

    Args:
        config: The configuration.
        mesh: Sizes of the mesh's axes.
        num_weights: Of the experts ("experts") and of all other matrices ("others").
        per_host: GPUs of a host.
    """
    data, parts = config.data, []
    gpus = math.prod(mesh.values())
    tokens = data.batch_size * data.seq_len
    of_gpu = tokens / gpus  # tensor ranks share the work of their tokens
    parts += _compute(config, of_gpu)
    part_bytes = sum(num_weights.values()) / (gpus // mesh["data"]) * OPTIMIZER_BYTES
    memory = scale.H200.memory_gbs * 1e9
    parts.append(Part("optimizer (memory)", "compute", part_bytes / memory))
    parts.append(_rows(config, mesh, per_host))
    parts += _weights(config, mesh, num_weights, per_host)
    seconds: dict[str, float] = {"compute": 0.0, "rows": 0.0, "weights": 0.0}
    for part in parts:
        seconds[part.kind] += part.seconds
    step_s = max(seconds["compute"], seconds["weights"]) + seconds["rows"]
    model_flops = tokens * flops.flops_per_token(config.model, seq_len=data.seq_len)
    return Estimate(
        parts=tuple(parts),
        step_s=step_s,
        best_s=max(seconds["compute"], seconds["weights"] + seconds["rows"]),
        tokens_per_s=tokens / step_s,
        mfu=model_flops / gpus / step_s / (PEAK_TFLOPS * 1e12),
        bound=max(parts, key=lambda part: part.seconds).name,
    )


def _compute(config: Config, tokens: float) -> list[Part]:
    """Matmuls and attention of ``tokens`` tokens."""
    model, seq_len = config.model, config.data.seq_len
    again = 0 if model.remat == "none" else 1  # forward passes that the backward pass repeats
    layers = model.num_moe_layers + model.mtp
    routed = 3 * model.hidden * model.moe_intermediate * model.top_k * layers
    head = model.hidden * model.vocab_size * (2 if model.mtp else 1)
    others = flops.active_weights(model) - routed - head
    grouped_s = 2 * routed * tokens * (3 + again) / (GROUPED_TFLOPS * 1e12)
    others_s = 2 * others * tokens * (3 + again) / (DENSE_TFLOPS * 1e12)
    head_s = 2 * head * tokens * 4 / (DENSE_TFLOPS * 1e12)  # its logits are always made twice
    block = block_size(seq_len)
    keys, values = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    scores = tokens * (seq_len + block) / 2 * model.num_heads * (model.num_layers + model.mtp)
    forward = 2 if model.remat in ("handle", "full") else 1
    products = (keys + values) * forward + 3 * keys + 2 * values
    moved = SCORE_BYTES["forward"] * forward + SCORE_BYTES["backward"]
    attention_s = 2 * scores * products / (DENSE_TFLOPS * 1e12)
    attention_s += scores * moved / (scale.H200.memory_gbs * 1e9)
    return [
        Part("experts (matmul)", "compute", grouped_s),
        Part("other matmuls", "compute", others_s),
        Part("head (matmul)", "compute", head_s),
        Part("attention (memory)", "compute", attention_s),
    ]


def _rows(config: Config, mesh: Mapping[str, int], per_host: int) -> Part:
    """Plans, dispatches and combines of all layers."""
    model, data = config.model, config.data
    place = Place.of(mesh["expert"], mesh["tensor"], per_host)
    ranks = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    workload = scale.Workload(
        tokens=data.batch_size // data.accumulate * data.seq_len // ranks,
        hidden=model.hidden,
        top_k=model.top_k,
        experts=model.num_experts,
        num_groups=model.num_expert_groups,
        top_groups=model.top_k_groups,
        layout="expert",
        dtype=model.dtype,
        quantization="fp8-dense" if model.fp8_dispatch else "none",
        alignment=1,
    )
    found = scale.predict(workload, hosts=place.hosts, ranks_per_host=place.on_host)
    us = found.layer.forward_us + found.layer.backward_us
    if model.remat != "none":
        us += found.layer.forward_us - (0 if model.remat == "full" else found.plan.us)
    layers = model.num_moe_layers + model.mtp
    return Part(f"rows ({found.combine.bound})", "rows", us * layers * data.accumulate / 1e6)


def _weights(
    config: Config, mesh: Mapping[str, int], num_weights: Mapping[str, int], per_host: int
) -> list[Part]:
    """Gathers of both passes and the scatter of gradients, for each micro-batch."""
    wire = 4 if config.model.dtype == "float32" else 2
    times = 3 * config.data.accumulate
    tensor, expert = mesh["tensor"], mesh["expert"]
    parts = []
    for name, ranks, stride, share in (
        ("experts", mesh["fsdp"], tensor * expert, tensor * expert),
        ("others", mesh["fsdp"] * expert, tensor, tensor),
    ):
        place = Place.of(ranks, stride, per_host)
        seconds, link = place.gather(wire * num_weights[name] / share)
        if seconds:
            parts.append(Part(f"weights of {name} ({link})", "weights", seconds * times))
    return parts
