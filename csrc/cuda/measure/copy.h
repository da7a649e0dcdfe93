// Copies from one range of memory to another, as fast as kernels can: the ceiling for the ops.
//
// They plan, wait for and sum nothing. The source may be a peer's memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_ep::cuda {

enum class Mover : int32_t {
  kBulk = 0,    // bulk copies through shared memory, as dispatch moves rows
  kLoads = 1,   // loads and stores of 16 bytes, as combine reads rows
  kEngine = 2,  // cudaMemcpyAsync: a copy engine, or a kernel of the driver within one GPU
  kPlain = 3,   // one vector of 16 bytes for each thread, as many blocks as that takes
};

struct CopyParams {
  const void* from;  // [bytes], aligned to 16 bytes like `to`
  void* to;          // [bytes]
  int64_t bytes;     // a multiple of 16
  int32_t blocks;    // kBulk and kLoads
};

// For the movers that are kernels.
cudaError_t LaunchCopy(const CopyParams& params, Mover mover, cudaStream_t stream);

cudaError_t LoadCopy();

}  // namespace jax_ep::cuda
