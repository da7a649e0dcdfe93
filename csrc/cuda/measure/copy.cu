// The movers: a loop of bulk copies, a loop of loads and stores, and loads and stores without a
// loop.

#include "cuda/core/ptx.cuh"
#include "cuda/measure/copy.h"

namespace jax_ep::cuda {
namespace {

// Bulk copies are as in dispatch: each warp has stages of its own, and loads run ahead of stores.
constexpr int kChunkBytes = 14336;  // a row of 7168 channels in bf16
constexpr int kStages = 4;
constexpr int kAhead = 3;
constexpr int kBulkWarps = 3;
constexpr int kBarriersAt = kBulkWarps * kStages * kChunkBytes;
constexpr int kSharedBytes =
    kBarriersAt + kBulkWarps * kStages * static_cast<int>(sizeof(uint64_t));

// Of loads.
constexpr int kLoadThreads = 1024;
constexpr int kLoadsAtOnce = 4;  // of a thread

// On an H200, within its memory, nothing else that was tried is as fast: neither larger blocks, nor
// more vectors for each thread.
constexpr int kPlainThreads = 256;

__global__ void __launch_bounds__(kBulkWarps * 32, 1) BulkKernel(CopyParams p) {
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;  // one thread drives the copies of a warp
  char* stages = memory + warp * kStages * kChunkBytes;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + kBarriersAt) + warp * kStages;
  for (int s = 0; s < kStages; ++s) ptx::InitBarrier(&barriers[s], 1);
  ptx::FenceBarrierInit();
  const int64_t num_chunks = (p.bytes + kChunkBytes - 1) / kChunkBytes;
  const int64_t stride = int64_t{gridDim.x} * kBulkWarps;
  const int64_t first = int64_t{blockIdx.x} * kBulkWarps + warp;
  const auto size_of = [&](int64_t chunk) {
    const int64_t left = p.bytes - chunk * kChunkBytes;
    return static_cast<uint32_t>(left < kChunkBytes ? left : kChunkBytes);
  };
  const auto load = [&](int64_t item) {
    const int64_t chunk = first + item * stride;
    if (chunk >= num_chunks) return;
    const int s = static_cast<int>(item % kStages);
    ptx::ArriveExpectBytes(&barriers[s], size_of(chunk));
    ptx::BulkLoad(stages + s * kChunkBytes, static_cast<const char*>(p.from) + chunk * kChunkBytes,
                  size_of(chunk), &barriers[s]);
  };
  for (int64_t item = 0; item < kAhead; ++item) load(item);
  for (int64_t item = 0; first + item * stride < num_chunks; ++item) {
    const int s = static_cast<int>(item % kStages);
    const int64_t chunk = first + item * stride;
    while (!ptx::TryWaitParity(&barriers[s], static_cast<uint32_t>(item / kStages) & 1)) {
    }
    ptx::BulkStore(static_cast<char*>(p.to) + chunk * kChunkBytes, stages + s * kChunkBytes,
                   size_of(chunk));
    ptx::CommitBulkGroup();
    ptx::WaitBulkGroupRead<kStages - kAhead>();
    load(item + kAhead);
  }
  ptx::WaitBulkGroups();
}

__global__ void __launch_bounds__(kLoadThreads) LoadsKernel(CopyParams p) {
  const int64_t num_vectors = p.bytes / static_cast<int64_t>(sizeof(uint4));
  const uint4* from = static_cast<const uint4*>(p.from);
  uint4* to = static_cast<uint4*>(p.to);
  const int64_t stride = int64_t{gridDim.x} * kLoadThreads;
  int64_t i = int64_t{blockIdx.x} * kLoadThreads + threadIdx.x;
  for (; i + (kLoadsAtOnce - 1) * stride < num_vectors; i += kLoadsAtOnce * stride) {
    uint4 vectors[kLoadsAtOnce];
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) vectors[n] = ptx::LoadCacheGlobal(from + i + n * stride);
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) to[i + n * stride] = vectors[n];
  }
  for (; i < num_vectors; i += stride) to[i] = ptx::LoadCacheGlobal(from + i);
}

__global__ void __launch_bounds__(kPlainThreads) PlainKernel(CopyParams p) {
  const int64_t i = int64_t{blockIdx.x} * kPlainThreads + threadIdx.x;
  if (i >= p.bytes / static_cast<int64_t>(sizeof(uint4))) return;
  __stcs(static_cast<uint4*>(p.to) + i,
         ptx::LoadCacheGlobal(static_cast<const uint4*>(p.from) + i));
}

}  // namespace

cudaError_t LoadCopy() {
  cudaFuncAttributes attributes;
  for (const auto kernel : {LoadsKernel, PlainKernel}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaFuncSetAttribute(BulkKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

cudaError_t LaunchCopy(const CopyParams& params, Mover mover, cudaStream_t stream) {
  switch (mover) {
    case Mover::kBulk:
      BulkKernel<<<params.blocks, kBulkWarps * 32, kSharedBytes, stream>>>(params);
      return cudaGetLastError();
    case Mover::kLoads:
      LoadsKernel<<<params.blocks, kLoadThreads, 0, stream>>>(params);
      return cudaGetLastError();
    case Mover::kPlain: {
      const int64_t per_block = int64_t{kPlainThreads} * sizeof(uint4);
      const auto blocks = static_cast<uint32_t>((params.bytes + per_block - 1) / per_block);
      PlainKernel<<<blocks, kPlainThreads, 0, stream>>>(params);
      return cudaGetLastError();
    }
    case Mover::kEngine:
      break;  // not a kernel
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_ep::cuda
