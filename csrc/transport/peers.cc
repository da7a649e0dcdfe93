#include "transport/peers.h"

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/combine.h"
#include "cuda/combine_vjp.h"
#include "cuda/dispatch.h"
#include "cuda/plan.h"
#include "cuda/quantize.h"

namespace jax_ep::transport {
namespace {

using cuda::ErrorRecord;
using cuda::Workspace;

// An error as a text that says which call failed; nothing for success.
std::optional<std::string> Explain(cudaError_t error, const char* call, int device) {
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

// Memory of one rank. Never freed: a kernel of a failed peer may still write to it.
struct RankMemory {
  Workspace* workspace = nullptr;
  ErrorRecord* error = nullptr;
};

std::optional<std::string> Allocate(int device, RankMemory& memory) {
  ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(
      cudaMalloc(reinterpret_cast<void**>(&memory.workspace), sizeof(Workspace)), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemset(memory.workspace, 0, sizeof(Workspace)), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(
      cudaHostAlloc(reinterpret_cast<void**>(&memory.error), sizeof(ErrorRecord),
                    cudaHostAllocPortable | cudaHostAllocMapped),
      device);
  *memory.error = {};
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
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

// Between GPUs of one process every address is good everywhere: the regions are the parts of the
// address space.
std::optional<std::string> NameAddressSpace(int device, int num_ranks, Workspace* workspace) {
  ScopedDevice scope(device);
  std::vector<cuda::Region> regions(static_cast<size_t>(num_ranks) * cuda::kMaxRegions);
  for (size_t i = 0; i < regions.size(); ++i) {
    constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
    regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
  }
  JAX_EP_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(workspace->regions, regions.data(), regions.size() * sizeof(cuda::Region),
                 cudaMemcpyHostToDevice),
      device);
  return std::nullopt;
}

// Loading a kernel lazily, while a peer waits inside one, would deadlock.
std::optional<std::string> LoadKernels(int device) {
  ScopedDevice scope(device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadPlan(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadDispatch(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCombine(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCombineVjp(), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadQuantize(), device);
  return std::nullopt;
}

using Group = std::map<int, Member>;  // by device

std::optional<std::string> AddInstance(const std::vector<int>& devices, double arrival_timeout_s,
                                       double op_timeout_s, Group& group) {
  const int num_ranks = static_cast<int>(devices.size());
  if (num_ranks > cuda::kMaxRanks) {
    return "a group on one host has at most " + std::to_string(cuda::kMaxRanks) + " ranks, got " +
           std::to_string(num_ranks);
  }
  std::vector<RankMemory> memory(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (const int peer : devices) {
      if (auto error = EnablePeerAccess(devices[rank], peer)) return error;
    }
    if (auto error = LoadKernels(devices[rank])) return error;
    if (auto error = Allocate(devices[rank], memory[rank])) return error;
    if (auto error = NameAddressSpace(devices[rank], num_ranks, memory[rank].workspace)) {
      return error;
    }
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    Member member{};
    for (int peer = 0; peer < num_ranks; ++peer) member.params.peers[peer] = memory[peer].workspace;
    member.params.error = memory[rank].error;
    member.params.rank = rank;
    member.params.num_ranks = num_ranks;
    member.params.arrival_timeout_ns = static_cast<uint64_t>(arrival_timeout_s * 1e9);
    member.params.op_timeout_ns = static_cast<uint64_t>(op_timeout_s * 1e9);
    member.device = devices[rank];
    group[devices[rank]] = member;
  }
  return std::nullopt;
}

std::mutex& Mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::map<int64_t, std::unique_ptr<Group>>& Groups() {
  static auto* groups = new std::map<int64_t, std::unique_ptr<Group>>;
  return *groups;
}

const char* OpName(uint32_t op) {
  constexpr const char* kNames[] = {"plan", "dispatch", "combine", "combine_vjp"};
  return op < 4 ? kNames[op] : "unknown";
}

const char* PhaseName(uint32_t phase) {
  constexpr const char* kNames[] = {"arrival", "close", "rows"};
  return phase < 3 ? kNames[phase] : "unknown";
}

std::string FlagText(uint64_t flag) {
  return "epoch " + std::to_string(flag >> cuda::kTagBits) + " tag " +
         std::to_string(flag & ((1u << cuda::kTagBits) - 1));
}

std::string Describe(const ErrorRecord& error) {
  std::string text = "jax_ep.CommunicationError: rank " + std::to_string(error.rank) + ", op " +
                     OpName(error.op) + ", phase " + PhaseName(error.phase) + ": ";
  const std::string peer = "rank " + std::to_string(error.peer);
  switch (static_cast<cuda::ErrorKind>(error.kind)) {
    case cuda::ErrorKind::kTimeout:
      text += "waited " + std::to_string(static_cast<double>(error.waited_ns) * 1e-9) + " s for " +
              peer;
      break;
    case cuda::ErrorKind::kMismatch:
      text += peer + " is at another op";
      break;
    case cuda::ErrorKind::kPeerLost:
      text += "the process of " + peer + " is gone";
      break;
    case cuda::ErrorKind::kUnreachable:
      text += "an input is in memory that its peers cannot read";
      break;
    case cuda::ErrorKind::kConcurrent:
      text += "another op of the group was running at the same time";
      break;
    default:
      text += "another rank of the group failed while this one waited for " + peer;
  }
  return text + "; expected " + FlagText(error.expected) + ", saw " + FlagText(error.seen) +
         ". The group takes no more ops; make it again with jax_ep.create_group.";
}

}  // namespace

std::optional<std::string> CreateGroup(int64_t group_id,
                                       const std::vector<std::vector<int>>& instances,
                                       double arrival_timeout_s, double op_timeout_s) {
  auto group = std::make_unique<Group>();
  for (const std::vector<int>& devices : instances) {
    if (auto error = AddInstance(devices, arrival_timeout_s, op_timeout_s, *group)) return error;
  }
  std::lock_guard<std::mutex> lock(Mutex());
  // A replaced group is kept: handlers may still hold its members.
  auto& slot = Groups()[group_id];
  if (slot != nullptr) static_cast<void>(slot.release());
  slot = std::move(group);
  return std::nullopt;
}

const Member* FindMember(int64_t group_id, int device) {
  std::lock_guard<std::mutex> lock(Mutex());
  const auto group = Groups().find(group_id);
  if (group == Groups().end()) return nullptr;
  const auto member = group->second->find(device);
  return member == group->second->end() ? nullptr : &member->second;
}

std::optional<std::string> Failure(const Member& member) {
  const ErrorRecord& error = *member.params.error;
  if (__atomic_load_n(&error.set, __ATOMIC_ACQUIRE) != 1) return std::nullopt;
  return Describe(error);
}

std::optional<std::string> GroupFailure(int64_t group_id) {
  std::lock_guard<std::mutex> lock(Mutex());
  const auto group = Groups().find(group_id);
  if (group == Groups().end()) return std::nullopt;
  for (const auto& [device, member] : *group->second) {
    if (auto failure = Failure(member)) return failure;
  }
  return std::nullopt;
}

int64_t WorkspaceBytes() { return sizeof(Workspace); }

}  // namespace jax_ep::transport
