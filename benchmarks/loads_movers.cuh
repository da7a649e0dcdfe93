// The movers that loads.cu times: kernels that bring rows to other rows ("copy") or add them by
// fours ("sum"), by bulk copies or by loads of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "cuda/rows/adder.cuh"
#include "cuda/rows/vectors.cuh"

namespace loads {

using namespace jax_ep::cuda;  // NOLINT
using Element = __nv_bfloat16;

constexpr int kHidden = 7168;
constexpr int kTerms = 4;  // rows of a sum

constexpr int RoundUp(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows of `kPayload` bytes with `kScales` bytes of scales, which are in a separate array.
template <int kPayload, int kScales>
struct RowFormat {
  static constexpr int kPayloadBytes = kPayload;
  static constexpr int kScaleBytes = kScales;
  static constexpr int kVectors = (kPayload + kScales) / 16;
  static constexpr int kStrips = (kVectors + 31) / 32;  // a strip is a vector for each lane
};
using DenseRows = RowFormat<2 * kHidden, 0>;
using Float8Rows = RowFormat<kHidden, kHidden / 128 * 4>;

constexpr size_t kPayloadBytes = 36864 * size_t{DenseRows::kPayloadBytes};  // of a source
constexpr int kMaxRows = kPayloadBytes / Float8Rows::kPayloadBytes;
static_assert(kPayloadBytes < uint32_t{1} << 31, "offsets have 32 bits");

struct Params {
  const char* payload;   // [kMaxRows at most, payload bytes], the source rows
  const char* scales;    // [same, scale bytes]
  const int32_t* order;  // [num_rows], the source row of each row or term
  int32_t num_rows;      // that are read
  char* out_payload;     // [num_rows or num_rows / kTerms, payload bytes]
  char* out_scales;      // [num_rows, scale bytes]
};

// The number of this block's k-th result.
__device__ int OutRow(int k) { return blockIdx.x + k * gridDim.x; }

// Lists the source rows of this block's results, `kGroup` of each, and returns the number of its
// results. Called by all threads.
template <int kGroup>
__device__ int ListRows(const Params& p, int32_t* list) {
  const int count = p.num_rows / gridDim.x;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    list[i] = p.order[OutRow(i / kGroup) * kGroup + i % kGroup];
  }
  __syncthreads();
  return count / kGroup;
}

// MoveRows of dispatch.cu for rows with one place each: the same stages, warps and loads ahead.
template <typename Format>
struct BulkCopy {
  static constexpr int kStages = 4;
  static constexpr int kAhead = 3;
  static constexpr int kScalesAt = RoundUp(Format::kPayloadBytes, 128);
  static constexpr int kStageBytes = kScalesAt + RoundUp(Format::kScaleBytes, 128);
  static constexpr int kFit = (200 << 10) / (kStages * kStageBytes);
  static constexpr int kWarps = kFit < 8 ? kFit : 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBytes = kWarps * kStages * (kStageBytes + 8);  // of shared memory
};

template <typename Format>
__global__ void __launch_bounds__(BulkCopy<Format>::kThreads, 1)
    CopyByBulk(const __grid_constant__ Params p) {
  using Ring = BulkCopy<Format>;
  constexpr int kStages = Ring::kStages;
  extern __shared__ __align__(128) char shared[];
  const int count = ListRows<1>(p, reinterpret_cast<int32_t*>(shared + Ring::kBytes));
  const int32_t* list = reinterpret_cast<int32_t*>(shared + Ring::kBytes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  char* stages = shared + warp * kStages * Ring::kStageBytes;
  uint64_t* barriers =
      reinterpret_cast<uint64_t*>(shared + Ring::kWarps * kStages * Ring::kStageBytes) +
      warp * kStages;
  if (lane == 0) {
    for (int s = 0; s < kStages; ++s) ptx::InitBarrier(&barriers[s], 1);
    ptx::FenceBarrierInit();
    ptx::FenceProxyAsyncGlobal();
  }
  __syncwarp();
  const auto load = [&](int item) {
    const int k = warp + item * Ring::kWarps;
    if (k >= count || lane != 0) return;
    const int s = item % kStages;
    const int64_t row = list[k];
    char* stage = stages + s * Ring::kStageBytes;
    ptx::ArriveExpectBytes(&barriers[s], Format::kPayloadBytes + Format::kScaleBytes);
    ptx::BulkLoad(stage, p.payload + row * Format::kPayloadBytes, Format::kPayloadBytes,
                  &barriers[s]);
    if (Format::kScaleBytes != 0) {
      ptx::BulkLoad(stage + Ring::kScalesAt, p.scales + row * Format::kScaleBytes,
                    Format::kScaleBytes, &barriers[s]);
    }
  };
  for (int item = 0; item < Ring::kAhead; ++item) load(item);
  for (int item = 0; warp + item * Ring::kWarps < count; ++item) {
    const int s = item % kStages;
    while (!ptx::TryWaitParity(&barriers[s], (item / kStages) & 1)) {
    }
    if (lane == 0) {
      const int64_t row = OutRow(warp + item * Ring::kWarps);
      const char* stage = stages + s * Ring::kStageBytes;
      ptx::BulkStore(p.out_payload + row * Format::kPayloadBytes, stage, Format::kPayloadBytes);
      if (Format::kScaleBytes != 0) {
        ptx::BulkStore(p.out_scales + row * Format::kScaleBytes, stage + Ring::kScalesAt,
                       Format::kScaleBytes);
      }
    }
    ptx::CommitBulkGroup();
    ptx::WaitBulkGroupRead<kStages - Ring::kAhead>();
    __syncwarp();
    load(item + Ring::kAhead);
  }
  ptx::WaitBulkGroups();
}

// The adder of combine itself.
__global__ void __launch_bounds__(kAdderWarps * 32, 1)
    SumByAdder(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  Term* terms = reinterpret_cast<Term*>(shared) + threadIdx.x / 32 * kTerms;
  const int32_t* list = reinterpret_cast<int32_t*>(shared + kAdderWarps * kTerms * sizeof(Term));
  const int count = ListRows<kTerms>(p, const_cast<int32_t*>(list));
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < count; k += kAdderWarps) {
    if (lane < kTerms) {
      const char* row = p.payload + int64_t{list[k * kTerms + lane]} * DenseRows::kPayloadBytes;
      terms[lane] = {row, 1.0f};
    }
    __syncwarp();
    AddTerms<Element, false>(terms, kTerms, 0, DenseRows::kPayloadBytes,
                             p.out_payload + int64_t{OutRow(k)} * DenseRows::kPayloadBytes);
    __syncwarp();
  }
}

enum class Load : size_t {
  kWeak,
  kCacheGlobal,  // of adder.cuh and quantize.cu
  kRelaxedSystem,
  kWeakHints,  // the hints of the aggressive load, with defined behaviour
  kNonCoherent,
  kAggressive,
};
constexpr const char* kLoadNames[] = {"ld.global",
                                      "ld.global.cg",
                                      "ld.relaxed.sys",
                                      "ld.global.L1::no_allocate.L2::256B",
                                      "ld.global.nc.L1::no_allocate",
                                      "ld.global.nc.L1::no_allocate.L2::256B"};

#define LOAD_16(instruction)                                                \
  asm volatile(instruction ".v4.u32 {%0, %1, %2, %3}, [%4];"                \
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) \
               : "l"(address))

