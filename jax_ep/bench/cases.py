"""A case: the op and the workload that one figure is measured on."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jax_ep._core.types import Layout, Mode

Op = Literal[
    "dispatch",
    "dispatch_start",
    "dispatch_done",
    "dispatch_cached",
    "combine",
    "combine_start",
    "combine_done",
    "plan",
    "round_trip",
    "exchange",
    "layer",
    "overlap",
]
Quantization = Literal["none", "quantized", "fp8", "fp8-dense", "fp8-packed"]
Dtype = Literal["bfloat16", "float16", "float32"]
Routing = Literal["uniform", "group-limited", "zipf", "all-to-one"]
Capacity = Literal["exact", "default"]

# The two calls of latency mode.
DISPATCH_HALVES: tuple[Op, ...] = ("dispatch_start", "dispatch_done")
COMBINE_HALVES: tuple[Op, ...] = ("combine_start", "combine_done")
HALVES = (*DISPATCH_HALVES, *COMBINE_HALVES)
OUR_OPS: tuple[Op, ...] = (
    *("plan", "dispatch", "dispatch_cached", "combine", "round_trip"),
    *HALVES,
)
ALIGNMENT = 128  # rows of an expert are padded to multiples of it, as grouped matmuls prefer


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one workload. Sizes are those of one rank.

    Attributes:
        op: "plan", "dispatch" (with its plan), "dispatch_cached" (along a handle), "combine",
            "dispatch_start", "dispatch_done", "combine_start" and "combine_done" (one of the two
            calls that the op has in latency mode, which they take),
            "round_trip" (dispatch and combine), "exchange" (XLA's own exchange of rows, one way),
            "layer" (forward and backward) or "overlap" (an op in flight beside compute).
        layout: "expert" or "token".
        dtype: Dtype of the tokens, before any quantization.
        quantization: "none"; "quantized": the rows given and received are ``Quantized``; "fp8":
            rows of ``dtype`` are cast on their way and received ``Quantized``; "fp8-dense": rows of
            ``dtype`` are cast on their way and received in ``dtype``; "fp8-packed": as "fp8", with
            scales that are packed powers of two.
        routing: The pattern that the tokens' experts follow.
        ragged: Whether ranks have different numbers of tokens; the rest are masked.
        tokens: T of each rank.
        hidden: H.
        top_k: K.
        experts: E over all ranks.
        intermediate: Width F of an expert (op "layer"), or of the compute's result ("overlap").
        alignment: Rows of an expert are padded to a multiple of it (layout "expert").
        num_sms: SMs that the op may occupy; None takes the tuned number or the default.
        mode: As in ``DispatchConfig``; groups have room for latency mode only where this is "latency",
            so "auto" is "throughput".
        weights: Whether top-k weights travel with the rows.
        capacity: "exact": room for exactly the rows that come; "default": room for any routing.
        name: The implementation; None is jax_ep.
        compiler_options: "NAME=VALUE", an option of XLA that its programs are compiled with.
    """

    op: Op = "dispatch"
    layout: Layout = "expert"
    dtype: Dtype = "bfloat16"
    quantization: Quantization = "none"
    routing: Routing = "uniform"
    ragged: bool = False
    tokens: int = 4096
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256
    intermediate: int | None = None
    alignment: int = ALIGNMENT
    num_sms: int | None = None
    mode: Mode = "auto"
    weights: bool = True
    capacity: Capacity = "exact"
    name: str | None = None
    compiler_options: str = ""

    def __post_init__(self) -> None:
        choices = {
            "op": Op,
            "layout": Layout,
            "quantization": Quantization,
            "dtype": Dtype,
            "routing": Routing,
            "mode": Mode,
            "capacity": Capacity,
        }
        for field, kind in choices.items():
            if getattr(self, field) not in get_args(kind):
                raise ValueError(
                    f"{field}: expected one of {get_args(kind)}, got {getattr(self, field)!r}."
                )
        for field in ("tokens", "hidden", "top_k", "experts", "alignment"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected 1 or more, got {getattr(self, field)}.")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: expected at most {self.experts} experts, got {self.top_k}.")
        if self.quantization != "none" and self.hidden % 128:
            raise ValueError(
                f"hidden: expected a multiple of 128 with quantization {self.quantization!r}, got "
                f"{self.hidden}."
            )
        if self.op in HALVES and self.mode != "latency":
            raise ValueError(f"mode: expected 'latency' for op {self.op!r}, got {self.mode!r}.")
        if self.op in ("layer", "overlap") and self.intermediate is None:
            raise ValueError(f"intermediate: expected a width for op {self.op!r}.")

    @property
    def row_dtype(self) -> str:
        """Dtype of the rows that the op is given."""
        return "float8_e4m3fn" if self.quantization == "quantized" else self.dtype

    @property
    def in_row_bytes(self) -> int:
        """Bytes of a row that a dispatch is given, its scales included."""
        return self.wire_row_bytes if self.quantization == "quantized" else self._dense_row_bytes

    @property
    def out_row_bytes(self) -> int:
        """Bytes of a row that a dispatch gives, its scales included."""
        if self.quantization == "fp8-packed":
            return self.hidden + -(-self.hidden // 512) * 4
        return self._dense_row_bytes if self.quantization == "fp8-dense" else self.wire_row_bytes

    @property
    def casts(self) -> bool:
        """Whether rows are cast to float8 on their way."""
        return self.quantization.startswith("fp8")

    @property
    def _dense_row_bytes(self) -> int:
        return self.hidden * (4 if self.dtype == "float32" else 2)

    @property
    def wire_row_bytes(self) -> int:
        """Bytes of a row as it crosses a link, its scales included."""
        if self.quantization != "none" and self.op in ("dispatch", "dispatch_cached"):
            return self.hidden + self.hidden // 128 * 4
        return self._dense_row_bytes

    @property
    def workload(self) -> Case:
        """The case without what its inputs do not depend on; equal workloads share inputs."""
        return dataclasses.replace(
            self, op="dispatch", num_sms=None, mode="auto", name=None, compiler_options=""
        )

    @property
    def options(self) -> dict[str, str | bool]:
        """Compiler options of its programs, as ``compile`` takes them, with flags as bools."""
        name, _, value = self.compiler_options.partition("=")
        flags = {"true": True, "false": False}
        return {name: flags.get(value, value)} if name else {}

    @property
    def pattern(self) -> str:
        """The routing, with "+ragged" where ranks have different numbers of tokens."""
        return self.routing + ("+ragged" if self.ragged else "")

    def check_ranks(self, ranks: int) -> None:
        """Raise ``ValueError`` where the experts cannot be split over ``ranks``."""
        if self.experts % ranks:
            raise ValueError(
                f"experts: expected a multiple of the {ranks} ranks, got {self.experts}."
            )

    def to_json(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return dataclasses.asdict(self)
