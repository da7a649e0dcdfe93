// How the plan's fast kernel (push.cu) spreads tokens over threads: kMaxK / kIdsOfLane lanes side
// by side hold the ids of a token.
#pragma once

#include <cstdint>

#include "cuda/plan/inbox.cuh"

namespace jax_ep::cuda {
namespace {

template <int kMaxK>
constexpr int kLanes = kMaxK / kIdsOfLane;  // of a token

// The first k of a lane.
template <int kMaxK>
__device__ __forceinline__ int32_t FirstK() {
  return threadIdx.x % kLanes<kMaxK> * kIdsOfLane;
}

// This thread's token of its chunk in the warp's task: see ForTokens.
template <int kMaxK>
__device__ __forceinline__ int32_t TokenOfTask(int32_t task) {
  constexpr int kTokens = 32 / kLanes<kMaxK>;
  return task * kTokens + static_cast<int32_t>(threadIdx.x) % 32 / kLanes<kMaxK>;
}

// Calls body(s, t) for all tokens t of a chunk and s below `sources`, by whole warps; so t may be
// past the chunk's last token.
template <int kMaxK, typename Body>
__device__ __forceinline__ void ForTokens(const PushShape& n, int32_t sources, Body body) {
#pragma unroll 1
  for (int32_t i = threadIdx.x / 32; i < sources * n.tasks; i += kWarps) {
    const int32_t s = n.by_tasks(i);
    body(s, TokenOfTask<kMaxK>(i - s * n.tasks));
  }
}

// The lane's share of the `count` values of a token, or -1. `inside`: whether the token exists.
template <int kMaxK>
__device__ __forceinline__ void LoadValues(int32_t (&values)[kIdsOfLane], const int32_t* from,
                                           int32_t count, bool aligned, bool inside) {
  const int32_t first = FirstK<kMaxK>();
  if (aligned && count % kIdsOfLane == 0) {
    int4 four = {plan::kNone, plan::kNone, plan::kNone, plan::kNone};
    if (inside && first < count) four = *reinterpret_cast<const int4*>(from + first);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      values[j] = inside && first + j < count ? from[first + j] : plan::kNone;
    }
  }
}

template <int kMaxK>
__device__ __forceinline__ void StoreValues(int32_t* to, const int32_t (&values)[kIdsOfLane],
                                            int32_t count, bool aligned) {
  const int32_t first = FirstK<kMaxK>();
  if (aligned && count % kIdsOfLane == 0) {
    if (first < count) {
      *reinterpret_cast<int4*>(to + first) = make_int4(values[0], values[1], values[2], values[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      if (first + j < count) to[first + j] = values[j];
    }
  }
}

// Sets ids that are out of range or repeat an earlier one to -1, as SanitizeToken does, and returns
// their number. Called by whole warps.
template <int kMaxK>
__device__ __forceinline__ int32_t CleanIds(int32_t (&ids)[kIdsOfLane], int32_t num_experts) {
  const int lane = threadIdx.x % kLanes<kMaxK>;
  bool valid[kIdsOfLane];
#pragma unroll
  for (int j = 0; j < kIdsOfLane; ++j) {
    valid[j] = static_cast<uint32_t>(ids[j]) < static_cast<uint32_t>(num_experts);
#pragma unroll
    for (int earlier = 0; earlier < j; ++earlier) valid[j] = valid[j] && ids[earlier] != ids[j];
  }
#pragma unroll 1
  for (int offset = 1; offset < kLanes<kMaxK>; ++offset) {
#pragma unroll
    for (int earlier = 0; earlier < kIdsOfLane; ++earlier) {
      int32_t other = __shfl_up_sync(~0u, ids[earlier], offset, kLanes<kMaxK>);
      if (lane < offset) other = plan::kNone;
#pragma unroll
      for (int j = 0; j < kIdsOfLane; ++j) valid[j] = valid[j] && other != ids[j];
    }
  }
  int32_t num_invalid = 0;
#pragma unroll
  for (int j = 0; j < kIdsOfLane; ++j) {
    num_invalid += !valid[j] && ids[j] != plan::kNone;
    if (!valid[j]) ids[j] = plan::kNone;
  }
  return num_invalid;
}

// Sorts a token's values ascending, as unsigned numbers: -1 goes to the end. Bitonic. Called by
// whole warps.
template <int kMaxK>
__device__ __forceinline__ void Sort(int32_t (&values)[kIdsOfLane]) {
  const int32_t first = FirstK<kMaxK>();
#pragma unroll
  for (int size = 2; size <= kMaxK; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int j = 0; j < kIdsOfLane; ++j) {
        const bool ascending = size == kMaxK || ((first + j) & size) == 0;
        const auto a = static_cast<uint32_t>(values[j]);
        if (stride >= kIdsOfLane) {
          const uint32_t b = __shfl_xor_sync(~0u, a, stride / kIdsOfLane);
          const bool is_low = (first & stride) == 0;
          values[j] = static_cast<int32_t>(is_low == ascending ? min(a, b) : max(a, b));
        } else if ((j & stride) == 0) {
          const auto b = static_cast<uint32_t>(values[j ^ stride]);
          values[j] = static_cast<int32_t>(ascending ? min(a, b) : max(a, b));
          values[j ^ stride] = static_cast<int32_t>(ascending ? max(a, b) : min(a, b));
        }
      }
    }
  }
}

__device__ __forceinline__ Cell& CellOf(const PushShape& n, Cell* cells, int32_t column,
                                        int32_t t) {
  return cells[column * n.stride + t / 32];
}

__device__ __forceinline__ void Mark(const PushShape& n, Cell* cells, int32_t column, int32_t t) {
  atomicOr(&CellOf(n, cells, column, t).mask, 1u << (t % 32));
}

// The same for all tokens of a warp at once, because their marks in one column are in one word.
// Tokens with `is_in` are in the column. Called by whole warps.
__device__ __forceinline__ void MarkTogether(const PushShape& n, Cell* cells, int32_t column,
                                             int32_t t, bool is_in) {
  const uint32_t mask = __reduce_or_sync(~0u, static_cast<uint32_t>(is_in) << (t % 32));
  if (threadIdx.x % 32 == 0 && mask != 0) atomicOr(&CellOf(n, cells, column, t).mask, mask);
}

// Entries of the cell's column before token t.
__device__ __forceinline__ int32_t PositionOf(Cell cell, int32_t t) {
  return cell.before + __popc(cell.mask & ((1u << (t % 32)) - 1));
}

// How a lane's ids are packed in a message: local experts in kIdBits bits each. An id that no local
// expert has stands for none, or comes from a rank at another op, which is noticed later.
template <int kMaxK, int kIdBits>
struct Message {
  static constexpr int kIdsOfWord = 32 / kIdBits;
  static constexpr int kWords = kIdsOfLane / kIdsOfWord;
  uint32_t words[kWords];

