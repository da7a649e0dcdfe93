#include "transport/groups.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/measure/clock.h"
#include "cuda/node/combine.h"
#include "cuda/node/combine_vjp.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "cuda/rows/quantize.h"
#include "transport/cuda_status.h"
#include "transport/error_text.h"

namespace jax_ep::transport {
namespace {

using cuda::ErrorRecord;
using cuda::Workspace;

// Never freed: a kernel of a failed peer may still write to it.
std::optional<std::string> AllocateWorkspace(int device, uint64_t& workspace) {
  ScopedDevice scope(device);
  void* memory = nullptr;
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMalloc(&memory, sizeof(Workspace)), device);
  JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemset(memory, 0, sizeof(Workspace)), device);
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

// Between GPUs of one process every address is good everywhere: the regions are the parts of the
// address space.
std::vector<cuda::Region> AddressSpace() {
  std::vector<cuda::Region> regions(cuda::kMaxRegions);
  for (int i = 0; i < cuda::kMaxRegions; ++i) {
    constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
    regions[i] = {i * kSize, kSize};
  }
  return regions;
}

// Gives the member on `device` the regions of all ranks.
std::optional<std::string> WriteRegions(int device, const std::vector<RankSpec>& ranks,
                                        Workspace* workspace) {
  ScopedDevice scope(device);
  std::vector<cuda::Region> table(ranks.size() * cuda::kMaxRegions);
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const std::vector<cuda::Region>& regions = ranks[rank].regions;
    if (regions.size() > cuda::kMaxRegions) return "a rank has too many regions of memory";
    std::copy(regions.begin(), regions.end(), table.begin() + rank * cuda::kMaxRegions);
  }
  JAX_EP_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(workspace->regions, table.data(), table.size() * sizeof(cuda::Region),
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
  JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadClock(), device);
  return std::nullopt;
}

using Group = std::map<int, Member>;  // by device

// Kernels compare it with what has passed, so it may be long, but not as long as there are numbers.
uint64_t Nanoseconds(double seconds) {
  constexpr double kMaxSeconds = 1e9;
  return static_cast<uint64_t>((seconds < kMaxSeconds ? seconds : kMaxSeconds) * 1e9);
}

