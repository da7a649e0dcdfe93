"""A group: the ranks that exchange rows, the backend that moves them, and how many SMs that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jax.sharding import AbstractMesh, Mesh

from jax_ep import _compat
from jax_ep._core.types import Layout
from jax_ep._errors import from_text
from jax_ep._groups.failures import failure
from jax_ep._groups.imagined import devices_of
from jax_ep._groups.topology import Topology
from jax_ep._groups.tuning import (
    DEFAULT_CROSSOVERS,
    CrossoverKey,
    Key,
    Table,
    TunedOp,
    clamp_num_sms,
    default_num_sms,
    tokens_bucket,
)

Transport = Literal["peer", "nvshmem"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Group:
    """The ranks along one mesh axis (or several), and the backend that moves their rows.

    Made by ``create_group``; hashable and static, so jitted functions may close over it. Where the
    mesh has other axes too, there are several groups side by side, one per position on those
    axes, and each rank exchanges rows within its own.

    Attributes:
        mesh: The mesh that the group was made on, possibly an abstract one.
        axis_names: The axes that form the group, row-major.
        backend: "cpu" or "cuda" (native, XLA FFI) or "reference" (pure JAX).
        timeout: Seconds that an op waits for a peer to arrive.
        id: The same in every process and every run with the same devices and axes.
        topology: Which ranks share a host, which a process and, on GPUs, which a GPU.
        latency_tokens: The most tokens of a rank that latency mode has room for; 0: there is none.
        latency_hidden: The most channels likewise, of 16 bits.
        tuning: The numbers of SMs and of tokens that ``python -m jax_ep.tune`` found for these GPUs.
        channels: Ops that may be in flight at once (``dispatch_start``).
    """

    mesh: Mesh | AbstractMesh
    axis_names: tuple[str, ...]
    backend: str
    timeout: float
    id: int
    topology: Topology
    tuning: Table
    channels: int = 1
    latency_tokens: int = 0
    latency_hidden: int = 0

    @property
    def size(self) -> int:
        """Number of ranks R in the group."""
        return math.prod(self.mesh.shape[name] for name in self.axis_names)

    @property
    def absent_ranks(self) -> tuple[int, ...]:
        """The ranks that take no part, ascending (``create_group(absent_ranks=)``)."""
        return self.topology.absent

    @property
    def device(self) -> Any:
        """The first device of the mesh; an imagined one if the mesh is abstract."""
        return devices_of(self.mesh, self.backend).flat[0]

    @property
    def transport(self) -> Transport | None:
        """How GPUs of the group exchange rows: "peer" (memory of one host) or "nvshmem"; else None."""
        if self.backend != "cuda":
            return None
        return "nvshmem" if len(self.topology.hosts) > 1 else "peer"

    @property
    def other_axes(self) -> tuple[str, ...]:
        """The other axes of the mesh, along which groups lie side by side."""
        return tuple(name for name in self.mesh.axis_names if name not in self.axis_names)

    def check(self) -> None:
        """Raise an error if an op of this group has failed on a GPU of this process.

        A replayed CUDA graph runs no host code that could report a failure, so call this where results
        are at hand, for example before a loss is logged. It does not wait for the GPU. The CPU and the
        reference backends report a failure through the computation that it happened in, so for them
        this always returns.

        Raises:
            CommunicationError: if an op has failed; the text names rank, op and phase.
        """
        if self.backend == "cuda":
            text = failure(self.id)
            if text is not None:
                raise from_text(text)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={self.mesh.shape[name]}" for name in self.axis_names)
        if len(self.topology.hosts) > 1:
            axes += f", ranks_per_host={self.topology.ranks_per_host}"
        if self.absent_ranks:
            axes += f", absent_ranks={self.absent_ranks}"
        transport = "" if self.transport is None else f", transport={self.transport!r}"
        return f"Group({axes}, backend={self.backend!r}{transport})"

    def __copy__(self) -> Group:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "jax_ep.Group: cannot be pickled, as its devices belong to this process; call "
            "jax_ep.create_group in each process, and pickle weights (pytrees of arrays, nnx.state) "
            "without the layers or functions that hold the group."
        )


def sms_of(
    group: Group,
    *,
    op: TunedOp,
    layout: Layout,
    rows: str,
    hidden: int,
    num_tokens: int,
    requested: int | None = None,
) -> int:
    """The SMs that an op may occupy on the GPUs of ``group``; 0 elsewhere, where it means nothing.

    Args:
        group: The group.
        op: The op.
        layout: Its layout.
        rows: What it moves, by ``rows_name``; "" for a plan.
        hidden: H; 0 for a plan.
        num_tokens: T.
        requested: What ``DispatchConfig.num_sms`` says; taken as it is.

    Returns:
        ``requested``, else the tuned number, else ``default_num_sms``.
    """
    if group.backend != "cuda":
        return 0
    if requested is not None:
        return requested
    device = group.device
    sm_count = _compat.multiprocessor_count(device)
    key = Key(device.device_kind, group.size, op, layout, rows, hidden, tokens_bucket(num_tokens))
    # What was found for one host says nothing of several.
    tuned = group.tuning.get(key) if group.transport == "peer" else None
    if tuned is None:
        return default_num_sms(layout, sm_count)
    return clamp_num_sms(tuned, sm_count)


def sms_of_passes(
    group: Group, moves: Mapping[TunedOp, str], *, requested: int | None, **what: Any
) -> int:
    """The SMs that an op occupies at most, itself or as the op that its gradient is.

    Args:
        group: The group.
        moves: Both ops, and what each moves (``rows`` of ``sms_of``).
        requested: As in ``sms_of``.
        **what: The other arguments of ``sms_of``.
    """
    return max(
        sms_of(group, op=op, rows=rows, requested=requested, **what) for op, rows in moves.items()
    )


def link_sms_of(group: Group) -> int:
    """The SMs of an op whose time is hidden: as many as keep a link busy, and no more.

    More of them, as ops in layout "expert" take by default, write rows to memory sooner. But compute
    beside the op would lose these SMs for longer than that saves.
    """
    return default_num_sms("token", _compat.multiprocessor_count(group.device))


def free_sms_of(group: Group, taken: int) -> int:
    """The SMs that ops which take that many leave to compute of the same rank; 1 or more.

    A rank may count on all SMs of its GPU, divided by the ranks that share it.
    """
    sharing = group.topology.ranks_per_gpu or 1
    return max(_compat.num_multiprocessors() // sharing - taken, 1)


def crossover_of(
    group: Group, *, op: Literal["dispatch", "combine"], layout: Layout, rows: str, hidden: int
) -> int:
    """The most tokens of a rank that an op takes latency mode for where that fits.

    Args:
        group: The group.
        op: The op.
        layout: Its layout.
        rows: What it moves, by ``rows_name``.
        hidden: H.

    Returns:
        The tuned number, else that of ``DEFAULT_CROSSOVERS``.
    """
    kind = group.device.device_kind
    found = group.tuning.get(CrossoverKey(kind, group.size, op, layout, rows, hidden))
    return DEFAULT_CROSSOVERS[op] if found is None else found


def latency_sms_of(group: Group, *, num_tokens: int, requested: int | None = None) -> int:
    """``sms_of`` an op of latency mode, which has use for a block for each token of the group.

    As ``UsefulDecodeBlocks`` of ``csrc/cuda/decode/dispatch.cu``: a few blocks also clear unused rows.
    """
    fewest = 16
    return 0 if group.backend != "cuda" else requested or max(group.size * num_tokens, fewest)
