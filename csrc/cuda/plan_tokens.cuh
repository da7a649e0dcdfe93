// Steps of the plan's fast kernel (plan_push.cu) over tokens: a thread has a token and its K ids.
#pragma once

#include <cstdint>

#include "cuda/plan_inbox.cuh"

namespace jax_ep::cuda {
namespace {

// `count` of kMaxK values that lie together. What is past them loads as -1.
template <int kMaxK>
__device__ __forceinline__ void LoadValues(int32_t (&values)[kMaxK], const int32_t* from,
                                           int32_t count, bool aligned) {
  if (aligned && count % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kMaxK; k += 4) {
      int4 four = {plan::kNone, plan::kNone, plan::kNone, plan::kNone};
      if (k < count) four = *reinterpret_cast<const int4*>(from + k);
      values[k] = four.x, values[k + 1] = four.y, values[k + 2] = four.z, values[k + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) values[k] = k < count ? from[k] : plan::kNone;
  }
}

template <int kMaxK>
__device__ __forceinline__ void StoreValues(int32_t* to, const int32_t (&values)[kMaxK],
                                            int32_t count, bool aligned) {
  if (aligned && count % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kMaxK; k += 4) {
      if (k >= count) continue;
      *reinterpret_cast<int4*>(to + k) =
          make_int4(values[k], values[k + 1], values[k + 2], values[k + 3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) {
      if (k < count) to[k] = values[k];
    }
  }
}

// Sets ids to -1 that are out of range or repeat an earlier one, as SanitizeToken does; returns how
// many these were.
template <int kMaxK>
__device__ __forceinline__ int32_t CleanIds(int32_t (&ids)[kMaxK], int32_t num_experts) {
  int32_t num_invalid = 0;
#pragma unroll
  for (int k = kMaxK - 1; k >= 0; --k) {  // from the end: what is compared with is as given
    bool valid = static_cast<uint32_t>(ids[k]) < static_cast<uint32_t>(num_experts);
#pragma unroll
    for (int earlier = 0; earlier < k; ++earlier) valid = valid && ids[earlier] != ids[k];
    num_invalid += !valid && ids[k] != plan::kNone;
    ids[k] = valid ? ids[k] : plan::kNone;
  }
  return num_invalid;
}

// Sorts ascending, as unsigned numbers: -1 goes to the end. Bitonic.
template <int kCount>
__device__ __forceinline__ void Sort(int32_t (&values)[kCount]) {
#pragma unroll
  for (int size = 2; size <= kCount; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int j = i ^ stride;
        if (j < i) continue;
        const uint32_t a = static_cast<uint32_t>(values[i]);
        const uint32_t b = static_cast<uint32_t>(values[j]);
        const bool ascending = (i & size) == 0;
        values[i] = static_cast<int32_t>(ascending ? min(a, b) : max(a, b));
        values[j] = static_cast<int32_t>(ascending ? max(a, b) : min(a, b));
      }
    }
  }
}

__device__ __forceinline__ void Mark(const PushShape& n, const Shared& shared, int32_t column,
                                     int32_t t) {
  atomicOr(&shared.cells[column * n.stride + t / 32].mask, 1u << (t % 32));
}

// Entries of a column before token t, counted from its first cell's `before`.
__device__ __forceinline__ int32_t PositionOf(const PushShape& n, const Shared& shared,
                                              int32_t column, int32_t t) {
  const Cell cell = shared.cells[column * n.stride + t / 32];
  return cell.before + __popc(cell.mask & ((1u << (t % 32)) - 1));
}

// Calls body(s, t) for all tokens t of a chunk and s below `sources`, a warp for 32 tokens.
template <typename Body>
__device__ __forceinline__ void ForTokens(const PushShape& n, int32_t sources, int32_t count,
                                          Body body) {
#pragma unroll 1
  for (int32_t i = threadIdx.x / 32; i < sources * n.words; i += kWarps) {
    const int32_t s = n.by_words(i);
    const int32_t t = (i - s * n.words) * 32 + threadIdx.x % 32;
    if (t < count) body(s, t);
  }
}

// A token's local experts at every rank, to that rank; here they go to `here`, [token_words].
template <int kMaxK, int kIdBits>
__device__ __forceinline__ void SendIds(const PushParams& params, uint64_t epoch, int32_t token,
                                        const int32_t (&ids)[kMaxK], uint32_t* here) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  constexpr int kIdsOfWord = 32 / kIdBits;
  constexpr uint32_t kNoId = (1u << kIdBits) - 1;
#pragma unroll 1
  for (int i = 1; i <= p.group.num_ranks; ++i) {  // not all to the same rank at once
    const int r = p.group.rank + i < p.group.num_ranks ? p.group.rank + i
                                                       : p.group.rank + i - p.group.num_ranks;
    uint64_t* to = IdsOf(*p.group.peers[r], p, n, epoch, p.group.rank, token);
    const int32_t first = r * n.num_local;
#pragma unroll
    for (int k = 0; k < kMaxK; k += 2 * kIdsOfWord) {
      if (k >= p.top_k) break;
      uint32_t words[2] = {};
#pragma unroll
      for (int j = 0; j < 2 * kIdsOfWord; ++j) {
        const uint32_t local = static_cast<uint32_t>(ids[k + j] - first);
        const uint32_t id = local < static_cast<uint32_t>(n.num_local) ? local : kNoId;
        words[j / kIdsOfWord] |= id << (j % kIdsOfWord * kIdBits);
      }
      if (r == p.group.rank) {
        *reinterpret_cast<uint2*>(here + k / kIdsOfWord) = make_uint2(words[0], words[1]);
      } else {
        SendPair(to + k / kIdsOfWord, epoch, words[0], words[1]);
      }
    }
  }
}

