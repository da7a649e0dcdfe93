// The calls of the CUDA driver that the runtime does not offer, found at run time: the library has
// to load where there is no driver.
#pragma once

#include <cuda.h>

#include <optional>
#include <string>

namespace jax_ep::transport {

// Name of the driver's function, and of the member that holds it.
#define JAX_EP_DRIVER_FUNCTIONS(X)  \
  X(cuCtxGetCurrent)                \
  X(cuCtxSetCurrent)                \
  X(cuDeviceGetUuid)                \
  X(cuGetErrorString)               \
  X(cuMemAddressFree)               \
  X(cuMemAddressReserve)            \
  X(cuMemCreate)                    \
  X(cuMemExportToShareableHandle)   \
  X(cuMemGetAddressRange)           \
  X(cuMemGetAllocationGranularity)  \
  X(cuMemImportFromShareableHandle) \
  X(cuMemMap)                       \
  X(cuMemRelease)                   \
  X(cuMemRetainAllocationHandle)    \
  X(cuMemSetAccess)                 \
  X(cuMemUnmap)

struct Driver {
#define JAX_EP_DRIVER_MEMBER(name) decltype(&::name) name##_;
  JAX_EP_DRIVER_FUNCTIONS(JAX_EP_DRIVER_MEMBER)
#undef JAX_EP_DRIVER_MEMBER
};

// Loads the functions once; an error text if there is no driver, or an old one.
std::optional<std::string> GetDriver(const Driver** driver);

// An error as a text that says which call failed; nothing for success.
std::optional<std::string> Explain(const Driver& driver, CUresult result, const char* call);

}  // namespace jax_ep::transport
