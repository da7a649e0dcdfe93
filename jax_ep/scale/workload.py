"""What a prediction is for: the tokens, their routing, and how rows travel and are stored."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast, get_args

from jax_ep._core.capacity import lossless_capacity, round_up
from jax_ep._core.types import Layout
from jax_ep.scale import expectation

Dtype = Literal["bfloat16", "float16", "float32"]
Quantization = Literal["none", "quantized", "fp8", "fp8-dense"]
_DEFAULT_SMS = {"expert": 64, "token": 24}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One MoE layer, as one rank sees it. Routing is uniform, within its limit.

    Attributes:
        tokens: T of each rank.
        hidden: H.
        top_k: K.
        experts: E over all ranks.
        num_groups: Groups of consecutive experts that limit a token's choice; 1 for no limit.
        top_groups: Groups that a token's experts may be in.
        layout: "token": a rank gets one row for each token it needs; "expert": one for each of the
            token's experts there, padded to ``alignment``.
        dtype: Dtype of the tokens: "bfloat16", "float16" or "float32".
        quantization: Quantization of dispatch; combine and gradients move rows of ``dtype``.
            "none"; "quantized": rows are float8 with their scales before and after; "fp8": rows of
            ``dtype`` are cast on their way and received as float8; "fp8-dense": rows of ``dtype``
            are cast on their way and received in ``dtype``.
        alignment: Rows of an expert are padded to a multiple of it (layout "expert").
        capacity: Rows that a rank has room for, as a multiple of the expected rows. None is room
            for any routing, the default of ``jax_ep.dispatch``. Unused rows are cleared.
        num_sms: SMs that an op may occupy; None for jax_ep's default of the layout.

    Raises:
        ValueError: for sizes that do not fit together, by name.
    """

    tokens: int = 4096
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256
    num_groups: int = 1
    top_groups: int = 1
    layout: str = "token"
    dtype: str = "bfloat16"
    quantization: str = "none"
    alignment: int = 128
    capacity: float | None = 1.0
    num_sms: int | None = None

    def __post_init__(self) -> None:
        for field, kind in (("layout", Layout), ("dtype", Dtype), ("quantization", Quantization)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(
                    f"{field}: expected one of {', '.join(get_args(kind))}, got "
                    f"{getattr(self, field)!r}."
                )
        for field in ("tokens", "hidden", "top_k", "experts", "alignment"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected 1 or more, got {getattr(self, field)}.")
        if self.num_sms is not None and self.num_sms < 1:
            raise ValueError(f"num_sms: expected 1 or more, got {self.num_sms}.")
        if self.capacity is not None and not 1 <= self.capacity < math.inf:
            raise ValueError(
                f"capacity: expected at least 1 times the rows expected, or None, got {self.capacity}: "
                f"the model has no dropped rows."
            )
        if self.quantization != "none" and self.hidden % 128:
            raise ValueError(
                f"hidden: expected a multiple of 128 with quantization {self.quantization!r}, got "
                f"{self.hidden}."
            )
        self.distinct(1)  # raises if sizes of groups and K do not fit

    def distinct(self, units: int) -> float:
        """Expected number of ranks, hosts or other equal units that a token needs."""
        return expectation.distinct_units(
            units,
            experts=self.experts,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )

    @property
    def dense_row_bytes(self) -> int:
        """Bytes of a row of ``dtype``."""
        return self.hidden * (4 if self.dtype == "float32" else 2)

    @property
    def wire_row_bytes(self) -> int:
        """Bytes of a row of dispatch on its way, its scales included."""
        if self.quantization == "none":
            return self.dense_row_bytes
        return self.hidden + self.hidden // 128 * 4

    @property
    def out_row_bytes(self) -> int:
        """Bytes of a row that dispatch gives, its scales included."""
        return self.dense_row_bytes if self.quantization == "fp8-dense" else self.wire_row_bytes

    @property
    def sms(self) -> int:
        """SMs that an op occupies."""
        return _DEFAULT_SMS[self.layout] if self.num_sms is None else self.num_sms

    def written_rows(self, ranks: int) -> float:
        """Rows of a rank's groups that dispatch writes, expected: padding included."""
        if self.layout == "token":
            return self.tokens * self.distinct(ranks)
        of_expert = expectation.padded_rows(
            ranks * self.tokens, self.top_k / self.experts, self.alignment
        )
        return self.experts / ranks * of_expert

    def capacity_rows(self, ranks: int) -> int:
        """Rows that a rank has room for."""
        if self.capacity is not None:
            rows = math.ceil(self.capacity * self.written_rows(ranks))
            return round_up(rows, self.alignment if self.layout == "expert" else 1)
        return lossless_capacity(
            num_ranks=ranks,
            num_tokens=self.tokens,
            top_k=self.top_k,
            num_local_experts=self.experts // ranks,
            layout=cast(Layout, self.layout),
            alignment=self.alignment,
        )
