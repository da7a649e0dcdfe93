#include "transport/network/nvshmem.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cstring>

#include "transport/cuda_status.h"

namespace jax_ep::transport {
namespace {

// What has been started.
struct Runtime {
  bool runs = false;
  int device = -1;
  int pe = -1;
  int num_pes = 0;
  char* memory = nullptr;
  int64_t bytes = 0;
};

Runtime& TheRuntime() {
  static auto* runtime = new Runtime;
  return *runtime;
}

std::string Text(Version version) {
  return std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
         std::to_string(version.patch);
}

bool IsBefore(Version a, Version b) {
  if (a.major != b.major) return a.major < b.major;
  if (a.minor != b.minor) return a.minor < b.minor;
  return a.patch < b.patch;
}

// The first version whose memory layout of GPU-initiated InfiniBand (IBGDA) the device code of
// earlier ones does not know, and the other way round.
constexpr Version kOtherIbgda = {3, 5, 19};

std::string Failed(const char* call, int status) {
  return std::string("NVSHMEM's ") + call + " failed with status " + std::to_string(status) +
         "; run with NVSHMEM_DEBUG=INFO to see why, and python -m jax_ep.doctor --network to check "
         "the settings";
}

}  // namespace

Version BuiltVersion() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

Version LoadedVersion() {
  Version version{};
  nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
  return version;
}

std::optional<std::string> VersionObstacle(Version built, Version loaded) {
  const bool fits = built.major == loaded.major && !IsBefore(loaded, built) &&
                    IsBefore(built, kOtherIbgda) == IsBefore(loaded, kOtherIbgda);
  if (fits) return std::nullopt;
  const Version end = IsBefore(built, kOtherIbgda) ? kOtherIbgda : Version{built.major + 1, 0, 0};
  return "NVSHMEM " + Text(loaded) + " is installed, and jax_ep was built with " + Text(built) +
         ", whose device code does not fit it; pip install 'nvidia-nvshmem-cu13>=" + Text(built) +
         ",<" + Text(end) + "', or build jax_ep where NVSHMEM " + Text(loaded) + " is installed";
}

std::optional<std::string> MakeUniqueId(std::string& id) {
  nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (const int status = nvshmemx_get_uniqueid(&unique); status != 0) {
    return Failed("nvshmemx_get_uniqueid", status);
  }
  id.assign(reinterpret_cast<const char*>(&unique), sizeof(unique));
  return std::nullopt;
}

std::optional<std::string> StartNvshmem(int device, int pe, int num_pes, const std::string& id,
                                        int64_t bytes) {
  Runtime& runtime = TheRuntime();
  if (runtime.runs) {
    if (runtime.device == device && runtime.pe == pe && runtime.num_pes == num_pes &&
        runtime.bytes == bytes) {
      return std::nullopt;
    }
    return "NVSHMEM runs in this process with another GPU, other processes or another size";
  }
  if (auto obstacle = VersionObstacle(BuiltVersion(), LoadedVersion())) return obstacle;
  nvshmemx_uniqueid_t unique;
  if (id.size() != sizeof(unique)) {
    return "the processes have different versions of NVSHMEM: the job's id has " +
           std::to_string(id.size()) + " bytes, and " + std::to_string(sizeof(unique)) +
           " were expected; install the same version everywhere";
  }
  std::memcpy(&unique, id.data(), sizeof(unique));
  ScopedDevice scope(device);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  if (const int status = nvshmemx_set_attr_uniqueid_args(pe, num_pes, &unique, &attributes);
      status != 0) {
    return Failed("nvshmemx_set_attr_uniqueid_args", status);
  }
  // As nvshmemx_init_attr does, but that one ends the process if it fails.
  nvshmemx_init_init_attr_ver_only(attributes);
  const nvshmemi_version_t built = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                    NVSHMEM_VENDOR_PATCH_VERSION};
  int provided = 0;
  if (const int status = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided,
                                              NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, built);
      status != 0) {
    return Failed("initialisation", status);
  }
  runtime.runs = true;
  runtime.device = device;
  runtime.pe = pe;
  runtime.num_pes = num_pes;
  runtime.memory = static_cast<char*>(nvshmem_align(1024, static_cast<size_t>(bytes)));
  if (runtime.memory == nullptr) {
    return "NVSHMEM has no room for " + std::to_string(bytes) +
           " bytes of memory; raise NVSHMEM_SYMMETRIC_SIZE, or leave more of the GPU's memory to "
           "it with XLA_PYTHON_CLIENT_MEM_FRACTION";
  }
  runtime.bytes = bytes;
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemset(runtime.memory, 0, static_cast<size_t>(bytes)), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
  nvshmem_barrier_all();  // nobody writes before all have cleared theirs
  return std::nullopt;
}

bool NvshmemRuns() { return TheRuntime().runs; }

char* SymmetricMemory() { return TheRuntime().memory; }

char* SymmetricMemoryOf(int pe) { return static_cast<char*>(nvshmem_ptr(TheRuntime().memory, pe)); }

int64_t SymmetricBytes() { return TheRuntime().bytes; }

std::optional<std::string> EndNvshmem() {
  Runtime& runtime = TheRuntime();
  if (!runtime.runs) return std::nullopt;
  runtime.runs = false;
  ScopedDevice scope(runtime.device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), runtime.device);
  nvshmem_finalize();
  return std::nullopt;
}

}  // namespace jax_ep::transport
