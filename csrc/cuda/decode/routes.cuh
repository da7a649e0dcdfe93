// The routes of a dispatch in latency mode, made by some warps of each block, the *routers*.
//
// Every block reads the ids of all tokens of all ranks, which are small, and so learns how many
// entries each expert has and how many come before the block's own tokens. It needs no other block.
// Rows are counted by *column*: an expert in layout "expert", a rank in layout "token".
#pragma once

#include <cstdint>

#include "cuda/decode/dispatch.h"
#include "cuda/decode/ids.cuh"
#include "cuda/rows/room.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

// Entries (token, k) that are routed at a time.
constexpr int32_t kBatchEntries = 1024;

constexpr int kRouterBarrier = 1;
__device__ __forceinline__ void SyncRouters() { ptx::SyncWarps<kRouterBarrier>(kRouterThreads); }

// The tokens of all ranks, one rank after the other, that a block routes and delivers.
struct TokenRange {
  int32_t begin, end;

  __device__ explicit TokenRange(const DecodeDispatchParams& p) {
    const int32_t total = p.shape.num_ranks * p.shape.num_tokens;
    const int32_t block = blockIdx.x, blocks = gridDim.x;
    begin = total * block / blocks;
    end = total * (block + 1) / blocks;
  }
};
static_assert(int64_t{kMaxDecodeEntries} * (kMaxDecodeBlocks + 1) < INT32_MAX, "of a product");

// The rows of a column that the batch's next entry has, and where the column's rows end.
struct ColumnRows {
  int32_t next;
  int32_t limit;
};

// Shared memory of the routers.
struct RouteMemory {
  uint16_t ids[kBatchEntries];    // [batch, K] as they travelled
  int32_t rows[kBatchEntries];    // [batch, K] of entries here, or -1
  uint32_t ranks[kBatchEntries];  // [batch] that have a row of the token
  int32_t warp_counts[kRouters];
  int32_t num_invalid;  // of this rank; first block
  int32_t num_dropped;  // first block
  int32_t kept;         // rows of layout "token" that are used
  // By column: first the entries, with those before the block's tokens in the upper half; then the
  // rows. [columns]
  __device__ ColumnRows* columns() { return reinterpret_cast<ColumnRows*>(this + 1); }
  // After those: the end of each local expert's rows with their padding, or in layout "token", in
  // the first block, its pairs. [L]
  __device__ int32_t* locals(int32_t num_columns) {
    return reinterpret_cast<int32_t*>(columns() + num_columns);
  }
};

__host__ __device__ int32_t NumColumns(const plan::PlanShape& shape) {
  return shape.layout == Layout::kExpert ? shape.num_experts : shape.num_ranks;
}

__host__ __device__ int32_t RouteBytes(const DecodeDispatchParams& p) {
  const int32_t bytes = static_cast<int32_t>(sizeof(RouteMemory)) +
                        NumColumns(p.shape) * static_cast<int32_t>(sizeof(ColumnRows)) +
                        p.num_local * static_cast<int32_t>(sizeof(int32_t));
  return (bytes + 127) / 128 * 128;
}

// kLayout as a constant, so that a kernel has no code of the other layout.
template <Layout kLayout>
class Router {
 public:
  __device__ Router(const DecodeDispatchParams& p, DecodeOp op, const TokenRange& range,
                    RouteMemory& shared)
      : p_(p),
        op_(op),
        range_(range),
        shared_(shared),
        columns_(shared.columns()),
        locals_(shared.locals(NumColumns(p.shape))) {}

  __device__ void Clear() {
    for (int32_t i = threadIdx.x; i < NumColumns(p_.shape); i += kRouterThreads) {
      columns_[i] = {0, 0};
    }
    for (int32_t i = threadIdx.x; i < p_.num_local; i += kRouterThreads) locals_[i] = 0;
    if (threadIdx.x == 0) shared_.num_invalid = shared_.num_dropped = 0;
  }

