#include "transport/driver.h"

#include <cuda_runtime_api.h>

namespace jax_ep::transport {
namespace {

// Suffixes that cuda.h gives to names, as in cuMemGetAddressRange_v2, are the runtime's business.
std::optional<std::string> Load(const char* name, void** function) {
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, function, CUDA_VERSION, cudaEnableDefault, &found);
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) return std::nullopt;
  cudaGetLastError();
  return std::string("the CUDA driver has no ") + name;
}

std::optional<std::string> LoadAll(Driver& driver) {
#define JAX_EP_DRIVER_LOAD(name) \
  if (auto error = Load(#name, reinterpret_cast<void**>(&driver.name##_))) return error;
  JAX_EP_DRIVER_FUNCTIONS(JAX_EP_DRIVER_LOAD)
#undef JAX_EP_DRIVER_LOAD
  return std::nullopt;
}

}  // namespace

std::optional<std::string> GetDriver(const Driver** driver) {
  static Driver loaded{};
  static const std::optional<std::string> error = LoadAll(loaded);
  *driver = &loaded;
  return error;
}

std::optional<std::string> Explain(const Driver& driver, CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return std::nullopt;
  const char* text = nullptr;
  if (driver.cuGetErrorString_(result, &text) != CUDA_SUCCESS || text == nullptr) text = "unknown";
  return std::string(call) + " failed: " + text;
}

}  // namespace jax_ep::transport
