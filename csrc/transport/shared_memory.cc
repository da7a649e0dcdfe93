#include "transport/shared_memory.h"

#include <cuda_runtime_api.h>

#include "transport/cuda_status.h"
#include "transport/driver.h"

namespace jax_ep::transport {
namespace {

#define JAX_EP_RETURN_IF_DRIVER_ERROR(driver, call)                                     \
  do {                                                                                  \
    if (auto error_text = Explain(*(driver), (driver)->call, #call)) return error_text; \
  } while (false)

// Maps `handle` of `size` bytes somewhere, for reading and writing by `devices`.
std::optional<std::string> Map(const Driver* driver, CUmemGenericAllocationHandle handle,
                               uint64_t size, const std::vector<int>& devices, uint64_t& base) {
  CUdeviceptr address = 0;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemAddressReserve_(&address, size, 0, 0, 0));
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemMap_(address, size, 0, handle, 0));
  std::vector<CUmemAccessDesc> access(devices.size());
  for (size_t i = 0; i < devices.size(); ++i) {
    access[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access[i].location.id = devices[i];
    access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver,
                                cuMemSetAccess_(address, size, access.data(), access.size()));
  base = address;
  return std::nullopt;
}

}  // namespace

std::optional<std::string> ExportAllocation(uint64_t pointer, ExportedMemory& exported) {
  const Driver* driver;
  if (auto error = GetDriver(&driver)) return error;
  CUdeviceptr base = 0;
  size_t size = 0;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemGetAddressRange_(&base, &size, pointer));
  CUmemGenericAllocationHandle handle;
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemRetainAllocationHandle_(&handle, reinterpret_cast<void*>(base)));
  int descriptor = -1;
  const CUresult result = driver->cuMemExportToShareableHandle_(
      &descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  driver->cuMemRelease_(handle);
  if (auto error = Explain(*driver, result, "cuMemExportToShareableHandle")) return error;
  exported = {descriptor, base, size};
  return std::nullopt;
}

std::optional<std::string> AllocateExportable(int device, const std::vector<int>& devices,
                                              uint64_t bytes, uint64_t& base) {
  const Driver* driver;
  if (auto error = GetDriver(&driver)) return error;
  ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaFree(nullptr), device);  // makes the context
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  size_t granularity = 0;
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemGetAllocationGranularity_(&granularity, &properties,
                                             CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  const uint64_t size = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemCreate_(&handle, size, &properties, 0));
  if (auto error = Map(driver, handle, size, devices, base)) return error;
  driver->cuMemRelease_(handle);  // the mapping keeps it
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemset(reinterpret_cast<void*>(base), 0, size), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
  return std::nullopt;
}

std::optional<std::string> ImportMemory(int descriptor, uint64_t size,
                                        const std::vector<int>& devices, uint64_t& base) {
  const Driver* driver;
  if (auto error = GetDriver(&driver)) return error;
  for (const int device : devices) {
    ScopedDevice scope(device);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaFree(nullptr), device);
  }
  ScopedDevice scope(devices.front());
  CUmemGenericAllocationHandle handle;
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemImportFromShareableHandle_(
                  &handle, reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor)),
                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  if (auto error = Map(driver, handle, size, devices, base)) return error;
  driver->cuMemRelease_(handle);
  return std::nullopt;
}

std::optional<std::string> DeviceUuid(int device, std::string& uuid) {
  const Driver* driver;
  if (auto error = GetDriver(&driver)) return error;
  CUuuid bytes;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuDeviceGetUuid_(&bytes, device));
  uuid.clear();
  for (const char byte : bytes.bytes) {
    constexpr const char* kDigits = "0123456789abcdef";
    uuid += kDigits[static_cast<unsigned char>(byte) >> 4];
    uuid += kDigits[byte & 15];
  }
  return std::nullopt;
}

}  // namespace jax_ep::transport
