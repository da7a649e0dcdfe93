// Sums of rows by one warp whose loads go through shared memory, and sums of such sums.
//
// A *piece* is a few strips of a term (rows/adder.cuh). Asynchronous copies fill a ring of pieces
// in shared memory in the order in which one loop adds them: the first piece of each term, the
// second one of each term, and so on. So a full ring is on its way all the time, whatever the
// number of terms, without registers for it. Where warps add different numbers of terms, each
// number at a time in a loop of its own (as in rows/adder.cuh) makes an SM wait for instructions,
// the more the more loads a loop has. One loop with many loads on their way has neither problem.
//
// A sum that is a term of another one never leaves the registers.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "cuda/rows/adder.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

// One term of a streamed sum. What else there is to do: before it is added, and after.
struct alignas(16) StreamTerm {
  enum : uint32_t {
    kHeldBefore = 1,  // first add the sum that is held
    kHeldAfter = 2,   // then add the sum that is held
    kHold = 4,        // this sum ends: round it and hold it
    kStore = 8,       // this sum ends: round it and store it
  };
  const char* row;  // in global memory
  float factor;
  uint32_t what;
};

// A list of terms in shared memory: those of a sum, of a sum that has that one as a term, and so
// on. By one warp.
//
// A sum of one term is left out, and its row is a term of the next sum instead: that one begins
// with +0 as well, so that it is the same.
class SumTerms {
 public:
  __device__ explicit SumTerms(StreamTerm* terms) : terms_(terms) {}

  __device__ bool is_empty() const { return count_ == 0; }
  // The row that the sum is the same as; null if there is none.
  __device__ const char* row() const { return is_row_ ? terms_[0].row : nullptr; }

  // Begins with this row, if it is not null.
  __device__ void BeginWith(const char* row) {
    __syncwarp();  // the list is free
    count_ = is_row_ = row != nullptr;
    if (is_row_ && threadIdx.x % 32 == 0) terms_[0] = {row, 1.0f, 0};
    __syncwarp();
  }

  // The sum becomes that of `count` terms and, as the `link`-th of them all, what it has been; a
  // sum that has been nothing is no term. `write(terms, skips)` writes the terms, by the lanes that
  // have them: the i-th to terms[i], or if it comes at or after `skips`, to terms[i + 1]. Factors
  // count if `has_factors`.
  template <typename Write>
  __device__ void Append(int32_t count, int32_t link, bool has_factors, Write&& write) {
    if (count == 0) return;
    const bool is_first = threadIdx.x % 32 == 0;
    const char* const row = this->row();
    __syncwarp();  // all have read it, and the list is free
    StreamTerm* const terms = terms_ + (is_row_ ? 0 : count_);
    write(terms, is_row_ ? link : count);
    __syncwarp();
    if (is_first && is_row_) terms[link] = {row, 1.0f, 0};
    if (is_first && count_ > 0 && !is_row_) {
      terms[plan::Min(link, count - 1)].what =
          link < count ? StreamTerm::kHeldBefore : StreamTerm::kHeldAfter;
    }
    const bool is_one = count_ == 0 && count == 1 && !has_factors;
    count_ = static_cast<int32_t>(terms - terms_) + count + is_row_;
    is_row_ = is_one;
    if (is_first && !is_one) terms_[count_ - 1].what |= StreamTerm::kHold;
    __syncwarp();
  }

  // Ends the list; the number of terms.
  __device__ int32_t End() {
    if (threadIdx.x % 32 == 0 && count_ > 0) {
      uint32_t& what = terms_[count_ - 1].what;
      what = (what & ~static_cast<uint32_t>(StreamTerm::kHold)) | StreamTerm::kStore;
    }
    __syncwarp();
    return count_;
  }

 private:
  StreamTerm* terms_;
  int32_t count_ = 0;
  bool is_row_ = false;
};

// The ring of a warp: pieces of terms.
constexpr int kStreamAhead = 5;  // pieces on their way, besides the one that is added
constexpr int kPieceStrips = 4;
constexpr int kPieceBytes = kPieceStrips * kStripBytes;
constexpr int kStreamRingBytes = (kStreamAhead + 1) * kPieceBytes;

