// Parts of rows in shared memory: brought from this rank's input or out of the inbox, sent to a
// peer, and delivered to all of their rows. A warp does a part.
//
// In its *stage* a part has its bytes, then its scales, then the token's weights if it is the
// row's last part; each of the three begins a word.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/decode/dispatch.h"
#include "cuda/decode/handshake.cuh"
#include "cuda/rows/float8.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int32_t kStageBytes = 2048;
// Words of a part, at most, for each lane.
constexpr int kLaneWords = 6;
static_assert(kPartScales % 2 == 0, "parts end between halves of words of packed scales");
static_assert(kWordBytes * 32 * kLaneWords >= kStageBytes, "all words of a stage");
static_assert(kWordBytes * (WordsOf(kPartBytes, kWordBytes) + WordsOf(kPartScales, kWordInts) +
                            WordsOf(kMaxDecodeTopK, kWordInts)) <=
                  kStageBytes,
              "all of a part");

// One part of one row.
struct Part {
  int32_t index;
  int32_t begin;      // first byte
  int32_t bytes;      // a multiple of 16
  int32_t scales_at;  // word
  int32_t num_scales;
  int32_t weights_at;  // word
  int32_t num_weights;
  int32_t num_words;

  __device__ Part(const DecodeDispatchParams& p, int32_t index)
      : index(index), begin(index * kPartBytes) {
    bytes = plan::Min(kPartBytes, p.row_bytes - begin);
    scales_at = WordsOf(bytes, kWordBytes);
    num_scales = p.scales_per_row != 0 ? bytes / ops::kScaleBlock : 0;
    weights_at = scales_at + WordsOf(num_scales, kWordInts);
    num_weights = p.weights != nullptr && index == p.slots.parts - 1 ? p.shape.top_k : 0;
    num_words = weights_at + WordsOf(num_weights, kWordInts);
  }
};

// kFrom is the type of x if rows are cast to float8 on their way, else void.
template <typename From>
class PartMover {
 public:
  // `stages` has two stages, of this warp: one is filled while bulk copies read the other.
  __device__ PartMover(const DecodeDispatchParams& p, DecodeOp op, char* stages)
      : p_(p), op_(op), stage_(stages) {}

