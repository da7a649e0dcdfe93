"""Bytes and times of the ops for one number of hosts.

A token crosses the network once for each other host that has an expert of it, to the GPU with the same
place on its host. From there, and from GPUs of the same host, each rank that needs the token reads it
once over NVLink. Combine is the mirror image: partial sums cross NVLink to the GPU that is in charge of
the token on their host, and one row for each host goes home. All of this is one pipeline, so that

    time = fixed cost + max over resources of bytes / rate + what overlaps with nothing

Resources are NVLink and the NIC in one direction, the memory of the GPU, and the op's SMs. Every rank
sends and receives as much as the others, on average; a rank with more tokens than the others is slower.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax_ep.scale.machine import H200, Machine
from jax_ep.scale.workload import Workload

Bound = Literal["fixed cost", "NVLink", "network", "memory", "SMs"]


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One op on one rank. Times are in microseconds.

    Attributes:
        us: The whole op.
        fixed_us: Launch, handshakes and, across hosts, the latency of a flag.
        nvlink_us: The bytes over NVLink at its rate.
        network_us: The bytes over the NIC at its rate.
        memory_us: The bytes of memory at its rate.
        sm_us: The work of the op's SMs.
        serial_us: What overlaps with nothing: casts, and rows beyond the first of a (token, rank).
        nvlink_bytes: Received over NVLink, and sent.
        network_bytes: Received over the NIC, and sent.
        memory_bytes: Read and written in the GPU's memory, by the op, its peers and the NIC.
        bound: The longest of the parts above; what overlaps with nothing counts for the resource
            that is the slowest.
    """

    us: float
    fixed_us: float
    nvlink_us: float
    network_us: float
    memory_us: float
    sm_us: float
    serial_us: float
    nvlink_bytes: float
    network_bytes: float
    memory_bytes: float
    bound: Bound


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Communication of an MoE layer, without its experts, in microseconds.

    Attributes:
        forward_us: Plan, dispatch and combine.
        backward_us: The gradients of both, along the handle: a dispatch and a combine of rows of the
            tokens' dtype.
    """

    forward_us: float
    backward_us: float


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory of a GPU beyond the tokens and the experts, in bytes.

    Attributes:
        rows: Dispatched rows, as many as there is room for.
        lossless_rows: The same with room for any routing.
        workspace: The workspace of the group.
        scratch: Scratch of the op while it runs: the rows that a fused cast makes.
        ring: The network's staging ring, both directions; 0 on one host.
    """

    rows: int
    lossless_rows: int
    workspace: int
    scratch: int
    ring: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What to expect of a workload on a number of hosts. It is not a measurement.

    Attributes:
        hosts: Number of hosts.
        ranks_per_host: GPUs of each.
        ranks_per_token: Expected number of ranks that a token needs.
        hosts_per_token: Expected number of hosts that a token needs, its own among them.
        plan: The plan.
        dispatch: Dispatch along a handle, so without the plan.
        combine: Combine.
        layer: Communication of a whole layer.
        memory: The memory that it takes.
        workload: The workload that was asked about.
        machine: The rates and costs that were assumed.
    """

    hosts: int
    ranks_per_host: int
    ranks_per_token: float
    hosts_per_token: float
    plan: OpCost
    dispatch: OpCost
    combine: OpCost
    layer: LayerTimes
    memory: MemoryUse
    workload: Workload
    machine: Machine

    @property
    def ranks(self) -> int:
        """Number of ranks of all hosts."""
        return self.hosts * self.ranks_per_host

    @property
    def planned_dispatch_us(self) -> float:
        """Microseconds of a dispatch with a new plan."""
        return self.plan.us + self.dispatch.us - _beside_plan_us(self.machine, self.hosts)

    def host_gbs(self, op: Literal["dispatch", "combine"]) -> float:
        """GB/s in DeepEP's count: a row for each (token, host), the own host included, over the time.

        What crosses the NIC is (hosts − 1) / hosts of it.
        """
        row = self.workload.wire_row_bytes if op == "dispatch" else self.workload.dense_row_bytes
        rows = self.workload.tokens * self.hosts_per_token
        cost: OpCost = getattr(self, op)
        return rows * row / cost.us / 1e3


def predict(
    workload: Workload | None = None,
    *,
    hosts: int = 1,
    ranks_per_host: int = 8,
    machine: Machine | None = None,
) -> Prediction:
    """Predict what dispatch and combine of a layer take on ``hosts`` hosts.

    With 4096 tokens a rank, EP64 is bound by the network::

        found = jax_ep.scale.predict(jax_ep.scale.Workload(tokens=4096), hosts=8)
        found.dispatch.bound  # "network"
        found.dispatch.us     # 5805, of which 5789 are bytes over the NIC

    Args:
        workload: The layer; None for T = 4096, H = 7168, top-8 of 256 experts in bf16.
        hosts: Number of hosts.
        ranks_per_host: GPUs of each, each with a NIC of its own.
        machine: Rates and fixed costs; None for ``H200``, with a NIC of 400 Gb/s for each GPU.

    Raises:
        ValueError: if hosts or ranks_per_host are not positive, or experts cannot be divided over
            the ranks.
    """
    workload = Workload() if workload is None else workload
    machine = H200 if machine is None else machine
    for name, value in (("hosts", hosts), ("ranks_per_host", ranks_per_host)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}.")
    ranks = hosts * ranks_per_host
    if workload.experts % ranks:
        raise ValueError(
            f"experts: expected a multiple of the {ranks} ranks ({hosts} hosts of {ranks_per_host}), "
            f"got {workload.experts}."
        )
    rows = _Rows.of(workload, hosts, ranks_per_host)
    latency = machine.network_us if hosts > 1 else 0.0
    plan = _cost(
        machine,
        fixed_us=machine.plan_us + latency,
        serial_us=workload.tokens * workload.top_k * machine.plan_ns / 1e3,
    )
    dispatch = _dispatch(rows, workload, machine, latency)
    combine = _combine(rows, workload, machine, latency)
    dense = dataclasses.replace(workload, quantization="none")
    back = _dispatch(rows, dense, machine, latency)
    return Prediction(
        hosts=hosts,
        ranks_per_host=ranks_per_host,
        ranks_per_token=workload.distinct(ranks),
        hosts_per_token=workload.distinct(hosts),
        plan=plan,
        dispatch=dispatch,
        combine=combine,
        layer=LayerTimes(
            plan.us + dispatch.us - _beside_plan_us(machine, hosts) + combine.us,
            back.us + combine.us,
        ),
        memory=_memory(workload, machine, hosts, ranks),
        workload=workload,
        machine=machine,
    )


def _beside_plan_us(machine: Machine, hosts: int) -> float:
    return machine.beside_plan_us if hosts == 1 else 0.0


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Expected rows of one rank, as many in each direction.

    Attributes:
        tokens: Its own tokens.
        needed: One for each (token, rank): received, from itself too.
        linked: Those of ``needed`` that come from another GPU of the host.
        remote: One for each (token, other host): across the network.
        pairs: One for each (token, expert).
        written: Those that dispatch writes, with padding.
        unused: Room that stays unused and is cleared.
    """

    tokens: float
    needed: float
    linked: float
    remote: float
    pairs: float
    written: float
    unused: float

    @staticmethod
    def of(workload: Workload, hosts: int, ranks_per_host: int) -> _Rows:
        ranks = hosts * ranks_per_host
        needed = workload.tokens * workload.distinct(ranks)
        written = workload.written_rows(ranks)
        return _Rows(
            tokens=float(workload.tokens),
            needed=needed,
            # The GPU that has a row for the host is that of the sender's place: any with equal chance.
            linked=needed * (ranks_per_host - 1) / ranks_per_host,
            remote=workload.tokens * workload.distinct(hosts) * (hosts - 1) / hosts,
            pairs=float(workload.tokens * workload.top_k),
            written=written,
            unused=max(workload.capacity_rows(ranks) - written, 0.0),
        )