// Stores `bytes` (a multiple of 16) of the sum of a list that has ended; zeros if it is empty. By
// all lanes together. (Each file has its own function, which takes no more registers than the
// file's kernels may have. It is not inlined, so that a kernel has this loop once.)
template <typename T, bool kWeighted>
static __device__ __noinline__ void StoreStreamedSum(const StreamTerm* terms, int32_t count,
                                                     int32_t bytes, char* ring, char* output) {
  const int32_t lane_at = threadIdx.x % 32 * 16;
  if (count == 0) {
#pragma unroll 1
    for (int32_t at = lane_at; at < bytes; at += kStripBytes) {
      *reinterpret_cast<uint4*>(output + at) = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  ptx::CompilerFence();  // a row may be what this lane has stored
  ring += lane_at;
  const StreamTerm* const end = terms + count;
  // The next piece to load.
  const StreamTerm* load_term = terms;
  int32_t load_at = lane_at, load_slot = 0;
  const auto load = [&] {
    if (load_at - lane_at < bytes) {
      const char* const row = load_term->row;
      char* const to = ring + load_slot;
      if (load_at - lane_at + kPieceBytes <= bytes) {
#pragma unroll
        for (int s = 0; s < kPieceStrips; ++s) {
          ptx::CopyToShared16(to + s * kStripBytes, row + load_at + s * kStripBytes);
        }
      } else {  // lanes past the end load what the last one does
#pragma unroll 1
        for (int s = 0; s < kPieceStrips; ++s) {
          ptx::CopyToShared16(to + s * kStripBytes,
                              row + plan::Min(load_at + s * kStripBytes, bytes - 16));
        }
      }
      load_slot = load_slot + kPieceBytes < kStreamRingBytes ? load_slot + kPieceBytes : 0;
      if (++load_term == end) load_term = terms, load_at += kPieceBytes;
    }
    ptx::CommitCopies();
  };
#pragma unroll 1
  for (int i = 0; i < kStreamAhead; ++i) load();
  VectorSum<T, kWeighted> sums[kPieceStrips];
  uint4 held[kPieceStrips] = {};
  const auto add_held = [&] {
#pragma unroll
    for (int s = 0; s < kPieceStrips; ++s) sums[s].Add(held[s], 1.0f);
  };
  int32_t slot = 0;
  const StreamTerm* term = terms;
#pragma unroll 1
  for (int32_t at = lane_at; at - lane_at < bytes;) {
    load();
    ptx::WaitCopies<kStreamAhead>();
    uint4 raw[kPieceStrips];
#pragma unroll
    for (int s = 0; s < kPieceStrips; ++s) {
      raw[s] = *reinterpret_cast<const uint4*>(ring + slot + s * kStripBytes);
    }
    const uint32_t what = term->what;
    const float factor = kWeighted ? term->factor : 1.0f;
    if (++term == end) term = terms;
    if ((what & StreamTerm::kHeldBefore) != 0) add_held();
#pragma unroll
    for (int s = 0; s < kPieceStrips; ++s) sums[s].Add(raw[s], factor);
    if (what > StreamTerm::kHeldBefore) {
      if ((what & StreamTerm::kHeldAfter) != 0) add_held();
#pragma unroll
      for (int s = 0; s < kPieceStrips; ++s) {
        held[s] = sums[s].Rounded();
        sums[s] = VectorSum<T, kWeighted>();
      }
      if ((what & StreamTerm::kStore) != 0) {
#pragma unroll
        for (int s = 0; s < kPieceStrips; ++s) {
          const int32_t to = at + s * kStripBytes;
          if (to < bytes) *reinterpret_cast<uint4*>(output + to) = held[s];
        }
        at += kPieceBytes;
      }
    }
    slot = slot + kPieceBytes < kStreamRingBytes ? slot + kPieceBytes : 0;
  }
  ptx::WaitCopies<0>();
}

}  // namespace jax_ep::cuda
