// Sums of a token's rows between hosts (network/combine.cu): of those on this rank, and of those on
// this host.
#pragma once

#include <cstdint>

#include "cuda/network/chunks.cuh"
#include "cuda/network/combine.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/adder.cuh"

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

// The sum of a token on this host, or a part or a row that is the same; null if it has none.
struct HostSum {
  const char* row;
  bool has_values;  // whether the values of this host are where they have to be
};

// One warp of a team.
struct SumMember : TeamMember {
  Term* terms;      // [kMaxTerms]
  Term* hosts;      // [kMaxHosts], of a home
  int32_t* starts;  // [kMaxWindow]
  HostSum* sums;    // [kMaxWindow], of a home: those of its own host
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

// Writes the values of this rank's rows of a token, of which each lane below `count` has one.
__device__ inline void WriteValues(const NetworkCombineParams& p, int32_t row, int32_t count,
                                   uint32_t* values) {
  const int32_t lane = threadIdx.x % 32;
  if (p.layout == plan::Layout::kExpert) {
    for (int32_t k = lane; k < p.top_k; k += 32) values[k] = 0;
    __syncwarp();
    if (lane < count) {
      const plan::Source source =
          plan::DecodeSource(p.layout, p.recv_src[row], p.num_tokens, p.top_k);
      values[source.k] = __float_as_uint(p.values[row]);
    }
  } else {
    const int64_t of_row = int64_t{__shfl_sync(~0u, row, 0)} * p.top_k;
    for (int32_t k = lane; k < p.top_k; k += 32) {
      values[k] = p.expert_idx[of_row + k] >= 0 ? __float_as_uint(p.values[of_row + k]) : 0;
    }
  }
  __syncwarp();
}

// Makes this rank's rows of a token the terms of a sum, and writes their values.
template <bool kWeighted>
__device__ void TakeRows(const NetworkCombineParams& p, const SumMember& self, EntryRange entries,
                         uint32_t* values) {
  const int32_t lane = threadIdx.x % 32, count = entries.end - entries.begin;
  int32_t row = 0;
  if (lane < count) {
    row = p.routes.recv_row[entries.begin + lane];
    const char* from = static_cast<const char*>(p.rows) + int64_t{row} * p.row_bytes;
    self.terms[lane] = {from, kWeighted ? p.row_weights[row] : 1.0f};
  }
  __syncwarp();
  if (values != nullptr) WriteValues(p, row, count, values);
}

// The sum of one of a window's tokens on this host, and then, for homes, of all hosts.
//
// A rank's sum is a part. This rank's own part is only made if there are others too; the lanes that
// wrote it read it again.
// A sum of one term is left out where a later sum has the term instead: that one begins with +0 as
// well, so that it is the same.
template <typename T, bool kWeighted, bool kAtHome>
class TokenSum {
 public:
  // `tokens_of_lane`: lane d has those of rank d. `at` is where the parts are.
  __device__ TokenSum(const NetworkCombineParams& p, const SumRow& format, const SumMember& self,
                      const WindowRows& rows, SlotIndex at, uint32_t tokens_of_lane)
      : p_(p), format_(format), self_(self), rows_(rows), at_(at), tokens_(tokens_of_lane) {}

  // Adds the rows of the `bit`-th token on this host. The sum goes to `sum`, unless it is left out,
  // and its values to `values`, if there are any.
  __device__ HostSum AddHere(int32_t bit, char* sum, uint32_t* values) const {
    const NetworkParams& network = p_.network;
    const int32_t lane = threadIdx.x % 32, rank = network.node.rank;
    const uint32_t have = __ballot_sync(~0u, tokens_ >> bit & 1);
    const bool is_mine = (have >> rank & 1) != 0, is_alone = __popc(have) == 1;
    char* const part = format_.Of(network.Own().part(rank, at_), rows_.tokens(), bit);
    const char* mine = part;  // this rank's part, or a row that is the same
    HostSum here{nullptr, false};
#pragma unroll 1
    for (int32_t step = kRows; step <= kParts; ++step) {
      const Term* terms = self_.terms;
      int32_t count = 0;
      char* output = sum;
      if (step == kRows) {
        if (!is_mine) continue;
        const EntryRange entries = rows_.Of(bit);
        count = entries.end - entries.begin;
        const bool is_row = !kWeighted && count == 1;
        if (is_alone) {
          TakeRows<kWeighted>(p_, self_, entries, values);
          here = {kAtHome && is_row ? terms[0].row : sum, true};
          if (here.row != sum) continue;
        } else {
          TakeRows<kWeighted>(p_, self_, entries, format_.ValuesOf(part));
          output = part;
          if (is_row && values == nullptr) mine = terms[0].row;
          if (mine != part) continue;
        }
      } else {
        if (have == 0 || (is_alone && is_mine)) continue;
        __syncwarp();  // the terms are free
        if ((have >> lane & 1) != 0) {
          const char* row = mine;
          if (lane != rank) row = format_.Of(network.Of(lane).part(rank, at_), tokens_, bit);
          self_.terms[__popc(have & ((1u << lane) - 1))] = {row, 1.0f};
        }
        __syncwarp();
        count = __popc(have), here = {sum, false};
        if (kAtHome && is_alone) {
          here.row = terms[0].row;
          continue;
        }
        MergeValues(terms, count, values);
        here.has_values = true;
      }
      AddTerms<T, kWeighted>(terms, count, 0, p_.row_bytes, output);
      __syncwarp();
    }
    return here;
  }

  // Adds the sums of all hosts, of which `here` is that of this one. `host_row(h)` is that of
  // another host, or null; called by lane h % 32.
  template <typename HostRow>
  __device__ void AddHosts(HostSum here, char* sum, uint32_t* values, HostRow&& host_row) const {
    const NetworkParams& network = p_.network;
    const int32_t lane = threadIdx.x % 32;
    int32_t count = 0;
    for (int32_t first = 0; first < network.shape.num_hosts; first += 32) {
      const int32_t host = first + lane;
      const char* row = host == network.host ? here.row : nullptr;
      if (host < network.shape.num_hosts && host != network.host) row = host_row(host);
      const uint32_t sent = __ballot_sync(~0u, row != nullptr);
      if (row != nullptr) self_.hosts[count + __popc(sent & ((1u << lane) - 1))] = {row, 1.0f};
      count += __popc(sent);
    }
    __syncwarp();
    MergeValues(self_.hosts, count, values, here.has_values ? here.row : nullptr);
    AddTerms<T, kWeighted>(self_.hosts, count, 0, p_.row_bytes, sum);
    __syncwarp();
  }

 private:
  enum Step : int32_t { kRows, kParts };

  // Values: each is that of the one term that has it, and zero in the others. Those of the term
  // `known` are in `values` already.
  __device__ void MergeValues(const Term* terms, int32_t count, uint32_t* values,
                              const char* known = nullptr) const {
    if (values == nullptr) return;
    for (int32_t k = threadIdx.x % 32; k < p_.top_k; k += 32) {
      uint32_t bits = known != nullptr ? values[k] : 0;
      for (int32_t i = 0; i < count; ++i) {
        const char* const row = terms[i].row;
        if (row == known) continue;
        bits |= __ldcg(reinterpret_cast<const uint32_t*>(row + format_.values_at) + k);
      }
      values[k] = bits;
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