def _dispatch(rows: _Rows, workload: Workload, machine: Machine, latency: float) -> OpCost:
    row, out = workload.wire_row_bytes, workload.out_row_bytes
    stored = (rows.written + rows.unused) * out
    # Across hosts, a row is packed into the ring, sent, and put into a slot over there.
    memory = rows.needed * row + stored + 4 * rows.remote * row
    loaded = (rows.needed + rows.remote) * row
    cast = workload.quantization in ("fp8", "fp8-dense")
    cast_us = rows.tokens * workload.dense_row_bytes / machine.cast_gbs / 1e3 if cast else 0.0
    spread = rows.written + rows.unused - rows.needed
    return _cost(
        machine,
        fixed_us=machine.dispatch_us + latency,
        nvlink=rows.linked * row,
        network=rows.remote * row,
        memory=memory,
        sm_us=loaded / machine.sm_load_gbs / workload.sms / 1e3
        + (stored + rows.remote * row) / machine.sm_store_gbs / workload.sms / 1e3,
        serial_us=cast_us + max(spread, 0.0) * machine.spread_ns / 1e3,
    )


def _combine(rows: _Rows, workload: Workload, machine: Machine, latency: float) -> OpCost:
    row = workload.dense_row_bytes
    summed = rows.pairs if workload.layout == "expert" else rows.needed
    # In layout "expert" a rank first adds its rows of a token; those of other ranks go through a ring.
    partial = rows.needed if workload.layout == "expert" else 0.0
    ring = rows.linked if workload.layout == "expert" else 0.0
    memory = (summed + 2 * ring + 4 * rows.remote + rows.tokens) * row
    return _cost(
        machine,
        fixed_us=machine.combine_us + latency,
        nvlink=rows.linked * row,
        network=rows.remote * row,
        memory=memory,
        sm_us=(summed + partial + rows.remote) * row / machine.sm_add_gbs / workload.sms / 1e3
        + (partial + rows.remote) * row / machine.sm_sum_gbs / workload.sms / 1e3,
        serial_us=(summed - rows.needed) * machine.gather_ns / 1e3,
    )


