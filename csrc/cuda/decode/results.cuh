// What the routers write besides the routes of own tokens: the handle of the rows here, the numbers
// of the plan, and zeros for rows without a source.
#pragma once

#include <cstdint>

#include "cuda/decode/routes.cuh"

namespace jax_ep::cuda {
namespace {

// Called by all routers together, once the routes of a batch are there.
template <Layout kLayout>
class RouteWriter {
 public:
  __device__ RouteWriter(const DecodeDispatchParams& p, DecodeOp op, RouteMemory& shared)
      : p_(p),
        op_(op),
        shared_(shared),
        columns_(shared.columns()),
        locals_(shared.locals(NumColumns(p.shape))) {}

  // Writes what the handle has of the batch's rows here.
  __device__ void WriteRows(int32_t first, int32_t count) const {
    const int32_t top_k = p_.shape.top_k, width = p_.num_rows;
    for (int32_t i = threadIdx.x; i < count * top_k; i += kRouterThreads) {
      const int32_t n = i / top_k, k = i - n * top_k;
      const int32_t* rows = &shared_.rows[n * top_k];
      const int32_t row = rows[k], source = first + n;
      if (kLayout == Layout::kExpert) {
        int32_t num_kept = 0, lower = 0;
        for (int32_t other = 0; other < top_k; ++other) {
          num_kept += rows[other] >= 0;
          lower += rows[other] >= 0 && rows[other] < row;
        }
        if (row >= 0) {
          p_.plan.recv_rows[int64_t{source} * width + lower] = row;
          p_.plan.recv_src[row] = source * top_k + k;
        }
        if (k >= num_kept && k < width) {
          p_.plan.recv_rows[int64_t{source} * width + k] = plan::kNone;
        }
        continue;
      }
      int32_t of_token = plan::kNone;
      for (int32_t other = 0; other < top_k; ++other) of_token = max(of_token, rows[other]);
      if (k == 0) p_.plan.recv_rows[source] = of_token;
      if (of_token < 0) continue;
      if (k == 0) p_.plan.recv_src[of_token] = source;
      p_.plan.expert_idx[int64_t{of_token} * top_k + k] =
          row >= 0 ? shared_.ids[i] - p_.group.rank * p_.num_local : plan::kNone;
    }
  }

  // The first block writes the numbers of the plan.
  __device__ void WriteNumbers() {
    if (kLayout == Layout::kToken) {
      for (int32_t l = threadIdx.x; l < p_.num_local; l += kRouterThreads) {
        p_.plan.demand[l] = locals_[l];
      }
      if (shared_.num_dropped > 0) CountKept();  // else all pairs are kept
      int32_t dropped = 0;
      for (int32_t l = threadIdx.x; l < p_.num_local; l += kRouterThreads) {
        p_.plan.counts[l] = p_.plan.group_sizes[l] = locals_[l];
        dropped += p_.plan.demand[l] - locals_[l];  // written by this thread
      }
      SyncRouters();
      if (threadIdx.x == 0) shared_.num_dropped = 0;
      SyncRouters();
      if (dropped != 0) atomicAdd(&shared_.num_dropped, dropped);
      SyncRouters();
    }
    if (threadIdx.x == 0) {
      *p_.plan.num_dropped = shared_.num_dropped;
      *p_.plan.num_invalid = shared_.num_invalid;
    }
  }

  // Clears this block's share of the rows without a source.
  __device__ void ClearUnused() const {
    const int32_t warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const int32_t num_warps = kRouters * gridDim.x;
    int32_t used = shared_.kept;
    const ColumnRows* const columns = columns_ + p_.group.rank * p_.num_local;
    const bool masked = kLayout == Layout::kExpert && p_.shape.masked;
    if (masked) {
      used = 0;  // they are in all groups
    } else if (kLayout == Layout::kExpert) {
      for (int32_t l = warp; l < p_.num_local; l += num_warps) {
        const int32_t end = locals_[l];
        for (int32_t row = columns[l].limit; row < end; ++row) {
          ClearRow(row);
        }
      }
      used = locals_[p_.num_local - 1];
    }
    for (int32_t row = used + warp; row < p_.shape.capacity; row += num_warps) {
      if (!masked || row >= columns[row / p_.shape.alignment].limit) ClearRow(row);
    }
    if (p_.packed_scales == nullptr) return;
    const int32_t padding = p_.packed.padded_rows() - p_.packed.rows;  // below 4
    const int32_t num_lines = p_.num_packed() * p_.packed.words;
    for (int32_t line = warp; line < num_lines; line += num_warps) {
      const int32_t lane = threadIdx.x % 32;
      if (lane < padding) p_.packed_scales[p_.packed.At(0, line, p_.packed.rows + lane)] = 0;
    }
  }