// Cleans the chunk's entries, sends them, and marks them in the cells of all columns. `ids` are
// those of the thread's first token, as given.
template <int kMaxK, int kIdBits, typename Params>
__device__ __forceinline__ void CleanTokens(const Params& params, const Shared& shared,
                                            uint64_t epoch, Chunk chunk, int32_t (&ids)[kMaxK]) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  int32_t num_invalid = 0;
#pragma unroll 1
  for (int32_t t = threadIdx.x; t < chunk.count; t += kThreads) {
    const int32_t token = chunk.begin + t;
    const int64_t first = int64_t{token} * p.top_k;
    if (t >= kThreads) LoadValues(ids, p.topk_idx + first, p.top_k, params.aligned);
    num_invalid += CleanIds(ids, p.num_experts);
    SendIds<kMaxK, kIdBits>(params, epoch, token, ids, shared.ids + t * n.token_words);
    const bool by_token = Params::kLayout == Layout::kToken;
    uint32_t ranks = 0;  // of layout "token": marks of one rank would meet in one word
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) {
      if (ids[k] == plan::kNone) continue;
      if (by_token) ranks |= 1u << n.by_num_local(ids[k]);
      Mark(n, shared, by_token ? p.group.num_ranks + ids[k] : ids[k], t);
    }
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) Mark(n, shared, __ffs(ranks) - 1, t);
    StoreValues(p.topk + first, ids, p.top_k, params.aligned);
    StoreValues(shared.records + t * kMaxK, ids, kMaxK, true);
  }
  if (num_invalid != 0) atomicAdd(&shared.sent[n.columns], num_invalid);
}

// Own entries get their position in the chunk: records become column | position << 16. Those that
// are here are listed.
template <int kMaxK, typename Params>
__device__ __forceinline__ void PlaceOwnEntries(const Params& params, const Shared& shared,
                                                Chunk chunk) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  const bool by_token = Params::kLayout == Layout::kToken;
  ForTokens(n, 1, chunk.count, [&](int32_t, int32_t t) {
    int32_t records[kMaxK];
    LoadValues(records, shared.records + t * kMaxK, kMaxK, true);
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) {
      if (records[k] == plan::kNone) continue;
      const int32_t column = by_token ? n.by_num_local(records[k]) : records[k];
      const int32_t position = PositionOf(n, shared, column, t);
      records[k] = column | position << 16;
      const int32_t slot = column - p.group.rank * n.here;
      if (static_cast<uint32_t>(slot) >= static_cast<uint32_t>(n.here)) continue;
      // In layout "token" all of a token's entries here say the same.
      shared.list[shared.firsts[slot] + position] =
          static_cast<uint32_t>(by_token ? t : t * p.top_k + k) | static_cast<uint32_t>(slot) << 16;
    }
    StoreValues(shared.records + t * kMaxK, records, kMaxK, true);
  });
}

// The rows here of a source's token, ascending, in layout "expert".
template <int kMaxK>
__device__ __forceinline__ void StoreRecvRows(const PushParams& params, int64_t token,
                                              int32_t (&rows)[kMaxK]) {
  const int32_t num_rows = plan::Min(params.plan.top_k, params.shape.num_local);
  Sort(rows);
  StoreValues(params.plan.recv_rows + token * num_rows, rows, num_rows, params.aligned);
}

