// Which sources a rank has rows of, and which rows: a source is a token of some rank.
//
// Params has group, num_tokens, num_rows, capacity and recv_rows as in dispatch.h.
#pragma once

#include <cstdint>

#include "plan/routing.h"

namespace jax_ep::cuda {

// The rows of one source; lane m of the warp has row m, or -1.
template <typename Params>
__device__ int32_t RowOfLane(const Params& p, int32_t source) {
  const int32_t lane = threadIdx.x % 32;
  if (lane >= p.num_rows) return plan::kNone;
  const int32_t row = p.recv_rows[int64_t{source} * p.num_rows + lane];
  return row < p.capacity ? row : plan::kNone;
}

// Goes through the sources that one of `num_warps` warps is to bring, leaving out those without
// rows. Sources alternate between ranks, so that every link and the local memory are busy
// throughout.
template <typename Params>
class SourceIterator {
 public:
  __device__ SourceIterator(const Params& p, int32_t warp, int32_t num_warps)
      : p_(p), next_(warp), step_(num_warps) {}

  // The next source, or -1; the same in all lanes.
  __device__ int32_t Next() {
    const int32_t num_sources = p_.group.num_ranks * p_.num_tokens;
    while (found_ == 0) {
      if (next_ >= num_sources) return plan::kNone;
      // Each lane looks at one of the next 32.
      const int64_t index = next_ + int64_t{step_} * (threadIdx.x % 32);
      candidate_ = index < num_sources ? SourceAt(static_cast<int32_t>(index)) : plan::kNone;
      const bool has_rows = candidate_ != plan::kNone &&
                            p_.recv_rows[int64_t{candidate_} * p_.num_rows] != plan::kNone;
      found_ = __ballot_sync(~0u, has_rows);
      const int64_t after = next_ + int64_t{step_} * 32;
      next_ = after < num_sources ? static_cast<int32_t>(after) : num_sources;
    }
    const int lane = __ffs(found_) - 1;
    found_ &= found_ - 1;
    return __shfl_sync(~0u, candidate_, lane);
  }

 private:
  __device__ int32_t SourceAt(int32_t index) const {
    const int32_t num_ranks = p_.group.num_ranks;
    const int32_t rank = (p_.group.rank + 1 + index % num_ranks) % num_ranks;
    return rank * p_.num_tokens + index / num_ranks;
  }

  const Params& p_;
  int32_t next_;
  int32_t step_;
  int32_t candidate_ = plan::kNone;
  uint32_t found_ = 0;
};

}  // namespace jax_ep::cuda
