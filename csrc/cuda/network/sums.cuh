// Sums of a token's rows between hosts (network/combine.cu): of those on this rank, and of those on
// this host.
#pragma once

#include <cstdint>

#include "cuda/network/chunks.cuh"
#include "cuda/network/combine.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/streamed_sum.cuh"

namespace jax_ep::cuda {

// A row in a chunk or a part, followed by the values that go home.
struct SumRow {
  int32_t values_at, bytes;
  __host__ __device__ explicit SumRow(const NetworkCombineParams& p) {
    values_at = p.row_bytes;
    bytes = values_at + (p.values != nullptr ? plan::RoundUp(p.top_k * 4, 16) : 0);
  }
  // The row of a token, the `bit`-th of the window, of those in `tokens`.
  __device__ char* Of(char* chunk, uint32_t tokens, int32_t bit) const {
    return chunk + sizeof(ChunkHeader) + __popc(tokens & ((1u << bit) - 1)) * bytes;
  }
  // The values of a row; null if there are none.
  __device__ uint32_t* ValuesOf(char* row) const {
    return bytes > values_at ? reinterpret_cast<uint32_t*>(row + values_at) : nullptr;
  }
};

// One warp of a team.
struct SumMember : TeamMember {
  static constexpr int kMostTerms = kMaxTerms + kMaxRanks + kMaxHosts;
  // What a warp has in shared memory, besides the ring of its sums.
  struct Memory {
    StreamTerm terms[kMostTerms];  // of one token at a time
    const char* sums[kMaxWindow];  // of a home: those of its own host
    int32_t starts[kMaxWindow];
  };
  Memory* memory;
  char* ring;
};

// This rank's rows of the tokens of a window.
class WindowRows {
 public:
  // `entries` are those of the window whose first token is `first`. By all lanes.
  __device__ WindowRows(const NetworkRoutes& routes, EntryRange entries, int32_t first,
                        int32_t* starts)
      : starts_(starts), end_(entries.end) {
    const int32_t lane = threadIdx.x % 32;
    int32_t last = plan::kNone;
    __syncwarp();  // `starts` is free
    for (int32_t begin = entries.begin; begin < entries.end; begin += 32) {
      const int32_t at = begin + lane;
      const int32_t token = at < entries.end ? routes.recv_token[at] : plan::kNone;
      int32_t before = __shfl_up_sync(~0u, token, 1);
      if (lane == 0) before = last;
      const bool is_first = at < entries.end && token != before;
      if (is_first) starts_[token - first] = at;
      tokens_ |= __reduce_or_sync(~0u, is_first ? 1u << (token - first) : 0u);
      last = __shfl_sync(~0u, token, 31);
    }
    __syncwarp();
  }

  // One bit for each token of the window: whether it has rows here.
  __device__ uint32_t tokens() const { return tokens_; }
  // The entries of the `bit`-th token, which has some.
  __device__ EntryRange Of(int32_t bit) const {
    const uint32_t later = tokens_ & ~((2u << bit) - 1);
    return {starts_[bit], later != 0 ? starts_[__ffs(static_cast<int>(later)) - 1] : end_};
  }

 private:
  int32_t* starts_;  // where the entries of each token begin
  int32_t end_;
  uint32_t tokens_ = 0;
};

// The values of this rank's rows of a token, the k-th in lane k; `row` is that of the lane's entry,
// of which there are `count`.
__device__ inline uint32_t ValuesOfRows(const NetworkCombineParams& p, int32_t row, int32_t count) {
  const int32_t lane = threadIdx.x % 32;
  uint32_t value = 0;
  if (p.layout == plan::Layout::kExpert) {
    int32_t k = plan::kNone;
    uint32_t of_row = 0;
    if (lane < count) {
      k = plan::DecodeSource(p.layout, p.recv_src[row], p.num_tokens, p.top_k).k;
      of_row = __float_as_uint(p.values[row]);
    }
    for (int32_t i = 0; i < count; ++i) {
      const uint32_t bits = __shfl_sync(~0u, of_row, i);
      if (__shfl_sync(~0u, k, i) == lane) value = bits;
    }
  } else {
    const int64_t at = int64_t{__shfl_sync(~0u, row, 0)} * p.top_k + lane;
    if (lane < p.top_k && p.expert_idx[at] >= 0) value = __float_as_uint(p.values[at]);
  }
  return value;
}

// Lists this rank's rows of a token. Lane k gets the k-th of their values, if there are any.
template <bool kWeighted>
__device__ uint32_t ListRows(const NetworkCombineParams& p, EntryRange entries, SumTerms& sum) {
  const int32_t lane = threadIdx.x % 32, count = entries.end - entries.begin;
  int32_t row = 0;
  if (lane < count) row = p.routes.recv_row[entries.begin + lane];
  sum.Append(count, plan::kNone, kWeighted, [&](StreamTerm* terms, int32_t) {
    if (lane >= count) return;
    const char* from = static_cast<const char*>(p.rows) + int64_t{row} * p.row_bytes;
    terms[lane] = {from, kWeighted ? p.row_weights[row] : 1.0f, 0};
  });
  return p.values != nullptr ? ValuesOfRows(p, row, count) : 0;
}

// Stores a sum.
template <typename T, bool kWeighted>
__device__ void StoreSum(const NetworkCombineParams& p, const SumMember& self, SumTerms& sum,
                         char* output) {
  const int32_t count = sum.End();
  StoreStreamedSum<T, kWeighted>(self.memory->terms, count, p.row_bytes, self.ring, output);
  __syncwarp();
}

// The sums of a window's tokens: on this host, and then, for homes, of all hosts. Each lane has a
// token's values for one k, as bits: each value is that of the one sum that has it, and zero in the
// others.
template <typename T, bool kWeighted>
class WindowSums {
 public:
  // `tokens_of_lane`: lane d has those of rank d. `at` is where the parts are.
  __device__ WindowSums(const NetworkCombineParams& p, const SumRow& format, const SumMember& self,
                        const WindowRows& rows, SlotIndex at, uint32_t tokens_of_lane)
      : p_(p), format_(format), self_(self), rows_(rows), at_(at), tokens_(tokens_of_lane) {}

