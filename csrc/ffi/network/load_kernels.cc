#include "ffi/network/load_kernels.h"

#include "cuda/network/combine.h"
#include "cuda/network/combine_vjp.h"
#include "cuda/network/dispatch.h"
#include "cuda/network/plan.h"
#include "cuda/rows/quantize.h"
#include "transport/cuda_status.h"

namespace jax_ep {

std::optional<std::string> LoadNetworkKernels(int device) {
  transport::ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadNetworkPlan(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadNetworkDispatch(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadNetworkCombine(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadNetworkCombineVjp(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadQuantize(), device);
  return std::nullopt;
}

}  // namespace jax_ep