def _cost(
    machine: Machine,
    *,
    fixed_us: float,
    nvlink: float = 0.0,
    network: float = 0.0,
    memory: float = 0.0,
    sm_us: float = 0.0,
    serial_us: float = 0.0,
) -> OpCost:
    nvlink_us = nvlink / machine.nvlink_gbs / 1e3
    network_us = network / machine.nic_gbs / 1e3
    memory_us = memory / machine.memory_gbs / 1e3
    resources: dict[Bound, float] = {
        "NVLink": nvlink_us,
        "network": network_us,
        "memory": memory_us,
        "SMs": sm_us,
    }
    slowest = max(resources, key=lambda name: resources[name])
    return OpCost(
        us=fixed_us + resources[slowest] + serial_us,
        fixed_us=fixed_us,
        nvlink_us=nvlink_us,
        network_us=network_us,
        memory_us=memory_us,
        sm_us=sm_us,
        serial_us=serial_us,
        nvlink_bytes=nvlink,
        network_bytes=network,
        memory_bytes=memory,
        bound=slowest if resources[slowest] + serial_us > fixed_us else "fixed cost",
    )


def _memory(workload: Workload, machine: Machine, hosts: int, ranks: int) -> MemoryUse:
    lossless = dataclasses.replace(workload, capacity=None).capacity_rows(ranks)
    cast = workload.quantization in ("fp8", "fp8-dense")
    return MemoryUse(
        rows=workload.capacity_rows(ranks) * workload.out_row_bytes,
        lossless_rows=lossless * workload.out_row_bytes,
        workspace=machine.workspace_bytes,
        scratch=workload.tokens * workload.wire_row_bytes if cast else 0,
        ring=2 * (hosts - 1) * machine.ring_rows * workload.dense_row_bytes,
    )
