#include "transport/network/network_groups.h"

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/network/plan.h"
#include "transport/cuda_status.h"
#include "transport/network/nvshmem.h"

namespace jax_ep::transport {
namespace {

std::mutex& Mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

// By group and device. What is replaced stays: handlers may still use it.
std::map<std::pair<int64_t, int>, const NetworkMember*>& Members() {
  static auto* members = new std::map<std::pair<int64_t, int>, const NetworkMember*>;
  return *members;
}

// Writes who the ranks with this index are to the device.
std::optional<std::string> CopyCounterparts(const NetworkSpec& spec, int index,
                                            const cuda::Counterpart** on_device) {
  std::vector<cuda::Counterpart> counterparts;
  for (const std::vector<int>& host : spec.pe) {
    char* const memory = SymmetricMemoryOf(host[index]);
    counterparts.push_back({host[index], memory == nullptr ? nullptr : memory + spec.offset});
  }
  const size_t bytes = counterparts.size() * sizeof(cuda::Counterpart);
  void* memory = nullptr;
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMalloc(&memory, bytes), spec.device);
  JAX_EP_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(memory, counterparts.data(), bytes, cudaMemcpyHostToDevice), spec.device);
  *on_device = static_cast<const cuda::Counterpart*>(memory);
  return std::nullopt;
}

}  // namespace

int64_t NetworkBytes(const cuda::NetworkShape& shape, int64_t message_bytes) {
  const int64_t bytes = shape.bytes() + cuda::PlanMemory(nullptr, shape, message_bytes).bytes();
  return (bytes + 1023) / 1024 * 1024;
}

std::optional<std::string> AddNetwork(const NetworkSpec& spec) {
  const int num_hosts = static_cast<int>(spec.pe.size());
  const int host_ranks = static_cast<int>(spec.pe[spec.host].size());
  if (num_hosts > cuda::kMaxHosts || host_ranks > cuda::kMaxRanks) {
    return "a group has at most " + std::to_string(cuda::kMaxHosts) + " hosts of " +
           std::to_string(cuda::kMaxRanks) + " ranks, got " + std::to_string(num_hosts) + " of " +
           std::to_string(host_ranks);
  }
  auto member = std::make_unique<NetworkMember>();
  cuda::NetworkParams& params = member->params;
  params.shape = {num_hosts, host_ranks, spec.num_lanes, spec.chunk_bytes};
  params.host = spec.host;
  member->message_bytes = spec.message_bytes;
  if (spec.offset + NetworkBytes(params.shape, spec.message_bytes) > SymmetricBytes()) {
    return "the groups of this process need more than the " + std::to_string(SymmetricBytes()) +
           " bytes of network memory that were allocated; set JAX_EP_NETWORK_BYTES to more before "
           "the first group is made";
  }
  int index = -1;
  for (int i = 0; i < host_ranks; ++i) {
    char* const memory = SymmetricMemoryOf(spec.pe[spec.host][i]);
    if (memory == nullptr) {
      return "the GPU of rank " + std::to_string(spec.host * host_ranks + i) +
             " cannot be reached from another one of its host; python -m jax_ep.doctor shows the "
             "links of this host";
    }
    params.memory[i] = memory + spec.offset;
    if (memory == SymmetricMemory()) index = i;
  }
  if (index < 0) return "this process has no rank among those of its host";
  ScopedDevice scope(spec.device);
  if (auto error = CopyCounterparts(spec, index, &params.counterparts)) return error;
  std::lock_guard<std::mutex> lock(Mutex());
  Members()[{spec.group_id, spec.device}] = member.release();
  return std::nullopt;
}

const NetworkMember* FindNetworkMember(int64_t group_id, int device) {
  std::lock_guard<std::mutex> lock(Mutex());
  const auto member = Members().find({group_id, device});
  return member == Members().end() ? nullptr : member->second;
}

}  // namespace jax_ep::transport