template <Load kLoad>
__device__ __forceinline__ uint4 Load16(const char* address) {
  uint4 value;
  if constexpr (kLoad == Load::kWeak) LOAD_16("ld.global");
  if constexpr (kLoad == Load::kWeakHints) LOAD_16("ld.global.L1::no_allocate.L2::256B");
  if constexpr (kLoad == Load::kNonCoherent) LOAD_16("ld.global.nc.L1::no_allocate");
  if constexpr (kLoad == Load::kAggressive) LOAD_16("ld.global.nc.L1::no_allocate.L2::256B");
  if constexpr (kLoad == Load::kCacheGlobal) {
    value = LoadVector(reinterpret_cast<const Element*>(address)).words[0];
  }
  if constexpr (kLoad == Load::kRelaxedSystem) {
    uint64_t first, second;
    ptx::LoadRelaxedSystem(reinterpret_cast<const uint64_t*>(address), first, second);
    value = make_uint4(first, first >> 32, second, second >> 32);
  }
  return value;
}

constexpr int kLoadWarps = 32;

// A warp takes `kLoads` strips at a time, which belong to two rows at most.
template <Load kLoad, int kLoads, typename Format>
__global__ void __launch_bounds__(kLoadWarps * 32, 1)
    CopyByLoads(const __grid_constant__ Params p) {
  constexpr int kStrips = Format::kStrips;
  extern __shared__ __align__(128) int32_t list[];
  const int count = ListRows<1>(p, list);
  const auto at = [](auto* payload, auto* scales, uint32_t row, int strip) {
    // Lanes past the end of a row do the same as the last lane.
    const int offset = min(strip * 32 + int(threadIdx.x % 32), Format::kVectors - 1) * 16;
    const bool is_scale = Format::kScaleBytes != 0 && offset >= Format::kPayloadBytes;
    const uint32_t row_bytes = is_scale ? Format::kScaleBytes : Format::kPayloadBytes;
    return (is_scale ? scales - Format::kPayloadBytes : payload) + (row * row_bytes + offset);
  };
#pragma unroll 1
  for (int first = threadIdx.x / 32 * kLoads; first < count * kStrips;
       first += kLoadWarps * kLoads) {
    const int k = first / kStrips;
    const int strip = first % kStrips;
    const int32_t rows[] = {list[k], list[min(k + 1, count - 1)]};
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int next = strip + i >= kStrips;
      raw[i] = Load16<kLoad>(
          at(p.payload, p.scales, next ? rows[1] : rows[0], strip + i - next * kStrips));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int next = strip + i >= kStrips;
      char* out = at(p.out_payload, p.out_scales, OutRow(k + next), strip + i - next * kStrips);
      *reinterpret_cast<uint4*>(out) = raw[i];
    }
  }
}

