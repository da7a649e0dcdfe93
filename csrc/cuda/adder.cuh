// Sums of rows by one warp, from a list of terms, through a ring of stages in shared memory.
//
// A warp makes one sum after the other. It loads the terms by bulk copies, several terms ahead,
// across the bounds of sums.
#pragma once

#include <cstdint>

#include "cuda/combine.h"
#include "cuda/ptx.cuh"
#include "cuda/vectors.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

constexpr int kAdderWarps = 16;  // of a block
constexpr int kStages = 6;
constexpr int kStageBytes = 2048;
constexpr int kMaxTerms = 32;

// A segment are the terms of one rank, whose sum is rounded.
constexpr uint32_t kEndsSegment = 1u << 16;
constexpr uint32_t kIsSegment = 1u << 17;  // on its own

// One term of a sum; written and read at once, as are stages.
struct alignas(16) Term {
  const char* row;
  float factor;
  uint32_t flags;

  __device__ static Term Of(const char* row, float factor, bool begins, bool ends) {
    return {row, factor, ends ? (begins ? kEndsSegment | kIsSegment : kEndsSegment) : 0u};
  }
};

// What a warp's ring keeps for each stage.
struct alignas(16) Stage {
  char* output;  // where the finished sum goes, if this is its last term; else null
  float factor;
  uint32_t bytes_and_flags;

  __device__ bool Has(uint32_t flag) const { return (bytes_and_flags & flag) != 0; }
  __device__ int32_t bytes() const { return bytes_and_flags & 0xffff; }
};

struct WarpMemory {
  uint64_t barriers[kStages];
  Stage stages[kStages];
  Term terms[kMaxTerms];
};

// Shared memory of the adders of a block.
constexpr int kAdderBytes =
    kAdderWarps * (kStages * kStageBytes + static_cast<int>(sizeof(WarpMemory)));

// Adds rows for one warp. All methods are called by all lanes together. With kOneSegment, all terms
// of a sum are of one rank; without kWeighted, factors are not looked at.
template <typename T, bool kOneSegment, bool kWeighted>
class Adder {
 public:
  __device__ Adder(const CombineParams& p, char* shared) : p_(p) {
    const int32_t warp = threadIdx.x / 32;
    buffers_ = shared + warp * kStages * kStageBytes;
    memory_ = reinterpret_cast<WarpMemory*>(shared + kAdderWarps * kStages * kStageBytes) + warp;
    if (Lane() == 0) {
      for (uint64_t& barrier : memory_->barriers) ptx::InitBarrier(&barrier, 1);
      ptx::FenceBarrierInit();
      ptx::FenceProxyAsyncGlobal();
    }
    __syncwarp();
  }

  // The list that the next sum is made from; valid until Sum returns.
  __device__ Term* terms() { return memory_->terms; }

  // Starts the sum of the first `num_terms` terms, as long as a row, to `output`. Waits for stages
  // by finishing earlier terms.
  __device__ void Sum(int32_t num_terms, char* output) {
    __syncwarp();
    for (int32_t offset = 0; offset < RowBytes(); offset += kStageBytes) {
      const int32_t bytes = plan::Min(kStageBytes, RowBytes() - offset);
      for (int32_t i = 0; i < num_terms; ++i) {
        if (num_loaded_ - num_added_ == kStages) Add();
        if (Lane() == 0) {
          const int32_t s = num_loaded_ % kStages;
          const Term term = memory_->terms[i];
          char* target = i + 1 == num_terms ? output + offset : nullptr;
          memory_->stages[s] = {target, term.factor, bytes | term.flags};
          ptx::ArriveExpectBytes(&memory_->barriers[s], bytes);
          ptx::BulkLoad(buffers_ + s * kStageBytes, term.row + offset, bytes,
                        &memory_->barriers[s]);
        }
        ++num_loaded_;
      }
    }
    __syncwarp();
  }

  // How many terms were started so far: a mark for FinishUntil.
  __device__ int32_t num_started() const { return num_loaded_; }

  // Finishes the sums whose terms were started before `mark`.
  __device__ void FinishUntil(int32_t mark) {
    while (num_added_ < mark) Add();
  }

  // Finishes all sums that were started.
  __device__ void Finish() { FinishUntil(num_loaded_); }

 private:
  static constexpr int kVectorBytes = kVector * sizeof(T);
  static constexpr int kPerLane = kStageBytes / kVectorBytes / 32;

  __device__ static int32_t Lane() { return threadIdx.x % 32; }
  __device__ int32_t RowBytes() const { return p_.hidden * static_cast<int32_t>(sizeof(T)); }

  // Adds the oldest term that is loaded.
  __device__ void Add() {
    const int32_t s = num_added_ % kStages;
    const uint32_t parity = (num_added_ / kStages) & 1;
    while (!ptx::TryWaitParity(&memory_->barriers[s], parity)) {
    }
    const Stage stage = memory_->stages[s];
    const T* row = reinterpret_cast<const T*>(buffers_ + s * kStageBytes);
    // Lanes past the end of a short chunk add what lies there and store nothing.
    RawVector<T> raw[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      raw[i] = *reinterpret_cast<const RawVector<T>*>(row + (Lane() + 32 * i) * kVector);
    }
    if (!kOneSegment && !kWeighted && stage.Has(kIsSegment)) {  // its sum needs no rounding
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        float term[kVector];
        Unpack(raw[i], term);
#pragma unroll
        for (int j = 0; j < kVector; ++j) total_[i][j] = __fadd_rn(total_[i][j], term[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        float term[kVector];
        Unpack(raw[i], term);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (kWeighted) term[j] = __fmul_rn(term[j], stage.factor);
          segment_[i][j] = __fadd_rn(segment_[i][j], term[j]);
        }
      }
      if (!kOneSegment && stage.Has(kEndsSegment)) CloseSegment();
    }
    if (stage.output != nullptr) StoreTotal(stage);
    ++num_added_;
    __syncwarp();  // the stage may be loaded again
  }

  // Adds the segment, rounded, to the total.
  __device__ void CloseSegment() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      float rounded[kVector];
      Unpack(Pack<T>(segment_[i]), rounded);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        total_[i][j] = __fadd_rn(total_[i][j], rounded[j]);
        segment_[i][j] = 0.0f;
      }
    }
  }

  __device__ void StoreTotal(const Stage& stage) {
    float (&sum)[kPerLane][kVector] = kOneSegment ? segment_ : total_;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t offset = (Lane() + 32 * i) * kVectorBytes;
      StorePart(reinterpret_cast<T*>(stage.output + offset), Pack<T>(sum[i]),
                stage.bytes() - offset);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[i][j] = 0.0f;
    }
  }

  const CombineParams& p_;
  char* buffers_;
  WarpMemory* memory_;
  uint32_t num_loaded_ = 0;
  uint32_t num_added_ = 0;
  float segment_[kPerLane][kVector] = {};
  float total_[kPerLane][kVector] = {};
};

}  // namespace jax_ep::cuda