// The rows of own entries on all ranks, and those here by token.
template <int kMaxK, typename Params>
__device__ __forceinline__ void WriteOwnRows(const Params& params, const Shared& shared,
                                             Chunk chunk) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  ForTokens(n, 1, chunk.count, [&](int32_t, int32_t t) {
    int32_t rows[kMaxK];
    LoadValues(rows, shared.records + t * kMaxK, kMaxK, true);
    uint32_t here = 0;  // a bit an entry
    int32_t row_here = plan::kNone;
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) {
      if (rows[k] == plan::kNone) continue;
      const int32_t nth = rows[k] & 0xffff;
      const ColumnRows column = shared.rows[nth];
      const int32_t row = column.first + static_cast<int32_t>(static_cast<uint32_t>(rows[k]) >> 16);
      rows[k] = row < column.limit ? row : plan::kNone;
      if (static_cast<uint32_t>(nth - p.group.rank * n.here) >= static_cast<uint32_t>(n.here)) {
        continue;
      }
      here |= 1u << k;
      row_here = rows[k];
    }
    const int32_t own = chunk.begin + t;
    StoreValues(p.dest_row + int64_t{own} * p.top_k, rows, p.top_k, params.aligned);
    const int64_t token = int64_t{p.group.rank} * p.num_tokens + own;
    if constexpr (Params::kLayout == Layout::kToken) {
      p.recv_rows[token] = row_here;  // of all entries here
    } else {
#pragma unroll
      for (int k = 0; k < kMaxK; ++k) rows[k] = here >> k & 1 ? rows[k] : plan::kNone;
      StoreRecvRows(params, token, rows);
    }
  });
}

// Local expert k of a token's message.
template <int kIdBits>
__device__ __forceinline__ int32_t UnpackId(const uint32_t (&words)[2], int k) {
  constexpr int kIdsOfWord = 32 / kIdBits;
  return static_cast<int32_t>(words[k / kIdsOfWord] >> (k % kIdsOfWord * kIdBits) &
                              ((1u << kIdBits) - 1));
}

// Calls use(k, local expert) for the entries of a token that are here. Ids that no expert has are
// skipped: they stand for none, or come from a rank at another op, which is noticed later.
template <int kIdBits, typename Use>
__device__ __forceinline__ void ForIds(const PushShape& n, const uint32_t (&words)[2], int first_k,
                                       Use use) {
#pragma unroll
  for (int j = 0; j < 64 / kIdBits; ++j) {
    const int32_t id = UnpackId<kIdBits>(words, j);
    if (id < n.num_local) use(first_k + j, id);
  }
}

// Takes the ids of the chunk's tokens of the batch's peers, and marks them in the cells of their
// slots.
template <int kIdBits, typename Params>
__device__ __forceinline__ bool TakeIds(const Params& params, const Shared& shared, uint64_t epoch,
                                        Chunk chunk, Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  bool ok = true;
  const int num_own = batch.NumOwn();
  ForTokens(n, batch.count - num_own, chunk.count, [&](int32_t nth, int32_t t) {
    const int32_t s = num_own + nth;
    const int source = batch.Source(p.group, s);
    const uint64_t* from = IdsOf(Own(p.group), p, n, epoch, source, chunk.begin + t);
    uint32_t* ids = shared.ids + (s * n.chunk + t) * n.token_words;
    bool is_here = false;
#pragma unroll 1
    for (int32_t w = 0; w < n.token_words; w += 2) {
      Pair pair;
      pair.Load(from + w);
      if (!ok || !pair.Await(p.group, epoch, source, from + w)) {
        ok = false;
        return;
      }
      const uint32_t words[2] = {pair.FirstData(), pair.SecondData()};
      *reinterpret_cast<uint2*>(ids + w) = make_uint2(words[0], words[1]);
      ForIds<kIdBits>(n, words, 0, [&](int, int32_t id) {
        is_here = true;
        if (Params::kLayout == Layout::kExpert) Mark(n, shared, s * n.here + id, t);
      });
    }
    if (Params::kLayout == Layout::kToken && is_here) Mark(n, shared, s, t);
  });
  return ok;
}

// Lists the entries whose ids were taken, by slot.
template <int kIdBits, typename Params>
__device__ __forceinline__ void ListEntries(const Params& params, const Shared& shared, Chunk chunk,
                                            Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  const int num_own = batch.NumOwn();
  ForTokens(n, batch.count - num_own, chunk.count, [&](int32_t nth, int32_t t) {
    const int32_t s = num_own + nth;
    const uint32_t* ids = shared.ids + (s * n.chunk + t) * n.token_words;
    bool is_here = false;
#pragma unroll 1
    for (int32_t w = 0; w < n.token_words; w += 2) {
      const uint2 both = *reinterpret_cast<const uint2*>(ids + w);
      const uint32_t words[2] = {both.x, both.y};
      ForIds<kIdBits>(n, words, w * (32 / kIdBits), [&](int k, int32_t id) {
        is_here = true;
        if (Params::kLayout == Layout::kToken) return;
        const int32_t slot = s * n.here + id;
        shared.list[PositionOf(n, shared, slot, t)] =
            static_cast<uint32_t>(t * p.top_k + k) | static_cast<uint32_t>(slot) << 16;
      });
    }
    if (Params::kLayout != Layout::kToken || !is_here) return;
    shared.list[PositionOf(n, shared, s, t)] = static_cast<uint32_t>(t) | static_cast<uint32_t>(s)
                                                                              << 16;
  });
}

}  // namespace
}  // namespace jax_ep::cuda
