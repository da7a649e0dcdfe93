#include "ffi/cuda/load_kernels.h"

#include "cuda/decode/combine.h"
#include "cuda/decode/dispatch.h"
#include "cuda/measure/clock.h"
#include "cuda/node/cast.h"
#include "cuda/node/combine.h"
#include "cuda/node/combine_vjp.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "transport/cuda_status.h"

namespace jax_ep {
namespace {

std::optional<std::string> LoadKernels(int device) {
  transport::ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadPlan(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadDispatch(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCombine(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCombineVjp(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCast(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadDecodeDispatch(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadDecodeCombine(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadClock(), device);
  return std::nullopt;
}

}  // namespace

std::optional<std::string> LoadKernels(const std::set<int>& devices) {
  for (const int device : devices) {
    if (auto error = LoadKernels(device)) return error;
  }
  return std::nullopt;
}

}  // namespace jax_ep
