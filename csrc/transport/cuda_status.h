// Errors of the CUDA runtime as texts, and the current device for a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "transport/driver.h"

namespace jax_ep::transport {

// An error as a text that says which call failed; nothing for success.
inline std::optional<std::string> Explain(cudaError_t error, const char* call, int device) {
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();  // clears it for those who come after
  return std::string(call) + " failed on GPU " + std::to_string(device) + ": " +
         cudaGetErrorString(error);
}

#define JAX_EP_RETURN_IF_CUDA_ERROR(call, device)                                \
  do {                                                                           \
    if (auto error_text = ::jax_ep::transport::Explain((call), #call, (device))) \
      return error_text;                                                         \
  } while (false)

// Sets the current device until it goes out of scope. Where the thread had none, it has none again:
// naming device 0 would make a context there, in every process of the host.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    if (!GetDriver(&driver_)) driver_->cuCtxGetCurrent_(&saved_);
    cudaSetDevice(device);
  }
  ~ScopedDevice() {
    if (driver_->cuCtxSetCurrent_ != nullptr) driver_->cuCtxSetCurrent_(saved_);
  }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  const Driver* driver_ = nullptr;
  CUcontext saved_ = nullptr;
};

}  // namespace jax_ep::transport
