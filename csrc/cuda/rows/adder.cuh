// Sums of rows by one warp, in registers, from a list of terms.
//
// A *strip* is 16 bytes for each lane. The warp goes through a sum a few strips at a time: it loads
// those strips of all terms, and then adds them in the order of the list. The loads of all warps of
// a block together keep the SM's way to memory full. (With few SMs, bulk copies into shared memory
// are slower: one lane must start them, and every vector makes one more trip.) The number of terms
// is known at compile time, up to kAdderLoads, because with few SMs the limit is the issue of
// instructions and not memory.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "cuda/rows/vectors.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

constexpr int kAdderWarps = 32;  // of a block
constexpr int kAdderLoads = 8;   // of a lane, in flight at a time
constexpr int kStripBytes = 32 * 16;
constexpr int kMaxTerms = 32;

// One term of a sum; written and read at once.
struct alignas(16) Term {
  const char* row;  // in global memory, or in shared memory
  float factor;
};

// The sums of the channels of vectors. Without kWeighted, factors are not used.
template <typename T, bool kWeighted>
class VectorSum {
 public:
  __device__ __forceinline__ void Add(uint4 raw, float factor) {
    float channels[kChannels];
    Unpack<T>(raw, channels);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      sum_[j] = __fadd_rn(sum_[j], kWeighted ? __fmul_rn(channels[j], factor) : channels[j]);
    }
  }
  __device__ __forceinline__ uint4 Rounded() const { return Pack16<T>(sum_); }

 private:
  static constexpr int kChannels = kWordsChannels<T>;
  float sum_[kChannels] = {};
};

// Behind a sum's loads. With factors the compiler is short of registers, and would start some of
// the loads only when others are added; it moves none across this.
template <bool kWeighted>
__device__ __forceinline__ void LoadsAreStarted() {
  if (kWeighted) __syncwarp();
}

// kStrips strips of kTerms terms, from byte `at` on, which is each lane's own. Lanes past `end`
// load what the last one does.
template <typename T, bool kWeighted, int kTerms, int kStrips>
__device__ __forceinline__ void AddStrips(const Term* terms, int32_t at, int32_t end,
                                          char* output) {
  uint4 raw[kTerms][kStrips];
  const int32_t from = kStrips == 1 ? plan::Min(at, end - 16) : at;
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
    const char* row = terms[t].row + from;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) raw[t][s] = ptx::LoadCacheGlobal(row + s * kStripBytes);
  }
  LoadsAreStarted<kWeighted>();
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    VectorSum<T, kWeighted> sum;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) sum.Add(raw[t][s], kWeighted ? terms[t].factor : 1.0f);
    if (kStrips > 1 || at < end) {
      *reinterpret_cast<uint4*>(output + at + s * kStripBytes) = sum.Rounded();
    }
  }
}

// A number of terms known at compile time: kStrips strips at a time, then fewer.
template <typename T, bool kWeighted, int kTerms, int kStrips>
__device__ __forceinline__ void AddFew(const Term* terms, int32_t begin, int32_t end,
                                       char* output) {
  int32_t at = begin + threadIdx.x % 32 * 16;
#pragma unroll 1
  for (; begin + (kStrips > 1 ? kStrips * kStripBytes : 1) <= end; begin += kStrips * kStripBytes) {
    AddStrips<T, kWeighted, kTerms, kStrips>(terms, at, end, output);
    at += kStrips * kStripBytes;
  }
  if constexpr (kStrips > 1) {
    AddFew<T, kWeighted, kTerms, (kStrips > 4 ? kStrips / 2 : 1)>(terms, begin, end, output);
  }
}

// The strips of so many terms that are loaded at a time: a power of two.
__host__ __device__ constexpr int StripsOf(int terms) {
  return terms <= 1 ? kAdderLoads : terms <= 2 ? kAdderLoads / 2 : terms <= 4 ? kAdderLoads / 4 : 1;
}

template <typename T, bool kWeighted>
__device__ __forceinline__ void AddMany(const Term* terms, int32_t count, int32_t begin,
                                        int32_t end, char* output) {
#pragma unroll 1
  for (; begin < end; begin += kStripBytes) {
    const int32_t at = begin + threadIdx.x % 32 * 16;
    VectorSum<T, kWeighted> sum;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += kAdderLoads) {
      uint4 raw[kAdderLoads];
#pragma unroll
      for (int t = 0; t < kAdderLoads; ++t) {
        // Loaded in any case, because a conditional load would keep its registers from other code.
        const Term& term = terms[plan::Min(first + t, count - 1)];
        raw[t] = ptx::LoadCacheGlobal(term.row + plan::Min(at, end - 16));
      }
      LoadsAreStarted<kWeighted>();
#pragma unroll
      for (int t = 0; t < kAdderLoads; ++t) {
        if (first + t < count) sum.Add(raw[t], kWeighted ? terms[first + t].factor : 1.0f);
      }
    }
    if (at < end) *reinterpret_cast<uint4*>(output + at) = sum.Rounded();
  }
}

// Adds bytes `begin` to `end` (multiples of 16) of the terms, and stores the rounded sum at the
// same bytes of `output`. Called by all lanes together; a lane stores what it loaded. (Each file
// has its own function, which takes no more registers than the file's kernels may have.)
template <typename T, bool kWeighted>
static __device__ __noinline__ void AddTerms(const Term* terms, int32_t count, int32_t begin,
                                             int32_t end, char* output) {
  ptx::CompilerFence();  // a term may be what this lane has stored
  switch (count) {
#define JAX_EP_ADD_FEW(N) \
  case N:                 \
    return AddFew<T, kWeighted, N, StripsOf(N)>(terms, begin, end, output)
    JAX_EP_ADD_FEW(1);
    JAX_EP_ADD_FEW(2);
    JAX_EP_ADD_FEW(3);
    JAX_EP_ADD_FEW(4);
    JAX_EP_ADD_FEW(5);
    JAX_EP_ADD_FEW(6);
    JAX_EP_ADD_FEW(7);
    JAX_EP_ADD_FEW(8);
#undef JAX_EP_ADD_FEW
    default:
      return AddMany<T, kWeighted>(terms, count, begin, end, output);
  }
}

}  // namespace jax_ep::cuda
