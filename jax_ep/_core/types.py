"""The types that dispatch and combine take and return, all of them pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float8e4m3fn, Float32, Int32

Layout = Literal["expert", "token"]
# "masked" is layout "expert" with every expert's rows at a fixed place (``Handle.masked``).
DispatchLayout = Literal["expert", "token", "masked"]
ScaleFormat = Literal["f32", "ue8m0"]
RowScaleFormat = Literal["f32", "ue8m0", "ue8m0_packed"]  # of the rows that a dispatch gives
UnusedRows = Literal["zero", "undefined"]
DropPolicy = Literal["position", "score"]
Mode = Literal["auto", "throughput", "latency"]

_MAX_NUM_SMS = 2**31 - 1  # an int32 attribute of the ops; GPUs have far fewer


class Quantized(NamedTuple):
    """Rows in 8-bit floats with one float32 scale per block of 128 channels.

    ``values * repeat(scales, 128)`` gives back the rows.

    Attributes:
        values: ``[rows, hidden]`` float8_e4m3fn.
        scales: ``[rows, hidden / 128]`` float32; of rows received with
            ``scale_format="ue8m0_packed"`` int32 words instead, as ``pack_scales`` gives them.
    """

    values: Float8e4m3fn[Array, "rows hidden"]
    scales: Float32[Array, "rows blocks"]


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """How an op uses the machine; never changes results.

    Attributes:
        num_sms: Streaming multiprocessors (one block each) that a dispatch or combine may occupy on
            a GPU, brought into 2 to 100 (all but 32 of its SMs, shared by the ranks on it). None
            takes the number that
            ``python -m jax_ep.tune`` found for this GPU, group size and shape, else 64 in layout
            "expert" and 24 in layout "token" (less where 32 SMs would not stay free). Ops beside the
            experts of ``moe(overlap="chunks")`` take 24 instead. Has no meaning on CPU.
        mode: "throughput" (prefill and training), "latency" (decode: few tokens, one launch an op) or
            "auto". "latency" takes a group on one host that was made with
            ``create_group(latency_tokens=, latency_hidden=)``, and at most 512 tokens a rank and
            65536 entries of ``topk_idx`` over all ranks; else it is an error. On GPUs it has kernels of
            its own for ``dispatch`` with a new plan and for ``combine``. ``dispatch`` along a handle
            and the gradients run the kernels of "throughput". All SMs that a group's ops may occupy
            must be free for it. "auto" takes "latency" for these two ops where all of that holds and a
            rank has at most so many tokens as ``python -m jax_ep.tune`` found it to be faster for, else
            512 for ``dispatch`` and 256 for ``combine`` (measured on two H200s, H = 7168, top-8).
            Everywhere else it takes "throughput": for larger shapes, in groups made without these
            sizes, and for ops in flight (``dispatch_start``, ``combine_start``), where "latency" has
            to be asked for.
    """

    num_sms: int | None = None
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        what = "jax_ep.DispatchConfig: argument"
        if self.num_sms is not None:
            if not isinstance(self.num_sms, int) or isinstance(self.num_sms, bool):
                raise TypeError(
                    f"{what} num_sms: expected a positive int or None, got {self.num_sms!r}; pass a "
                    f"number of SMs as an int."
                )
            if not 1 <= self.num_sms <= _MAX_NUM_SMS:
                raise ValueError(
                    f"{what} num_sms: expected 1 to {_MAX_NUM_SMS} or None, got {self.num_sms}; an "
                    f"op takes 2 to 100, whatever is asked for."
                )
        if self.mode not in ("auto", "throughput", "latency"):
            raise ValueError(
                f"{what} mode: expected 'auto', 'throughput' or 'latency', got {self.mode!r}; "
                f"choose one of these."
            )


def keeps_unused(unused_rows: UnusedRows, alignment: int, masked: bool) -> bool:
    """Whether ops leave unused rows as they are: it was asked for, and none of them is a zero."""
    return unused_rows == "undefined" and (alignment == 1 or masked)


def is_latency(config: DispatchConfig | None) -> bool:
    """Whether ``config`` asks for latency mode."""
    return config is not None and config.mode == "latency"


def without_latency(config: DispatchConfig | None) -> DispatchConfig | None:
    """``config`` for an op that latency mode has no kernels for."""
    if config is None or not is_latency(config):
        return config
    return dataclasses.replace(config, mode="throughput")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """Where every row of one dispatch came from and went: what combine and a second dispatch need.

    A pytree of int32 arrays (T tokens, K top-k, R ranks, L local experts, C capacity,
    M = min(K, L) in layout "expert" and 1 in layout "token"); carry it through ``jit``, ``scan``
    and checkpoints like any other array.

    Rows of a group on one host are listed by source, in ``recv_rows``, whose size grows with R·T. A
    group that spans hosts has *entries* instead: one for each of this rank's rows, in the order of
    (source rank, token, local expert), in ``recv_start``, ``recv_token`` and ``recv_row``.

    Attributes:
        topk_idx: ``[T, K]`` global expert ids; invalid and repeated ones became −1.
        dest_row: ``[T, K]`` row at the destination rank ``topk_idx // L``, or −1 (none, dropped). None
            where the group spans hosts: the destination knows.
        recv_rows: ``[R·T, M]`` this rank's rows of source (rank, token), by ascending local
            expert, packed to the left, then −1. None where the group spans hosts.
        recv_start: ``[R + 1]`` where the entries of each source rank begin. None on one host, like
            the next two.
        recv_token: ``[C]`` source token of each entry, then −1.
        recv_row: ``[C]`` row of each entry, then −1.
        recv_src: ``[C]`` source of each row, or −1 for an unused one: ``(rank·T + token)·K + k`` in
            layout "expert", ``rank·T + token`` in layout "token".
        expert_idx: ``[C, K]`` in layout "token": local expert at each source position k, or −1.
            None in layout "expert".
        group_sizes: ``[L]`` kept rows of each local expert with their padding.
        counts: ``[L]`` kept rows of each local expert (pairs in layout "token").
        demand: ``[L]`` rows wanted by each local expert (pairs in layout "token").
        num_dropped: ``[1]`` what did not fit on this rank, ``sum(demand) - sum(counts)``.
        num_invalid: ``[1]`` entries of this rank's ``topk_idx`` that were out of range or repeated.
        group_id: Id of the group that made the plan.
        num_experts: Experts over the whole group.
        layout: "expert" or "token".
        capacity: Rows C of each rank.
        alignment: Group sizes are multiples of it (layout "expert").
        unused_rows: What rows past the last group hold: "zero" or "undefined".
        masked: Whether it is of a dispatch with layout "masked": then ``layout`` is "expert", and each
            local expert has ``alignment`` rows, of which the first ``counts`` are used.
    """

    topk_idx: Int32[Array, "tokens top_k"]
    dest_row: Int32[Array, "tokens top_k"] | None
    recv_rows: Int32[Array, "sources rows_per_source"] | None
    recv_start: Int32[Array, " ranks_and_1"] | None
    recv_token: Int32[Array, " capacity"] | None
    recv_row: Int32[Array, " capacity"] | None
    recv_src: Int32[Array, " capacity"]
    expert_idx: Int32[Array, "capacity top_k"] | None
    group_sizes: Int32[Array, " local_experts"]
    counts: Int32[Array, " local_experts"]
    demand: Int32[Array, " local_experts"]
    num_dropped: Int32[Array, "1"]
    num_invalid: Int32[Array, "1"]
    group_id: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    alignment: int = dataclasses.field(metadata={"static": True})
    unused_rows: UnusedRows = dataclasses.field(default="zero", metadata={"static": True})
    masked: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def keeps_unused(self) -> bool:
        """Whether ops along it leave unused rows as they are."""
        return keeps_unused(self.unused_rows, self.alignment, self.masked)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What one rank received.

    Attributes:
        tokens: ``[C, H]`` rows (or ``Quantized`` rows). Padding is zero, and so are unused rows, but
            for those past the last group with ``unused_rows="undefined"``. In layout "masked"
            ``[L, S, H]``: expert l has rows ``tokens[l, :counts[l]]``.
        weights: The top-k weight of each row: ``[C]`` in layout "expert", ``[C, K]`` in layout
            "token", ``[L, S]`` in layout "masked"; None when none were given.
        handle: The plan, for ``combine`` and for another ``dispatch`` along the same routes. All that
            follows is the handle's.
        expert_idx: ``[C, K]`` local expert at each source position k, or −1 (layout "token" only).
        group_sizes: ``[L]`` int32 kept rows of each local expert with their padding: ready for a
            grouped matmul. In layout "token": equal to ``counts``.
        counts: ``[L]`` int32 kept rows (layout "token": kept (token, expert) pairs). For the rows that
            experts had over many steps, stack the counts of all layers, as ``lax.scan`` does, and add
            them to an array that the steps carry: one small kernel a step. An int32 overflows after
            2^31 rows of an expert.
        demand: ``[L]`` int32 rows wanted (layout "token": (token, expert) pairs).
        num_dropped: ``[1]`` int32, ``sum(demand) - sum(counts)`` of this rank.
        num_invalid: ``[1]`` int32 entries of this rank's ``topk_idx`` taken as −1.
        expert_of_row: ``[C]`` int32 local expert of each row (layout "expert" only), computed from
            ``group_sizes``. Padding has the id of its group, so the rows ``[::alignment]`` give the
            expert of each block. Rows past the last group have L, since −1 would index the last expert.
    """

    tokens: Any  # Array | Quantized; which one, the arguments of dispatch say
    weights: Array | None
    handle: Handle

    @property
    def expert_idx(self) -> Int32[Array, "capacity top_k"] | None:
        """Of the handle."""
        return self.handle.expert_idx

    @property
    def group_sizes(self) -> Int32[Array, " local_experts"]:
        """Of the handle."""
        return self.handle.group_sizes

    @property
    def counts(self) -> Int32[Array, " local_experts"]:
        """Of the handle."""
        return self.handle.counts

    @property
    def demand(self) -> Int32[Array, " local_experts"]:
        """Of the handle."""
        return self.handle.demand

    @property
    def num_dropped(self) -> Int32[Array, "1"]:
        """Of the handle."""
        return self.handle.num_dropped

    @property
    def num_invalid(self) -> Int32[Array, "1"]:
        """Of the handle."""
        return self.handle.num_invalid

    @property
    def expert_of_row(self) -> Int32[Array, " capacity"]:
        """Of the group sizes; an ``AttributeError`` in layout "token"."""
        if self.handle.layout != "expert":
            raise AttributeError(
                f"jax_ep.Dispatched: attribute expert_of_row: expected layout 'expert', got "
                f"{self.handle.layout!r}; read expert_idx, the local experts of each row."
            )
        ends = jnp.cumsum(self.group_sizes, dtype=jnp.int32)
        rows = jnp.arange(self.handle.capacity, dtype=jnp.int32)
        # One comparison for each row and group, which XLA fuses with the sum. A binary search would be
        # a loop of kernels.
        return (rows[:, None] >= ends).sum(axis=1, dtype=jnp.int32)