  __device__ __forceinline__ void Pack(const int32_t (&ids)[kIdsOfLane], int32_t first_expert) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = 0;
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      const uint32_t local = min(static_cast<uint32_t>(ids[j] - first_expert), kNoId);
      words[j / kIdsOfWord] |= local << (j % kIdsOfWord * kIdBits);
    }
  }
  __device__ __forceinline__ void SetNone() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = ~0u;
  }
  __device__ __forceinline__ int32_t Id(int j) const {
    return static_cast<int32_t>(words[j / kIdsOfWord] >> (j % kIdsOfWord * kIdBits) & kNoId);
  }
  // To and from shared memory, where the words of a token are neighbours.
  __device__ __forceinline__ void Store(uint32_t* to) const {
    if constexpr (kWords == 1) {
      *to = words[0];
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
  }
  __device__ __forceinline__ void Load(const uint32_t* from) {
    if constexpr (kWords == 1) {
      words[0] = *from;
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      words[0] = both.x, words[1] = both.y;
    }
  }

  // Where a lane's words are among those of its token.
  __device__ __forceinline__ static int32_t First() { return FirstK<kMaxK>() / kIdsOfWord; }

 private:
  static constexpr uint32_t kNoId = (1u << kIdBits) - 1;
};

// Two numbers below 2^16 in one.
__device__ __forceinline__ uint32_t Halves(int32_t low, int32_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

}  // namespace
}  // namespace jax_ep::cuda
