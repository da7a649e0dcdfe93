"""Rates and fixed costs that predictions are made from, each with its source.

The rates of links and memory are ceilings that were measured in the same runs as the ops. Fixed costs,
and what does not overlap, are fitted on one shape: 2 × H200 in one process, T = 4096, H = 7168, top-8
of 256 experts. ``fit`` of ``docs/scale_data.py`` repeats this from the records in
``benchmarks/results/``, and a test holds the constants below to it. The network's two constants are not
from our own measurements, for there are none yet.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU with its links, as the model sees it. Rates are in GB/s, times in microseconds.

    Attributes:
        name: What the table calls it.
        nvlink_gbs: Rate at which a GPU reads from its peers on the host, in one direction.
        nic_gbs: Rate at which a GPU's NIC sends, and receives at the same time.
        memory_gbs: Rate of a GPU's memory, with reads and writes added.
        network_us: Time until a flag has reached another host and the first rows have come from
            there.
        dispatch_us: Time of a dispatch along a handle without bytes: launch, handshakes, barrier.
        combine_us: The same of combine.
        plan_us: The same of the plan.
        plan_ns: Time of the plan for each (token, expert) pair of a rank.
        beside_plan_us: What a dispatch with a new plan saves on one host, because its launch and its
            handshakes run beside the plan.
        spread_ns: Time of dispatch for each row that it writes beyond the first of a (token, rank),
            padding included. It overlaps with nothing.
        gather_ns: Time of combine for each row that it adds beyond the first of a (token, rank). It
            overlaps with nothing.
        cast_gbs: How fast rows are cast to float8 before they travel, in bytes read. It overlaps with
            nothing.
        sm_load_gbs: Rate at which one SM reads in dispatch.
        sm_store_gbs: Rate at which one SM writes in dispatch.
        sm_add_gbs: Rate at which one SM reads and adds in combine.
        sm_sum_gbs: Rate at which one SM writes partial sums in combine.
        workspace_bytes: Memory that a group holds on each GPU.
        ring_rows: Rows of the network's staging ring, for each other host and each direction.

    Raises:
        ValueError: for a rate that is not above 0 or a cost below 0, by name.
    """

    name: str = "GPU"
    nvlink_gbs: float
    nic_gbs: float
    memory_gbs: float
    network_us: float = 0.0
    dispatch_us: float = 0.0
    combine_us: float = 0.0
    plan_us: float = 0.0
    plan_ns: float = 0.0
    beside_plan_us: float = 0.0
    spread_ns: float = 0.0
    gather_ns: float = 0.0
    cast_gbs: float = math.inf
    sm_load_gbs: float = math.inf
    sm_store_gbs: float = math.inf
    sm_add_gbs: float = math.inf
    sm_sum_gbs: float = math.inf
    workspace_bytes: int = 0
    ring_rows: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_gbs") and not value > 0:
                raise ValueError(f"{field.name}: expected a rate above 0, got {value}.")
            if field.name.endswith(("_us", "_ns", "_bytes", "_rows")) and not value >= 0:
                raise ValueError(f"{field.name}: expected 0 or more, got {value}.")


H200 = Machine(
    name="H200, NVLink 4, 400 Gb/s NICs",
    # Op "ceiling", "bulk copies", in 2xH200-2026-11-30-window-1-process.json: 335.9.
    nvlink_gbs=335.9,
    # Not ours: NVSHMEM's shmem_put_bw between hosts with CX7 of 400 Gb/s, in DeepEP's issue 155.
    nic_gbs=47.0,
    # Op "ceiling", "bulk copies", in h200-shared-2026-11-29-baselines.json: 3977.
    memory_gbs=3977.0,
    # Assumed. With 4096 tokens it is below one percent of what an op across hosts takes.
    network_us=5.0,
    # T = 4096, token: dispatch_cached bf16 less its bytes over the link.
    dispatch_us=11.82,
    # T = 4096, token: combine bf16 less its bytes over the link.
    combine_us=15.32,
    # The plan, token: a line through T = 128 and T = 4096, since one shape cannot tell its two parts.
    plan_us=9.254,
    plan_ns=0.09599,
    # T = 4096, token: plan and dispatch_cached bf16 less dispatch.
    beside_plan_us=2.664,
    # T = 4096, expert: dispatch_cached less dispatch_us and the busiest resource; mean of bf16 and fp8.
    spread_ns=0.4529,
    # T = 4096, expert: combine less combine_us and the busiest resource.
    gather_ns=1.327,
    # T = 4096, token: dispatch_cached with a fused cast less that of fp8 rows.
    cast_gbs=2693.0,
    # kernels_h200.json, where no link is in the way, with 16 SMs (token) and 24 SMs (expert).
    sm_load_gbs=99.88,
    sm_store_gbs=70.23,
    sm_add_gbs=71.31,
    sm_sum_gbs=109.8,
    # Field workspace_bytes of the same records.
    workspace_bytes=47_228_928,
    # Assumed: at EP64 1792 rows each way, 26 MB of bf16, of which a flight of 20 us takes 1 MB.
    ring_rows=256,
)
