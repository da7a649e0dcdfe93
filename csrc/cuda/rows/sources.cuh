// The sources that a rank has rows of, and these rows. A source is a token of some rank.
//
// Params has group, num_tokens, num_rows, capacity and recv_rows as in node/dispatch.h.
#pragma once

#include <cstdint>

#include "cuda/core/tickets.cuh"
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

// The n-th source. They alternate between ranks, so that every link and the local memory are busy
// throughout.
template <typename Params>
__device__ int32_t NthSource(const Params& p, int32_t n) {
  const int32_t num_ranks = p.group.num_ranks;
  const int32_t rank = (p.group.rank + 1 + n % num_ranks) % num_ranks;
  return rank * p.num_tokens + n / num_ranks;
}

// Gives sources to the warps that ask, without those that have no rows.
template <typename Params>
class SourceQueue {
 public:
  struct Entry {
    int32_t source;  // or -1, if there are no more
    int32_t n;       // it is the n-th one
    int32_t row;     // RowOfLane
  };

  // Called by all lanes together, as is Next. A warp that never asks passes false for `asks`. The
  // first `num_taken` sources of the warp's first ticket are left out.
  __device__ SourceQueue(const Params& p, int32_t warp, int32_t num_warps, bool asks = true,
                         int32_t num_taken = 0)
      : p_(p), num_sources_(p.group.num_ranks * p.num_tokens), tickets_(p.group, warp, num_warps) {
    // A ticket is for a batch of sources. Towards the end batches are smaller, so that all warps
    // end together, but large enough to find a source with rows.
    small_batch_ = plan::Min((p.group.num_ranks + 3) / 4, kMaxBatch);
    batch_ = max(plan::Min(num_sources_ / 4 * 3 / num_warps / 4, kMaxBatch), small_batch_);
    num_batches_ = num_sources_ / 4 * 3 / batch_;
    if (asks) Find(num_taken);
  }

  // Sources, by number, that are neighbours.
  struct Batch {
    int32_t first, size;
  };
  // Those of a ticket; the first ticket of a warp has the warp's number.
  __device__ Batch BatchOf(int32_t ticket) const {
    const bool is_small = ticket >= num_batches_;
    const int32_t size = is_small ? small_batch_ : batch_;
    const int32_t first =
        is_small ? num_batches_ * batch_ + (ticket - num_batches_) * size : ticket * size;
    return {first, plan::Min(size, num_sources_ - first)};
  }

  __device__ Entry Next() {
    const Entry entry = next_;
    if (entry.source != plan::kNone) Find();
    return entry;
  }

  __device__ int32_t num_sources() const { return num_sources_; }

 private:
  static constexpr int32_t kMaxBatch = 8;

  // Finds the next source for Next, so that its rows are loaded before they are needed.
  __device__ void Find(int32_t num_taken = 0) {
    while (found_ == 0) {
      const Batch batch = BatchOf(tickets_.Take());
      first_ = batch.first;
      if (batch.size <= 0) {
        next_ = {plan::kNone, num_sources_, plan::kNone};
        return;
      }
      // Each lane looks at one source of the batch.
      const int32_t lane = threadIdx.x % 32;
      const bool has_rows =
          lane >= num_taken && lane < batch.size &&
          p_.recv_rows[int64_t{NthSource(p_, first_ + lane)} * p_.num_rows] != plan::kNone;
      found_ = __ballot_sync(~0u, has_rows);
      num_taken = 0;
    }
    next_.n = first_ + __ffs(found_) - 1;
    found_ &= found_ - 1;
    next_.source = NthSource(p_, next_.n);
    next_.row = RowOfLane(p_, next_.source);
  }

  const Params& p_;
  int32_t num_sources_;
  Tickets tickets_;
  int32_t batch_;
  int32_t small_batch_;
  int32_t num_batches_;  // before the small ones
  int32_t first_ = 0;    // of the batch
  uint32_t found_ = 0;   // of the batch, what is left
  Entry next_{plan::kNone, 0, plan::kNone};
};

// Goes through the sources of one of `num_warps` warps, without those that have no rows.
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
      candidate_ = index < num_sources ? NthSource(p_, static_cast<int32_t>(index)) : plan::kNone;
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
  const Params& p_;
  int32_t next_;
  int32_t step_;
  int32_t candidate_ = plan::kNone;
  uint32_t found_ = 0;
};

}  // namespace jax_ep::cuda