  // Lists what the `bit`-th token has on this host.
  __device__ SumTerms ListHere(int32_t bit, uint32_t& value) const {
    const NetworkParams& network = p_.network;
    const int32_t lane = threadIdx.x % 32, rank = network.node.rank;
    const uint32_t have = __ballot_sync(~0u, tokens_ >> bit & 1), others = have & ~(1u << rank);
    const auto before = [&](int32_t i) { return __popc(others & ((1u << i) - 1)); };
    SumTerms sum(self_.memory->terms);
    value = 0;
    if (others != have) value = ListRows<kWeighted>(p_, rows_.Of(bit), sum);
    const char* part = nullptr;
    if ((others >> lane & 1) != 0) {
      part = format_.Of(network.Of(lane).part(rank, at_), tokens_, bit);
    }
    sum.Append(__popc(others), before(rank), false, [&](StreamTerm* terms, int32_t skips) {
      const int32_t i = before(lane);
      if (part != nullptr) terms[i + (i >= skips)] = {part, 1.0f, 0};
    });
    MergeValues(part, value);
    return sum;
  }

  // Lists the sums of all hosts; `sum` is that of this one. `host_row(h)` is that of another host,
  // or null; called by lane h % 32.
  template <typename HostRow>
  __device__ void ListHosts(SumTerms& sum, uint32_t& value, HostRow&& host_row) const {
    const int32_t lane = threadIdx.x % 32, own = p_.network.host;
    const char* rows[2];
    uint32_t sent[2];
    static_assert(kMaxHosts == 64);
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t host = lane + 32 * i;
      rows[i] = nullptr;
      if (host < p_.network.shape.num_hosts && host != own) rows[i] = host_row(host);
      sent[i] = __ballot_sync(~0u, rows[i] != nullptr);
    }
    const uint32_t before_lane = (1u << lane) - 1, before_own = (1u << own % 32) - 1;
    const int32_t link =
        own < 32 ? __popc(sent[0] & before_own) : __popc(sent[0]) + __popc(sent[1] & before_own);
    sum.Append(__popc(sent[0]) + __popc(sent[1]), link, false,
               [&](StreamTerm* terms, int32_t skips) {
#pragma unroll
                 for (int32_t i = 0; i < 2; ++i) {
                   const int32_t n = __popc(sent[i] & before_lane) + (i > 0 ? __popc(sent[0]) : 0);
                   if (rows[i] != nullptr) terms[n + (n >= skips)] = {rows[i], 1.0f, 0};
                 }
               });
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) MergeValues(rows[i], value);
  }

  // Stores the sum.
  __device__ void Store(SumTerms& sum, char* output) const {
    StoreSum<T, kWeighted>(p_, self_, sum, output);
  }

 private:
  // Adds the values of rows, of which each lane may have one.
  __device__ void MergeValues(const char* row, uint32_t& value) const {
    if (p_.values == nullptr) return;
    const int32_t k = threadIdx.x % 32;
    for (uint32_t left = __ballot_sync(~0u, row != nullptr); left != 0; left &= left - 1) {
      const uint64_t address =
          __shfl_sync(~0u, reinterpret_cast<uint64_t>(row), __ffs(static_cast<int>(left)) - 1);
      const char* const values = reinterpret_cast<const char*>(address) + format_.values_at;
      if (k < p_.top_k) value |= __ldcg(reinterpret_cast<const uint32_t*>(values) + k);
    }
  }

  const NetworkCombineParams& p_;
  const SumRow& format_;
  const SumMember& self_;
  const WindowRows& rows_;
  SlotIndex at_;
  uint32_t tokens_;
};

}  // namespace jax_ep::cuda