 private:
  // Layout "token", if tokens were dropped: counts the pairs that are kept, those of the first
  // rows.
  __device__ void CountKept() {
    const int32_t total = p_.shape.num_ranks * p_.shape.num_tokens;
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int32_t l = threadIdx.x; l < p_.num_local; l += kRouterThreads) locals_[l] = 0;
    int32_t before = 0;
#pragma unroll 1
    for (int32_t begin = 0; begin < total; begin += kRouterThreads) {
      const int32_t token = begin + threadIdx.x;
      bool is_here = false;
      VisitLocals(token, [&](int32_t) { is_here = true; });
      const uint32_t here = __ballot_sync(~0u, is_here);
      if (lane == 0) shared_.warp_counts[warp] = __popc(here);
      SyncRouters();
      int32_t position = before + __popc(here & ((1u << lane) - 1));
      for (int w = 0; w < kRouters; ++w) {
        position += w < warp ? shared_.warp_counts[w] : 0;
        before += shared_.warp_counts[w];
      }
      if (position < p_.shape.capacity) {
        VisitLocals(token, [&](int32_t local) { atomicAdd(&locals_[local], 1); });
      }
      SyncRouters();
    }
  }

  // Calls `visit` with each local expert of a token.
  template <typename Visit>
  __device__ __forceinline__ void VisitLocals(int32_t token, Visit&& visit) const {
#pragma unroll 1
    for (int32_t pair = 0; pair < NumPairs(p_); ++pair) {
      uint4 words[kPairWords];
      LoadPair(p_, op_, token, pair, words);
#pragma unroll
      for (int i = 0; i < kPairIds; ++i) {
        const uint32_t local = IdOf(words, i) - uint32_t(p_.group.rank * p_.num_local);
        if (local < uint32_t(p_.num_local)) visit(static_cast<int32_t>(local));
      }
    }
  }

  // By one warp.
  __device__ void ClearRow(int32_t row) const {
    const int32_t lane = threadIdx.x % 32, top_k = p_.shape.top_k;
    if (lane == 0) p_.plan.recv_src[row] = plan::kNone;
    if (kLayout == Layout::kToken && lane < top_k) {
      p_.plan.expert_idx[int64_t{row} * top_k + lane] = plan::kNone;
    }
    uint4* words =
        reinterpret_cast<uint4*>(static_cast<char*>(p_.rows) + int64_t{row} * p_.out_row_bytes);
    const int32_t num_words = p_.keeps_unused ? 0 : p_.out_row_bytes / 16;
    for (int32_t i = lane; i < num_words; i += 32) words[i] = make_uint4(0, 0, 0, 0);
    if (p_.row_scales != nullptr) {
      for (int32_t i = lane; i < p_.scales_per_row; i += 32) {
        p_.row_scales[int64_t{row} * p_.scales_per_row + i] = 0.0f;
      }
    }
    if (p_.packed_scales != nullptr) {
      const int32_t group = row / p_.packed.rows, at = row - group * p_.packed.rows;
      for (int32_t w = lane; w < p_.packed.words; w += 32) {
        p_.packed_scales[p_.packed.At(group, w, at)] = 0;
      }
    }
    if (p_.row_weights == nullptr) return;
    if (kLayout == Layout::kToken) {
      if (lane < top_k) p_.row_weights[int64_t{row} * top_k + lane] = 0.0f;
    } else if (lane == 0) {
      p_.row_weights[row] = 0.0f;
    }
  }

  const DecodeDispatchParams& p_;
  DecodeOp op_;
  RouteMemory& shared_;
  ColumnRows* columns_;
  int32_t* locals_;
};

}  // namespace
}  // namespace jax_ep::cuda
