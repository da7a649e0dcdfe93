// The ids of all tokens, as they travel in latency mode.
//
// A word has six ids of 16 bits. Every rank sends those of its tokens to all ranks, also to itself,
// whether or not the tokens go there. Absent ranks send none, so each rank writes theirs itself.
#pragma once

#include <cstdint>

#include "cuda/decode/dispatch.h"
#include "cuda/decode/handshake.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kRouters = 8;  // warps of a block that exchange ids
constexpr int kRouterThreads = kRouters * 32;

// Beside those of experts.
constexpr uint32_t kNoExpert = 0xffff;
constexpr uint32_t kInvalid = 0xfffe;  // none either, but it counts
static_assert(kMaxExperts <= kInvalid, "experts and these");

// Words that a thread reads at a time; and the ids in them.
constexpr int kPairWords = 2;
constexpr int kPairIds = kPairWords * kIdsOfWord;

__device__ __forceinline__ int32_t NumPairs(const DecodeDispatchParams& p) {
  return (p.slots.id_words + kPairWords - 1) / kPairWords;
}

// Sends this block's share of this rank's ids. Invalid and repeated ones are marked.
__device__ __forceinline__ void SendIds(const DecodeDispatchParams& p, DecodeOp op) {
  const int32_t lane = threadIdx.x % 32, top_k = p.shape.top_k;
  const int32_t width = top_k <= 8 ? 8 : (top_k <= 16 ? 16 : 32);  // lanes of a token
  const int32_t k = lane & (width - 1), group = lane & ~(width - 1);
  const int32_t per_warp = 32 / width;
#pragma unroll 1
  for (int32_t first = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * per_warp;
       first < p.shape.num_tokens; first += kRouters * gridDim.x * per_warp) {
    const int32_t token = first + group / width;
    int32_t id = plan::kNone;
    if (token < p.shape.num_tokens && k < top_k) id = p.plan.topk_idx[token * top_k + k];
    const bool in_range = id >= 0 && id < p.shape.num_experts;
    const uint32_t key = in_range ? uint32_t(group) << 16 | uint32_t(id) : ~uint32_t(lane);
    const bool is_first = __ffs(__match_any_sync(~0u, key)) - 1 == lane;
    const uint32_t code =
        in_range && is_first ? uint32_t(id) : (id == plan::kNone ? kNoExpert : kInvalid);
    StampClock(p.group, op.epoch, DecodePhase::kIdsRead);
    uint32_t data[kWordInts];
#pragma unroll
    for (int j = 0; j < kWordInts; ++j) {
      // Lane k has word k of its token.
      const int32_t from = kIdsOfWord * k + 2 * j;
      const uint32_t low = __shfl_sync(~0u, code, group + (from & (width - 1)));
      const uint32_t high = __shfl_sync(~0u, code, group + ((from + 1) & (width - 1)));
      data[j] = (from < top_k ? low : kNoExpert) | (from + 1 < top_k ? high : kNoExpert) << 16;
    }
    if (token >= p.shape.num_tokens || k >= p.slots.id_words) continue;
#pragma unroll 1
    for (int r = 0; r < p.group.num_ranks; ++r) {
      if (TestWithholds(p.group, r, WordKind::kIds)) continue;
      TestDelay(p.group.rank, op.epoch, 16 + r);
      const Envelope envelope = EnvelopeFor(p.group, r);
      const uint32_t none = IsAbsent(p.group, r) ? ~0u : 0;  // it has tokens of no expert
      StampedWord* to = WordsAt(p, op, envelope.to) + p.slots.IdsAt(envelope.from, token) + k;
      StoreWord(to, data[0] | none, data[1] | none, data[2] | none, op.stamp());
    }
  }
  StampClock(p.group, op.epoch, DecodePhase::kIdsSent);
}

// Where the ids of a token are, counted over all ranks.
__device__ __forceinline__ const StampedWord* IdsOf(const DecodeDispatchParams& p, DecodeOp op,
                                                    int32_t token) {
  return WordsAt(p, op, p.group.rank) + int64_t{token} * p.slots.id_words;
}

__device__ __forceinline__ uint32_t IdOf(const uint4 (&words)[kPairWords], int i) {
  const uint4& word = words[i / kIdsOfWord];
  const int j = i % kIdsOfWord;
  const uint32_t pair = j < 2 ? word.x : (j < 4 ? word.y : word.z);
  return j % 2 == 0 ? pair & 0xffff : pair >> 16;
}

// Loads a pair of words of a token; without such a token or words, ids of no expert.
__device__ __forceinline__ void LoadPair(const DecodeDispatchParams& p, DecodeOp op, int32_t token,
                                         int32_t pair, uint4 (&words)[kPairWords]) {
  const bool is_token = token < p.shape.num_ranks * p.shape.num_tokens;
#pragma unroll
  for (int w = 0; w < kPairWords; ++w) {
    const int32_t word = kPairWords * pair + w;
    words[w] = make_uint4(~0u, ~0u, ~0u, op.stamp());
    if (is_token && word < p.slots.id_words) {
      words[w] = ptx::LoadRelaxedSystem16(IdsOf(p, op, token) + word);
    }
  }
}

// The same for the token and those kRouterThreads and more after it, once they are there. False
// once the group has failed.
template <int kTokens>
__device__ __forceinline__ bool AwaitPairs(const DecodeDispatchParams& p, DecodeOp op,
                                           int32_t token, int32_t pair,
                                           uint4 (&words)[kTokens][kPairWords]) {
  DecodeWait wait;
  uint32_t seen;
  int peer;
  do {
    seen = op.stamp();
    int32_t missing = token;
#pragma unroll
    for (int n = 0; n < kTokens; ++n) LoadPair(p, op, token + n * kRouterThreads, pair, words[n]);
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
#pragma unroll
      for (int w = 0; w < kPairWords; ++w) {
        if (words[n][w].w == op.stamp()) continue;
        seen = words[n][w].w;
        missing = token + n * kRouterThreads;
      }
    }
    if (seen == op.stamp() || kMutation == kWithoutStamp) return true;
    // All are loaded again, so that none is kept meanwhile.
    peer = missing / p.shape.num_tokens;
  } while (wait.Continue(p, op, WordKind::kIds, peer));
  wait.Report(p, op, WordKind::kIds, peer, seen);
  return false;
}

}  // namespace
}  // namespace jax_ep::cuda
