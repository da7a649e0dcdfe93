// The groups of this process, by id: made, found, and asked how they fare.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cuda/core/workspace.h"
#include "transport/member.h"
#include "transport/registry.h"

namespace jax_ep::transport {

// A rank of a group, as this process sees it.
struct RankSpec {
  int device = -1;  // CUDA ordinal, or -1 for a rank of another process
  int process = 0;  // that the rank belongs to
  // Where this process has it, and its inboxes of latency mode after it; 0: allocate them (ranks of
  // this process).
  uint64_t workspace = 0;
  // What peers can read of the rank's memory, in an order that all agree on, as this process has
  // it; none: everything.
  std::vector<cuda::Region> regions;
};

struct GroupSpec {
  int64_t id = 0;
  // The groups that lie side by side in the mesh, by number: ranks in order. Only those with ranks
  // here.
  std::map<int, std::vector<RankSpec>> instances;
  // Where a group spans hosts, `instances` have the ranks of this host only, and this is what the
  // first of them is in the group.
  int first_rank = 0;
  double arrival_timeout_s = 0;
  double op_timeout_s = 0;
  int max_blocks = 0;                            // of an op on one GPU
  int ranks_per_gpu = 1;                         // at most
  int num_channels = 1;                          // of each workspace
  int latency_tokens = 0;                        // T of latency mode at most; 0: there is none
  int latency_hidden = 0;                        // H likewise, of 16 bits
  std::vector<int> absent_ranks;                 // of latency mode, which take no part
  std::vector<std::pair<int, Staging>> staging;  // by device; none: nothing is staged
};

// Makes a group, eagerly: workspaces and peer access. Its kernels have to be loaded (they must not
// be while a peer waits in one). Replaces a group of the same id, which must be idle. Returns an
// error text, or nothing.
std::optional<std::string> CreateGroup(const GroupSpec& spec);

// The member of group `group_id` on `device`, or null.
const Member* FindMember(int64_t group_id, int device);

// Of these groups.
const Registry* OwnRegistry();

// The first failure of any member of the group in this process, or nothing. Not one: a peer whose
// process has ended orderly.
std::optional<std::string> GroupFailure(int64_t group_id);

// Notes that a process has gone, in all groups with ranks of it: waits for its ranks end.
void ReportProcess(int process, bool orderly);

// Waits until the GPUs of this process that are in groups have done what was launched on them.
void FinishOps();

// Ops that each GPU of this process has completed as a member of the group, by CUDA ordinal. Waits
// for its work. Returns an error text, or nothing.
std::optional<std::string> CompletedOps(int64_t group_id, std::map<int, uint64_t>& ops);

// Bytes of device memory that a group takes on each of its GPUs: its channels, and for each an
// inbox of latency mode for so many tokens a rank and channels of 16 bits.
int64_t WorkspaceBytes(int num_channels, int num_ranks, int latency_tokens, int latency_hidden);

}  // namespace jax_ep::transport
