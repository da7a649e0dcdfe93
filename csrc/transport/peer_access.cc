#include "transport/peer_access.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "transport/cuda_status.h"

namespace jax_ep::transport {

using cuda::ErrorRecord;

std::optional<std::string> AllocateWorkspace(int device, int64_t bytes, uint64_t& workspace) {
  ScopedDevice scope(device);
  void* memory = nullptr;
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMalloc(&memory, bytes), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemset(memory, 0, bytes), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
  workspace = reinterpret_cast<uint64_t>(memory);
  return std::nullopt;
}

std::optional<std::string> AllocateErrorRecord(int device, ErrorRecord** error) {
  ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaHostAlloc(reinterpret_cast<void**>(error), sizeof(ErrorRecord),
                                            cudaHostAllocPortable | cudaHostAllocMapped),
                              device);
  **error = {};
  return std::nullopt;
}

std::optional<std::string> EnablePeerAccess(int device, int peer) {
  if (device == peer) return std::nullopt;
  ScopedDevice scope(device);
  int can_access = 0;
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceCanAccessPeer(&can_access, device, peer), device);
  if (can_access == 0) {
    return "GPU " + std::to_string(device) + " cannot reach the memory of GPU " +
           std::to_string(peer);
  }
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return std::nullopt;
  }
  return Explain(error, "cudaDeviceEnablePeerAccess", device);
}

std::vector<cuda::Region> AddressSpace() {
  std::vector<cuda::Region> regions(cuda::kMaxRegions);
  for (int i = 0; i < cuda::kMaxRegions; ++i) {
    constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
    regions[i] = {i * kSize, kSize};
  }
  return regions;
}

std::optional<std::string> WriteRegions(int device,
                                        const std::vector<std::vector<cuda::Region>>& regions,
                                        int num_channels, cuda::Workspace* workspace) {
  ScopedDevice scope(device);
  std::vector<cuda::Region> table(regions.size() * cuda::kMaxRegions);
  for (size_t rank = 0; rank < regions.size(); ++rank) {
    if (regions[rank].size() > cuda::kMaxRegions) return "a rank has too many regions of memory";
    std::copy(regions[rank].begin(), regions[rank].end(), table.begin() + rank * cuda::kMaxRegions);
  }
  for (int channel = 0; channel < num_channels; ++channel) {
    JAX_EP_RETURN_IF_CUDA_ERROR(
        cudaMemcpy(workspace->channels[channel].regions, table.data(),
                   table.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice),
        device);
  }
  return std::nullopt;
}

}  // namespace jax_ep::transport