// A warp takes `kLoads / kTerms` strips of a sum at a time.
template <Load kLoad, int kLoads>
__global__ void __launch_bounds__(kLoadWarps * 32, 1) SumByLoads(const __grid_constant__ Params p) {
  constexpr int kAtOnce = kLoads / kTerms;
  constexpr int kStrips = DenseRows::kStrips;
  static_assert(kStrips % kAtOnce == 0);
  extern __shared__ __align__(128) int32_t list[];
  const int num_strips = ListRows<kTerms>(p, list) * kStrips;
  const auto at = [](auto* payload, uint32_t row, int strip) {
    return payload + (row * DenseRows::kPayloadBytes + (strip * 32 + threadIdx.x % 32) * 16);
  };
#pragma unroll 1
  for (int first = threadIdx.x / 32 * kAtOnce; first < num_strips; first += kLoadWarps * kAtOnce) {
    const int k = first / kStrips;
    const int strip = first % kStrips;
    const char* from[kTerms];
    RawVector<Element> raw[kTerms][kAtOnce];
#pragma unroll
    for (int t = 0; t < kTerms; ++t) from[t] = at(p.payload, list[k * kTerms + t], strip);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) raw[t][i].words[0] = Load16<kLoad>(from[t] + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float sum[kVector] = {};
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        float term[kVector];
        Unpack(raw[t][i], term);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[j] = __fadd_rn(sum[j], term[j]);
      }
      char* out = at(p.out_payload, OutRow(k), strip + i);
      StoreVector(reinterpret_cast<Element*>(out), Pack<Element>(sum));
    }
  }
}

}  // namespace loads
