// Errors of the CUDA runtime as texts, and the current device for a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

namespace jax_ep::transport {

// An error as a text that says which call failed; nothing for success.
inline std::optional<std::string> Explain(cudaError_t error, const char* call, int device) {
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();  // clears it for those who come after
  return std::string(call) + " failed on GPU " + std::to_string(device) + ": " +
         cudaGetErrorString(error);
}

#define JAX_EP_RETURN_IF_CUDA_ERROR(call, device)                              \
  do {                                                                         \
    if (auto error_text = Explain((call), #call, (device))) return error_text; \
  } while (false)

// Sets the current device until it goes out of scope.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    cudaGetDevice(&saved_);
    cudaSetDevice(device);
  }
  ~ScopedDevice() { cudaSetDevice(saved_); }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  int saved_ = 0;
};

}  // namespace jax_ep::transport