std::optional<std::string> AddInstance(const GroupSpec& spec, int instance,
                                       std::vector<RankSpec> ranks, Group& group) {
  const int num_ranks = static_cast<int>(ranks.size());
  if (num_ranks > cuda::kMaxRanks) {
    return "a group on one host has at most " + std::to_string(cuda::kMaxRanks) + " ranks, got " +
           std::to_string(num_ranks);
  }
  for (RankSpec& rank : ranks) {
    if (rank.regions.empty()) rank.regions = AddressSpace();
    if (rank.device < 0) continue;
    for (const RankSpec& peer : ranks) {
      if (peer.device < 0) continue;
      if (auto error = EnablePeerAccess(rank.device, peer.device)) return error;
    }
    if (auto error = LoadKernels(rank.device)) return error;
    if (rank.workspace != 0) continue;
    if (auto error = AllocateWorkspace(rank.device, rank.workspace)) return error;
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int device = ranks[rank].device;
    if (device < 0) continue;
    Member member{};
    for (int peer = 0; peer < num_ranks; ++peer) {
      member.params.peers[peer] = reinterpret_cast<Workspace*>(ranks[peer].workspace);
      member.processes.push_back(ranks[peer].process);
    }
    if (auto error = AllocateErrorRecord(device, &member.params.error)) return error;
    if (auto error = WriteRegions(device, ranks, member.params.peers[rank])) return error;
    member.params.rank = rank;
    member.params.num_ranks = num_ranks;
    member.params.instance = instance;
    member.params.arrival_timeout_ns = Nanoseconds(spec.arrival_timeout_s);
    member.params.op_timeout_ns = Nanoseconds(spec.op_timeout_s);
    member.device = device;
    member.max_blocks = spec.max_blocks;
    for (const RankSpec& peer : ranks) member.regions.push_back(peer.regions);
    for (const auto& [staged_device, staging] : spec.staging) {
      if (staged_device == device) member.staging = staging;
    }
    group[device] = member;
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

// Processes that have gone, and whether orderly.
std::map<int, bool>& Gone() {
  static auto* processes = new std::map<int, bool>;
  return *processes;
}

// Tells the member if a rank of it belongs to a process that has gone; rather of one that did not
// say goodbye.
void NoteGone(const Member& member) {
  uint32_t lost = 0;
  for (size_t rank = 0; rank < member.processes.size(); ++rank) {
    const auto gone = Gone().find(member.processes[rank]);
    if (gone == Gone().end()) continue;
    if (lost == 0 || !gone->second) lost = static_cast<uint32_t>(rank) + 1;
    if (!gone->second) break;
  }
  if (lost != 0) __atomic_store_n(&member.params.error->lost_peer, lost, __ATOMIC_RELEASE);
}

// The failure that a peer's process has gone, unless orderly and that is no failure.
std::optional<std::string> LostPeer(const Member& member, bool orderly_is_failure) {
  const uint32_t lost = __atomic_load_n(&member.params.error->lost_peer, __ATOMIC_ACQUIRE);
  if (lost == 0) return std::nullopt;
  const bool orderly = Gone()[member.processes[lost - 1]];
  if (orderly && !orderly_is_failure) return std::nullopt;
  return "jax_ep.CommunicationError: rank " + std::to_string(member.params.rank) +
         ": the process of rank " + std::to_string(lost - 1) +
         (orderly ? " has ended" : " is gone") +
         ". The group takes no more ops; start the job again.";
}

// The failure that a kernel has recorded.
std::optional<std::string> RecordedFailure(const Member& member) {
  const ErrorRecord& error = *member.params.error;
  if (__atomic_load_n(&error.set, __ATOMIC_ACQUIRE) != 1) return std::nullopt;
  return ErrorText(error);
}

}  // namespace

bool Member::IsReachable(const void* pointer, int64_t bytes) const {
  const uint64_t begin = reinterpret_cast<uint64_t>(pointer);
  const std::vector<cuda::Region>& own = regions[params.rank];
  return std::any_of(own.begin(), own.end(), [&](const cuda::Region& region) {
    return begin >= region.base && begin + bytes <= region.base + region.size;
  });
}

std::optional<std::string> CreateGroup(const GroupSpec& spec) {
  auto group = std::make_unique<Group>();
  for (const auto& [instance, ranks] : spec.instances) {
    if (auto error = AddInstance(spec, instance, ranks, *group)) return error;
  }
  std::lock_guard<std::mutex> lock(Mutex());
  for (const auto& [device, member] : *group) NoteGone(member);
  // A replaced group is kept: handlers may still hold its members.
  auto& slot = Groups()[spec.id];
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
  if (auto failure = RecordedFailure(member)) return failure;
  std::lock_guard<std::mutex> lock(Mutex());
  return LostPeer(member, /*orderly_is_failure=*/true);
}

std::optional<std::string> GroupFailure(int64_t group_id) {
  std::lock_guard<std::mutex> lock(Mutex());
  const auto group = Groups().find(group_id);
  if (group == Groups().end()) return std::nullopt;
  for (const auto& [device, member] : *group->second) {
    if (auto failure = RecordedFailure(member)) return failure;
    if (auto failure = LostPeer(member, /*orderly_is_failure=*/false)) return failure;
  }
  return std::nullopt;
}

void ReportProcess(int process, bool orderly) {
  std::lock_guard<std::mutex> lock(Mutex());
  Gone().emplace(process, orderly);  // what was said first counts
  for (const auto& [id, group] : Groups()) {
    for (const auto& [device, member] : *group) NoteGone(member);
  }
}

std::map<int, bool> GoneProcesses() {
  std::lock_guard<std::mutex> lock(Mutex());
  return Gone();
}

void FinishOps() {
  std::set<int> devices;
  {
    std::lock_guard<std::mutex> lock(Mutex());
    for (const auto& [id, group] : Groups()) {
      for (const auto& [device, member] : *group) devices.insert(device);
    }
  }
  for (const int device : devices) {
    ScopedDevice scope(device);
    cudaDeviceSynchronize();  // a GPU that has failed has nothing left to wait for
  }
}

std::optional<std::string> CompletedOps(int64_t group_id, std::map<int, uint64_t>& ops) {
  std::vector<std::pair<int, const Workspace*>> workspaces;
  {
    std::lock_guard<std::mutex> lock(Mutex());
    const auto group = Groups().find(group_id);
    if (group == Groups().end()) return "there is no group of id " + std::to_string(group_id);
    for (const auto& [device, member] : *group->second) {
      workspaces.emplace_back(device, member.params.peers[member.params.rank]);
    }
  }
  for (const auto& [device, workspace] : workspaces) {
    ScopedDevice scope(device);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
    JAX_EP_RETURN_IF_CUDA_ERROR(
        cudaMemcpy(&ops[device], &workspace->last.epoch, sizeof(uint64_t), cudaMemcpyDeviceToHost),
        device);
  }
  return std::nullopt;
}

int64_t WorkspaceBytes() { return sizeof(Workspace); }

}  // namespace jax_ep::transport
