// Who can reach whose memory: the ranks of a group, their workspaces and their failures.
//
// Within a process, GPUs reach each other's memory by plain pointers once peer access is on.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/group_params.h"

namespace jax_ep::transport {

// What one rank of a group needs to launch ops; lives until the process ends.
struct Member {
  cuda::GroupParams params;  // without tag and op
  int device;                // CUDA ordinal
};

// Makes group `group_id` of GPUs of this process, eagerly: workspaces, peer access, loaded kernels.
// `instances` are the groups that lie side by side in the mesh: CUDA ordinals in rank order.
// Replaces a group of the same id, which must be idle. Returns an error text, or nothing.
std::optional<std::string> CreateGroup(int64_t group_id,
                                       const std::vector<std::vector<int>>& instances,
                                       double arrival_timeout_s, double op_timeout_s);

// The member of group `group_id` on `device`, or null.
const Member* FindMember(int64_t group_id, int device);

// The first failure of `member`, as a text for CommunicationError, or nothing.
std::optional<std::string> Failure(const Member& member);

// The first failure of any member of the group in this process, or nothing.
std::optional<std::string> GroupFailure(int64_t group_id);

// Bytes of device memory that a group takes on each of its GPUs.
int64_t WorkspaceBytes();

}  // namespace jax_ep::transport
