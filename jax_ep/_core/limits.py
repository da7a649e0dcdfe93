"""What the GPU kernels have room for: refused while tracing, and by their handlers while running."""

from __future__ import annotations

MAX_EXPERTS = 4096  # csrc/cuda/core/workspace.h: kMaxExperts
MAX_VJP_ROW_BYTES = 106240  # csrc/cuda/node/combine_vjp.cu: MaxCombineVjpRowBytes
_RING_BYTES = 32 << 20  # csrc/cuda/core/workspace.h: kRingBytes


def max_summed_row_bytes(num_ranks: int) -> int:
    """Bytes of a row in layout "expert" of which the ring of sums holds one of each other rank."""
    return _RING_BYTES // max(num_ranks - 1, 1)
