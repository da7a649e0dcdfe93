// Arithmetic of the routing plan: which row of which rank a (token, k) entry becomes.
//
// Host and device share these functions, so every backend agrees to the integer. Symbols, all
// int32: T tokens a rank, K top-k entries a token, E experts over the group, R ranks, L = E / R
// local experts, C capacity (rows a rank receives at most). Expert e lives on rank e / L, where its
// local id is e % L. R * T * K and R * C are below 2^31.
#pragma once

#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::plan {

// Stands for "no expert", "no row" and "no source" in every array of a plan.
constexpr int32_t kNone = -1;

enum class Layout : int32_t {
  kExpert = 0,  // one row per (token, local expert), grouped by expert
  kToken = 1,   // one row per (token, rank)
};

JAX_EP_HOST_DEVICE int32_t RankOfExpert(int32_t expert, int32_t num_local_experts) {
  return expert / num_local_experts;
}

JAX_EP_HOST_DEVICE int32_t LocalExpert(int32_t expert, int32_t num_local_experts) {
  return expert % num_local_experts;
}

JAX_EP_HOST_DEVICE int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }

JAX_EP_HOST_DEVICE int32_t RoundUp(int32_t value, int32_t multiple) {
  const int32_t past = value % multiple;  // no sum that could overflow, and one slow division
  return past == 0 ? value : value + (multiple - past);
}

// Rows that one rank can hold for one source token: the second extent of recv_rows.
JAX_EP_HOST_DEVICE int32_t RowsPerSource(Layout layout, int32_t top_k, int32_t num_local_experts) {
  return layout == Layout::kExpert ? Min(top_k, num_local_experts) : 1;
}

// Copies one token's expert ids, and returns how many of them it replaced by -1: those outside [-1,
// E) and repetitions of an earlier one. `topk` may be `topk_idx`.
JAX_EP_HOST_DEVICE int32_t SanitizeToken(const int32_t* topk_idx /*[K]*/, int32_t top_k,
                                         int32_t num_experts, int32_t* topk /*[K]*/) {
  int32_t num_invalid = 0;
  for (int32_t k = 0; k < top_k; ++k) {
    int32_t expert = topk_idx[k];
    bool valid = expert >= kNone && expert < num_experts;
    for (int32_t earlier = 0; earlier < k && expert != kNone; ++earlier) {
      valid = valid && topk[earlier] != expert;
    }
    num_invalid += valid ? 0 : 1;
    topk[k] = valid ? expert : kNone;
  }
  return num_invalid;
}

// The first k whose expert lives on the same rank as entry `k` (which must not be -1).
JAX_EP_HOST_DEVICE int32_t FirstOnSameRank(const int32_t* topk /*[K]*/, int32_t k,
                                           int32_t num_local_experts) {
  const int32_t rank = RankOfExpert(topk[k], num_local_experts);
  int32_t first = 0;
  while (topk[first] == kNone || RankOfExpert(topk[first], num_local_experts) != rank) ++first;
  return first;
}

// How the local experts of a rank share its room in layout "expert": each keeps its demand, or at
// most `level` rows. The remainder, which is less than one more aligned group for each expert, goes
// to the experts with the lowest ids: those below `cut` may have `alignment` rows more.
//
// Without a bound every expert keeps its demand. If not all rows fit, `level` is the highest
// multiple of the alignment for which all groups fit, so no expert starves because of its id.
struct RoomShare {
  int32_t level;
  int32_t cut;

  JAX_EP_HOST_DEVICE int32_t LimitOf(int32_t local_expert, int32_t alignment) const {
    return local_expert < cut ? level + alignment : level;
  }
};

// The rows of one local expert in layout "expert".
struct ExpertRows {
  int32_t count;       // rows kept
  int32_t group_size;  // count, padded to the alignment
  int32_t start;       // first row
};

// The size of a group with `wanted` rows, or some size above the capacity if it is that large.
// `capacity` is a multiple of `alignment`.
JAX_EP_HOST_DEVICE int32_t GroupSize(int32_t wanted, int32_t alignment, int32_t capacity) {
  return wanted > capacity ? capacity + 1 : RoundUp(wanted, alignment);
}

// The size of a group that keeps `count` rows. Masked groups all have one size, which suffices.
JAX_EP_HOST_DEVICE int32_t PaddedSize(int32_t count, int32_t alignment, bool masked) {
  return masked ? alignment : RoundUp(count, alignment);
}

// a + b, or some number above `capacity` if it is that large. For a and b up to capacity + 1.
JAX_EP_HOST_DEVICE int32_t AddSizes(int32_t a, int32_t b, int32_t capacity) {
  const uint32_t sum = static_cast<uint32_t>(a) + static_cast<uint32_t>(b);
  const uint32_t most = static_cast<uint32_t>(capacity) + 1;
  return static_cast<int32_t>(sum < most ? sum : most);
}

// Row of the entry at `position` among all that want one expert, ordered by (source rank, token);
// -1 if it did not fit. Layout "expert".
JAX_EP_HOST_DEVICE int32_t ExpertRow(int32_t start, int32_t count, int32_t position) {
  return position < count ? start + position : kNone;
}

// Row of the token at `position` among all that want one rank, in the same order; -1 if it did not
// fit. Layout "token".
JAX_EP_HOST_DEVICE int32_t TokenRow(int32_t capacity, int32_t position) {
  return position < capacity ? position : kNone;
}

// Where a row came from. `k` is 0 in layout "token", where a row stands for a whole token.
struct Source {
  int32_t rank;
  int32_t token;
  int32_t k;
};

// Number of distinct sources; EncodeSource gives [0, NumSources).
JAX_EP_HOST_DEVICE int32_t NumSources(Layout layout, int32_t num_ranks, int32_t num_tokens,
                                      int32_t top_k) {
  return num_ranks * num_tokens * (layout == Layout::kExpert ? top_k : 1);
}

JAX_EP_HOST_DEVICE int32_t EncodeSource(Layout layout, Source source, int32_t num_tokens,
                                        int32_t top_k) {
  const int32_t token = source.rank * num_tokens + source.token;
  return layout == Layout::kExpert ? token * top_k + source.k : token;
}

JAX_EP_HOST_DEVICE Source DecodeSource(Layout layout, int32_t encoded, int32_t num_tokens,
                                       int32_t top_k) {
  const int32_t token = layout == Layout::kExpert ? encoded / top_k : encoded;
  const int32_t k = layout == Layout::kExpert ? encoded % top_k : 0;
  return Source{token / num_tokens, token % num_tokens, k};
}

}  // namespace jax_ep::plan