  // Counts the entries of all tokens, and keeps the ids of the first batch. False in a thread whose
  // wait has failed.
  __device__ bool Count(int32_t first, int32_t count) {
    constexpr int kAtOnce = 4;  // tokens of a thread
    const int32_t total = p_.shape.num_ranks * p_.shape.num_tokens, num_pairs = NumPairs(p_);
    const int32_t lane = threadIdx.x % 32;
    int32_t of_rank = 0, num_invalid = 0;  // lane r: of rank r
    bool ok = true;
#pragma unroll 1
    for (int32_t begin = threadIdx.x - lane; begin < total; begin += kAtOnce * kRouterThreads) {
      uint32_t ranks[kAtOnce] = {};
#pragma unroll 1
      for (int32_t pair = 0; pair < num_pairs; ++pair) {
        uint4 words[kAtOnce][kPairWords];
        ok = AwaitPairs<kAtOnce>(p_, op_, begin + lane, pair, words) && ok;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int32_t token = begin + n * kRouterThreads + lane;
          if (token - lane >= total) break;
          num_invalid += CountPair(token, words[n], ranks[n]);
          KeepPair(token - first, count, pair, words[n], ranks[n]);
        }
      }
#pragma unroll
      for (int n = 0; kLayout == Layout::kToken && n < kAtOnce; ++n) {
        const int32_t token = begin + n * kRouterThreads + lane;
        const uint32_t before = __ballot_sync(~0u, token < range_.begin);
#pragma unroll 1
        for (int r = 0; r < p_.group.num_ranks; ++r) {
          const uint32_t there = __ballot_sync(~0u, ranks[n] >> r & 1);
          if (lane == r) of_rank += __popc(there) + (__popc(there & before) << 16);
        }
      }
    }
    if (kLayout == Layout::kToken && lane < p_.group.num_ranks && of_rank != 0) {
      atomicAdd(&columns_[lane].next, of_rank);
    }
    if (blockIdx.x == 0 && num_invalid != 0) atomicAdd(&shared_.num_invalid, num_invalid);
    return ok;
  }

  // Turns counts into rows.
  __device__ void LayOut() {
    if (kLayout == Layout::kToken) {
      if (threadIdx.x < p_.group.num_ranks) {
        const uint32_t counts = columns_[threadIdx.x].next;
        columns_[threadIdx.x] = {int32_t(counts >> 16), p_.shape.capacity};
        if (int(threadIdx.x) == p_.group.rank) {
          shared_.kept = plan::Min(counts & 0xffff, p_.shape.capacity);
          shared_.num_dropped = int32_t(counts & 0xffff) - shared_.kept;
        }
      }
      return;
    }
    for (int rank = threadIdx.x / 32; rank < p_.group.num_ranks; rank += kRouters) LayOut(rank);
  }

  // Keeps the ids of the tokens from `first` on, `count` of them, all of which are there.
  __device__ void ReadBatch(int32_t first, int32_t count) {
#pragma unroll 1
    for (int32_t n = threadIdx.x; n < count; n += kRouterThreads) {
      uint32_t ranks = 0;
#pragma unroll 1
      for (int32_t pair = 0; pair < NumPairs(p_); ++pair) {
        uint4 words[kPairWords];
        LoadPair(p_, op_, first + n, pair, words);
#pragma unroll
        for (int i = 0; i < kPairIds; ++i) {
          const uint32_t id = IdOf(words, i);
          if (id < uint32_t(p_.shape.num_experts)) ranks |= 1u << p_.by_num_local(id);
        }
        KeepPair(n, count, pair, words, ranks);
      }
    }
  }

  // Gives the batch's entries their rows, and writes what this rank's handle has of its own tokens.
  __device__ void Number(int32_t first, int32_t count) {
    const int32_t top_k = p_.shape.top_k;
    const uint32_t num_experts = p_.shape.num_experts;
    for (int32_t i = threadIdx.x; i < count * top_k; i += kRouterThreads) {
      const int32_t n = i / top_k;
      const int32_t token = first + n - p_.group.rank * p_.shape.num_tokens;
      const bool is_own = token >= 0 && token < p_.shape.num_tokens;
      const uint32_t id = shared_.ids[i];
      const int32_t rank = id < num_experts ? p_.by_num_local(id) : -1;
      int32_t row = plan::kNone;
      if (rank >= 0 && (is_own || rank == p_.group.rank)) {
        const ColumnRows column = columns_[kLayout == Layout::kExpert ? int32_t(id) : rank];
        row = column.next + EntriesBefore(n, kLayout == Layout::kExpert ? id : uint32_t(rank));
        if (row >= column.limit) row = plan::kNone;
      }
      shared_.rows[i] = rank == p_.group.rank ? row : plan::kNone;
      if (!is_own) continue;
      p_.plan.dest_row[token * top_k + i - n * top_k] = row;
      p_.plan.topk[token * top_k + i - n * top_k] = rank >= 0 ? int32_t(id) : plan::kNone;
    }
  }

  // Before the next batch: its entries come after those of this one.
  __device__ void Advance(int32_t count) {
    for (int32_t i = threadIdx.x; i < count * p_.shape.top_k; i += kRouterThreads) {
      const uint32_t id = shared_.ids[i];
      if (kLayout == Layout::kExpert && id < uint32_t(p_.shape.num_experts)) {
        atomicAdd(&columns_[id].next, 1);
      }
    }
    for (int32_t n = threadIdx.x; kLayout == Layout::kToken && n < count; n += kRouterThreads) {
      for (uint32_t ranks = shared_.ranks[n]; ranks != 0; ranks &= ranks - 1) {
        atomicAdd(&columns_[__ffs(ranks) - 1].next, 1);
      }
    }
  }

 private:
  // Counts the ids of a pair of words, and adds their ranks to `ranks`. Returns the number of
  // invalid ids of this rank's tokens.
  __device__ __forceinline__ int32_t CountPair(int32_t token, const uint4 (&words)[kPairWords],
                                               uint32_t& ranks) {
    const bool is_before = token < range_.begin;
    int32_t num_invalid = 0;
#pragma unroll
    for (int i = 0; i < kPairIds; ++i) {
      const uint32_t id = IdOf(words, i);
      num_invalid += id == kInvalid;
      if (id >= uint32_t(p_.shape.num_experts)) continue;
      if (kLayout == Layout::kExpert) {
        atomicAdd(&columns_[id].next, is_before ? 0x10001 : 1);
        continue;
      }
      const int32_t rank = p_.by_num_local(id);
      ranks |= 1u << rank;
      if (blockIdx.x == 0 && rank == p_.group.rank) {
        atomicAdd(&locals_[id - rank * p_.num_local], 1);
      }
    }
    const int32_t own = token - p_.group.rank * p_.shape.num_tokens;
    return own >= 0 && own < p_.shape.num_tokens ? num_invalid : 0;
  }

  // Keeps the ids of a pair of words if token `n` is one of the batch's.
  __device__ __forceinline__ void KeepPair(int32_t n, int32_t count, int32_t pair,
                                           const uint4 (&words)[kPairWords], uint32_t ranks) {
    if (n < 0 || n >= count) return;
    const int32_t top_k = p_.shape.top_k;
#pragma unroll
    for (int i = 0; i < kPairIds; ++i) {
      const int32_t k = kPairIds * pair + i;
      if (k < top_k) shared_.ids[n * top_k + k] = static_cast<uint16_t>(IdOf(words, i));
    }
    shared_.ranks[n] = ranks;
  }

  // Entries of earlier tokens of the batch in the column.
  __device__ __forceinline__ int32_t EntriesBefore(int32_t token, uint32_t column) const {
    int32_t count = 0;
    if (kLayout == Layout::kExpert) {
      const int32_t end = token * p_.shape.top_k;
#pragma unroll 8
      for (int32_t i = 0; i < end; ++i) count += shared_.ids[i] == column;
    } else {
#pragma unroll 8
      for (int32_t n = 0; n < token; ++n) count += shared_.ranks[n] >> column & 1;
    }
    return count;
  }

  // Layout "expert": the rows of a rank's experts, by one warp: see plan::RoomShare.
  __device__ void LayOut(int rank) {
    const int32_t lane = threadIdx.x % 32, alignment = p_.shape.alignment;
    const int32_t capacity = p_.shape.capacity, bound = p_.shape.expert_capacity;
    const bool is_own = rank == p_.group.rank;
    const ColumnRows* const columns = columns_ + rank * p_.num_local;
    plan::RoomShare share{capacity, 0};
    uint32_t all = 0;  // a bound that is quickly made, and that suffices where nothing is padded
    for (int32_t l = lane; l < p_.num_local; l += 32) all += columns[l].next & 0xffff;
    all = __reduce_add_sync(~0u, all);
    if (!p_.shape.masked && all + int64_t{p_.num_local} * (alignment - 1) > capacity) {
      const auto size_of = [columns, alignment, capacity, bound](int32_t l) {
        const int32_t wanted = plan::Min(columns[l].next & 0xffff, bound);
        return plan::GroupSize(wanted, alignment, capacity);
      };
      share = ShareRoom(p_.num_local, alignment, capacity, size_of);
    }
    __syncwarp();
    int32_t before = 0, dropped = 0;
    for (int32_t l0 = 0; l0 < p_.num_local; l0 += 32) {
      const int32_t l = l0 + lane, column = rank * p_.num_local + l;
      const bool inside = l < p_.num_local;
      const uint32_t counts = inside ? columns_[column].next : 0;
      const int32_t demand = counts & 0xffff, wanted = plan::Min(demand, bound);
      const int32_t count = plan::Min(wanted, share.LimitOf(l, alignment));
      const int32_t size = plan::PaddedSize(count, alignment, p_.shape.masked);
      int32_t sum = size;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
      }
      const int32_t start = before + sum - size;
      before += __shfl_sync(~0u, sum, 31);
      if (!inside) continue;
      columns_[column] = {start + static_cast<int32_t>(counts >> 16), start + count};
      if (!is_own) continue;
      locals_[l] = start + size;
      dropped += demand - count;
      if (blockIdx.x != 0) continue;
      p_.plan.demand[l] = demand;
      p_.plan.counts[l] = count;
      p_.plan.group_sizes[l] = size;
    }
    if (is_own && dropped != 0) atomicAdd(&shared_.num_dropped, dropped);
  }

  const DecodeDispatchParams& p_;
  DecodeOp op_;
  const TokenRange& range_;
  RouteMemory& shared_;
  ColumnRows* columns_;
  int32_t* locals_;
};

}  // namespace
}  // namespace jax_ep::cuda
