#include "transport/groups.h"

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "transport/cuda_status.h"
#include "transport/failures.h"
#include "transport/peer_access.h"

namespace jax_ep::transport {
namespace {

using cuda::Workspace;

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
  const int64_t channel_bytes = cuda::ChannelsBytes(spec.num_channels);
  const int64_t inbox_bytes =
      cuda::DecodeInboxBytes(num_ranks, spec.latency_tokens, spec.latency_hidden);
  for (RankSpec& rank : ranks) {
    if (rank.regions.empty()) rank.regions = AddressSpace();
    if (rank.device < 0) continue;
    for (const RankSpec& peer : ranks) {
      if (peer.device < 0) continue;
      if (auto error = EnablePeerAccess(rank.device, peer.device)) return error;
    }
    if (rank.workspace != 0) continue;
    if (auto error = AllocateWorkspace(rank.device, channel_bytes + spec.num_channels * inbox_bytes,
                                       rank.workspace)) {
      return error;
    }
  }
  uint32_t absent = 0;
  for (const int rank : spec.absent_ranks) absent |= uint32_t{1} << rank;
  std::vector<std::vector<cuda::Region>> regions;
  for (const RankSpec& rank : ranks) regions.push_back(rank.regions);
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int device = ranks[rank].device;
    if (device < 0) continue;
    Member member{};
    for (int peer = 0; peer < num_ranks; ++peer) {
      member.workspaces.push_back(reinterpret_cast<Workspace*>(ranks[peer].workspace));
      const bool is_absent = (absent >> peer & 1) != 0;
      member.processes.push_back(is_absent ? kNoProcess : ranks[peer].process);
    }
    if (inbox_bytes != 0) {
      for (int peer = 0; peer < num_ranks; ++peer) {
        if (ranks[peer].workspace == 0) continue;  // of an absent rank
        member.inboxes.of[peer] =
            reinterpret_cast<cuda::DecodeInbox*>(ranks[peer].workspace + channel_bytes);
      }
      member.inboxes.half_words =
          cuda::DecodeHalfWords(num_ranks, spec.latency_tokens, spec.latency_hidden);
      member.inbox_bytes = inbox_bytes;
    }
    if (auto error = AllocateErrorRecord(device, &member.params.error)) return error;
    member.params.num_channels = spec.num_channels;
    if (auto error = WriteRegions(device, regions, spec.num_channels, member.workspaces[rank])) {
      return error;
    }
    member.params.rank = rank;
    member.params.num_ranks = num_ranks;
    member.params.first_rank = spec.first_rank;
    member.params.instance = instance;
    const uint32_t own = uint32_t{1} << rank;
    member.params.absent = (absent & own) != 0 ? ~own : absent;
    member.params.arrival_timeout_ns = Nanoseconds(spec.arrival_timeout_s);
    member.params.op_timeout_ns = Nanoseconds(spec.op_timeout_s);
    member.device = device;
    member.max_blocks = spec.max_blocks;
    member.ranks_per_gpu = spec.ranks_per_gpu;
    member.regions = regions;
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

}  // namespace

std::optional<std::string> CreateGroup(const GroupSpec& spec) {
  if (spec.num_channels < 1 || spec.num_channels > cuda::kMaxChannels) {
    return "a group has 1 to " + std::to_string(cuda::kMaxChannels) + " channels, got " +
           std::to_string(spec.num_channels);
  }
  auto group = std::make_unique<Group>();
  for (const auto& [instance, ranks] : spec.instances) {
    if (auto error = AddInstance(spec, instance, ranks, *group)) return error;
  }
  std::lock_guard<std::mutex> lock(Mutex());
  for (const auto& [device, member] : *group) TellGone(member);
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

const Registry* OwnRegistry() {
  static const Registry registry = {sizeof(Member), FindMember,
                                    [](const Member& member) { return Failure(member); }};
  return &registry;
}

std::optional<std::string> GroupFailure(int64_t group_id) {
  std::lock_guard<std::mutex> lock(Mutex());
  const auto group = Groups().find(group_id);
  if (group == Groups().end()) return std::nullopt;
  for (const auto& [device, member] : *group->second) {
    if (auto failure = Failure(member, /*orderly_is_failure=*/false)) return failure;
  }
  return std::nullopt;
}

void ReportProcess(int process, bool orderly) {
  NoteGone(process, orderly);
  std::lock_guard<std::mutex> lock(Mutex());
  for (const auto& [id, group] : Groups()) {
    for (const auto& [device, member] : *group) TellGone(member);
  }
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
  std::vector<const Member*> members;
  {
    std::lock_guard<std::mutex> lock(Mutex());
    const auto group = Groups().find(group_id);
    if (group == Groups().end()) return "there is no group of id " + std::to_string(group_id);
    for (const auto& [device, member] : *group->second) {
      members.push_back(&member);
    }
  }
  for (const Member* member : members) {
    const int device = member->device;
    ScopedDevice scope(device);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize(), device);
    const Workspace* workspace = member->workspaces[member->params.rank];
    for (int channel = 0; channel < member->params.num_channels; ++channel) {
      uint64_t epoch = 0;
      JAX_EP_RETURN_IF_CUDA_ERROR(cudaMemcpy(&epoch, &workspace->channels[channel].last.epoch,
                                             sizeof(epoch), cudaMemcpyDeviceToHost),
                                  device);
      ops[device] += epoch;
    }
    for (int channel = 0; channel < member->params.num_channels; ++channel) {
      const cuda::DecodeInbox* inbox = member->InboxesOn(channel).of[member->params.rank];
      if (inbox == nullptr) break;
      uint64_t epoch = 0;
      JAX_EP_RETURN_IF_CUDA_ERROR(
          cudaMemcpy(&epoch, &inbox->epochs[0], sizeof(epoch), cudaMemcpyDeviceToHost), device);
      ops[device] += epoch;
    }
  }
  return std::nullopt;
}

int64_t WorkspaceBytes(int num_channels, int num_ranks, int latency_tokens, int latency_hidden) {
  return cuda::ChannelsBytes(num_channels) +
         num_channels * cuda::DecodeInboxBytes(num_ranks, latency_tokens, latency_hidden);
}

}  // namespace jax_ep::transport
