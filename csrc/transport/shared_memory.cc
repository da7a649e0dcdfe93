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

// A handle of memory; what is mapped through it stays when it is gone.
class Handle {
 public:
  explicit Handle(const Driver* driver) : driver_(driver) {}
  ~Handle() {
    if (value != 0) driver_->cuMemRelease_(value);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  CUmemGenericAllocationHandle value = 0;

 private:
  const Driver* driver_;
};

// Maps `handle` of `size` bytes at `address`, for reading and writing by `devices`.
std::optional<std::string> MapAt(const Driver* driver, const Handle& handle, CUdeviceptr address,
                                 uint64_t size, const std::vector<int>& devices) {
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemMap_(address, size, 0, handle.value, 0));
  std::vector<CUmemAccessDesc> access(devices.size());
  for (size_t i = 0; i < devices.size(); ++i) {
    access[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access[i].location.id = devices[i];
    access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  const CUresult result = driver->cuMemSetAccess_(address, size, access.data(), access.size());
  if (result != CUDA_SUCCESS) driver->cuMemUnmap_(address, size);
  return Explain(*driver, result, "cuMemSetAccess");
}

// The same, somewhere.
std::optional<std::string> Map(const Driver* driver, const Handle& handle, uint64_t size,
                               const std::vector<int>& devices, uint64_t& base) {
  CUdeviceptr address = 0;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemAddressReserve_(&address, size, 0, 0, 0));
  auto error = MapAt(driver, handle, address, size, devices);
  if (error) {
    driver->cuMemAddressFree_(address, size);
  } else {
    base = address;
  }
  return error;
}

}  // namespace

std::optional<std::string> ExportAllocation(int device, uint64_t pointer,
                                            ExportedMemory& exported) {
  const Driver* driver;
  if (auto error = GetDriver(&driver)) return error;
  ScopedDevice scope(device);
  CUdeviceptr base = 0;
  size_t size = 0;
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemGetAddressRange_(&base, &size, pointer));
  Handle handle(driver);
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemRetainAllocationHandle_(&handle.value, reinterpret_cast<void*>(base)));
  int descriptor = -1;
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemExportToShareableHandle_(&descriptor, handle.value,
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
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
  Handle handle(driver);
  JAX_EP_RETURN_IF_DRIVER_ERROR(driver, cuMemCreate_(&handle.value, size, &properties, 0));
  if (auto error = Map(driver, handle, size, devices, base)) return error;
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
  Handle handle(driver);
  JAX_EP_RETURN_IF_DRIVER_ERROR(
      driver, cuMemImportFromShareableHandle_(
                  &handle.value, reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor)),
                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  return Map(driver, handle, size, devices, base);
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