  // Brings a part of this rank's own token to the stage.
  __device__ __forceinline__ void Fill(int32_t token, const Part& part) {
    const int32_t lane = threadIdx.x % 32;
    float weight = 0.0f;
    if (lane < part.num_weights) weight = p_.weights[token * p_.shape.top_k + lane];
    if constexpr (std::is_void_v<From>) {
      float scale = 0.0f;
      if (lane < part.num_scales) {
        scale =
            p_.scales[int64_t{token} * p_.scales_per_row + part.begin / ops::kScaleBlock + lane];
      }
      constexpr int kVectors = (kPartBytes / 16 + 31) / 32;
      const char* from =
          static_cast<const char*>(p_.x) + int64_t{token} * p_.row_bytes + part.begin;
      uint4 raw[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int32_t at = plan::Min(16 * (lane + 32 * j), part.bytes - 16);
        raw[j] = __ldcg(reinterpret_cast<const uint4*>(from + at));
      }
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int32_t at = 16 * (lane + 32 * j);
        if (at < part.bytes) *reinterpret_cast<uint4*>(stage_ + at) = raw[j];
      }
      if (lane < part.num_scales) Floats(part.scales_at)[lane] = scale;
    } else {
      FillFloat8(token, part);
    }
    if (lane < part.num_weights) Floats(part.weights_at)[lane] = weight;
  }

  // Sends what the stage has, a part of `token`, to the ranks of the mask. All lanes have filled
  // it before the last __syncwarp.
  __device__ __forceinline__ void Send(int32_t token, const Part& part, uint32_t ranks) {
    const int32_t lane = threadIdx.x % 32;
    const uint32_t* stage = reinterpret_cast<const uint32_t*>(stage_);
    for (; ranks != 0; ranks &= ranks - 1) {
      const int rank = __ffs(ranks) - 1;
      const int32_t share = DecodeShare(p_.group.rank, rank);
      StampedWord* to = WordsAt(p_, op_, rank) + p_.slots.RowAt(share, token, part.index);
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        const int32_t word = lane + 32 * j;
        if (word >= part.num_words) continue;
        const uint32_t* data = stage + kWordInts * word;
        StoreWord(to + word, data[0], data[1], data[2], op_.stamp());
      }
    }
  }

  // Waits for a part of a peer's token and brings it to the stage. False once the group has failed.
  __device__ __forceinline__ bool Receive(int peer, int32_t token, const Part& part) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t share = DecodeShare(peer, p_.group.rank);
    const StampedWord* from =
        WordsAt(p_, op_, p_.group.rank) + p_.slots.RowAt(share, token, part.index);
    uint4 data[kLaneWords];
    const bool ok = WaitWords(p_, op_, from, part.num_words, WordKind::kRowWords, peer, data);
    uint32_t* stage = reinterpret_cast<uint32_t*>(stage_);
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      const int32_t word = lane + 32 * j;
      if (word >= part.num_words) continue;
      stage[kWordInts * word] = data[j].x;
      stage[kWordInts * word + 1] = data[j].y;
      stage[kWordInts * word + 2] = data[j].z;
    }
    return __all_sync(~0u, ok);
  }

  // Writes the part to its rows. Lane k has the row of entry k here, or -1; in layout "token" the
  // rows of all entries are the same one. All lanes call this, after Publish and before Turn.
  __device__ __forceinline__ void Deliver(const Part& part, int32_t row) {
    const int32_t lane = threadIdx.x % 32;
    const bool by_token = p_.shape.layout == plan::Layout::kToken;
    uint32_t targets = __ballot_sync(~0u, row >= 0);
    if (targets == 0) return;
    if (p_.row_weights != nullptr && part.num_weights != 0) {
      const float* weights = Floats(part.weights_at);
      if (by_token) {
        const int32_t to = __shfl_sync(~0u, row, __ffs(targets) - 1);
        if (lane < part.num_weights) {
          p_.row_weights[int64_t{to} * p_.shape.top_k + lane] = row >= 0 ? weights[lane] : 0.0f;
        }
      } else if (row >= 0) {
        p_.row_weights[row] = weights[lane];
      }
    }
    if (by_token) targets &= 0u - targets;  // the first
    if (!std::is_void_v<From> && p_.dense) return DeliverDense(part, row, targets);
    if ((targets >> lane & 1) != 0) {
      char* to = static_cast<char*>(p_.rows) + int64_t{row} * p_.out_row_bytes + part.begin;
      ptx::BulkStore(to, stage_, part.bytes);
    }
    if (p_.packed_scales != nullptr) DeliverPacked(part, row, targets);
    if (p_.row_scales == nullptr) return;
    const float scale = lane < part.num_scales ? Floats(part.scales_at)[lane] : 0.0f;
    for (; targets != 0; targets &= targets - 1) {
      const int32_t to = __shfl_sync(~0u, row, __ffs(targets) - 1);
      if (lane < part.num_scales) {
        p_.row_scales[int64_t{to} * p_.scales_per_row + part.begin / ops::kScaleBlock + lane] =
            scale;
      }
    }
  }

  // Orders the stage before its delivery. All lanes, after filling it.
  __device__ __forceinline__ void Publish() {
    ptx::FenceProxyAsyncShared();
    __syncwarp();
  }

  // Goes on to the other stage, once the deliveries out of it have read it.
  __device__ __forceinline__ void Turn() {
    ptx::CommitBulkGroup();
    ptx::WaitBulkGroupRead<1>();
    __syncwarp();
    stage_ += to_other_;
    to_other_ = -to_other_;
  }

 private:
  __device__ __forceinline__ float* Floats(int32_t word) const {
    return reinterpret_cast<float*>(stage_ + kWordBytes * word);
  }

  __device__ __forceinline__ void FillFloat8(int32_t token, const Part& part) {
    if constexpr (!std::is_void_v<From>) {
      constexpr int kAtOnce = sizeof(From) == 2 ? 4 : 2;  // vectors of a lane, in flight together
      const int32_t lane = threadIdx.x % 32;
      const int32_t num_vectors = part.bytes / kVector;
      const From* x = static_cast<const From*>(p_.x) + int64_t{token} * p_.row_bytes + part.begin;
      for (int32_t v0 = lane; v0 - lane < num_vectors; v0 += 32 * kAtOnce) {
        RawVector<From> raw[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          raw[j] = LoadVector(x + plan::Min(v0 + 32 * j, num_vectors - 1) * kVector);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int32_t v = v0 + 32 * j;
          float channels[kVector];
          Unpack(raw[j], channels);
          const Float8Vector quantized = ToFloat8(channels, p_.ue8m0);
          if (v >= num_vectors) continue;
          reinterpret_cast<uint2*>(stage_)[v] = quantized.values;
          if (v % kThreadsOfScale == 0) {
            Floats(part.scales_at)[v / kThreadsOfScale] = quantized.scale;
          }
        }
      }
    }
  }

  // Writes the exponents of the part's scales. A part may end within a word, but not within half of
  // one, so lane j has half word j of the part. The last part completes the row's last word.
  __device__ __forceinline__ void DeliverPacked(const Part& part, int32_t row, uint32_t targets) {
    const int32_t lane = threadIdx.x % 32, first = part.index * (kPartScales / 2);
    const bool is_last = part.index == p_.slots.parts - 1;
    const int32_t num_halves = is_last ? 2 * p_.packed.words - first : part.num_scales / 2;
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(Floats(part.scales_at));
    uint32_t half = 0;
    if (2 * lane < part.num_scales) half = scales[2 * lane] >> 23 & 0xff;
    if (2 * lane + 1 < part.num_scales) half |= (scales[2 * lane + 1] >> 23 & 0xff) << 8;
    for (; targets != 0; targets &= targets - 1) {
      const int32_t to = __shfl_sync(~0u, row, __ffs(targets) - 1);
      const int32_t group = to / p_.packed.rows, at = to - group * p_.packed.rows;
      const int32_t n = first + lane;
      uint32_t* const word = p_.packed_scales + p_.packed.At(group, n / 2, at);
      if (lane < num_halves) reinterpret_cast<uint16_t*>(word)[n % 2] = static_cast<uint16_t>(half);
    }
  }

  __device__ __forceinline__ void DeliverDense(const Part& part, int32_t row, uint32_t targets) {
    if constexpr (!std::is_void_v<From>) {
      const int32_t lane = threadIdx.x % 32;
      const int32_t num_vectors = part.bytes / kVector;
      for (; targets != 0; targets &= targets - 1) {
        const int32_t to = __shfl_sync(~0u, row, __ffs(targets) - 1);
        From* out =
            reinterpret_cast<From*>(static_cast<char*>(p_.rows) + int64_t{to} * p_.out_row_bytes) +
            part.begin;
#pragma unroll 2
        for (int32_t v = lane; v < num_vectors; v += 32) {
          float channels[kVector];
          FromFloat8({reinterpret_cast<const uint2*>(stage_)[v],
                      Floats(part.scales_at)[v / kThreadsOfScale]},
                     channels);
          StoreVector(out + v * kVector, Pack<From>(channels));
        }
      }
    }
  }

  const DecodeDispatchParams& p_;
  DecodeOp op_;
  char* stage_;
  int32_t to_other_ = kStageBytes;
};

}  // namespace
}  // namespace jax_ep::cuda
