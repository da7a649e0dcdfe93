// Launches of kernels that may begin while the kernel before them in the stream still runs
// (programmatic dependent launch).
//
// The kernel before says from when on (ptx::LetNextBegin). The later kernel may not touch what that
// kernel reads or writes until it has waited for its end (ptx::WaitForPrevious), or until that has
// told it that this is there. One of its blocks at least has to wait for the end, so that the end
// of the later kernel is the end of both. Work before that kernel is done when the later one
// begins, unless that kernel began early itself.
//
// XLA launches its own kernels so too. A kernel may only let the next one begin if that is ours:
// where ranks share a GPU, blocks of any other could hold the SMs that a peer's kernel needs.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace jax_ep::cuda {

template <typename Params>
cudaError_t LaunchBehind(void (*kernel)(Params), int num_blocks, int num_threads,
                         size_t shared_bytes, cudaStream_t stream, const Params& params) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace jax_ep::cuda
