// What a group that spans hosts has beside the group of this host's ranks (transport/groups.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/network/params.h"

namespace jax_ep::transport {

// How a group uses the network. All ranks agree on it.
struct NetworkSpec {
  int64_t group_id = 0;
  int device = -1;                   // CUDA ordinal of the rank of this process
  int host = 0;                      // its host, of those of the group
  std::vector<std::vector<int>> pe;  // [hosts][ranks of a host], processing elements
  int num_lanes = 0;
  int chunk_bytes = 0;
  int64_t message_bytes = 0;  // of a plan's choices for one host
  int64_t offset = 0;         // of the group's part in the memory of every processing element
};

// One rank of such a group; lives until the process ends.
struct NetworkMember {
  cuda::NetworkParams params;  // without `node`
  int64_t message_bytes;
};

// Bytes of a group's part, a multiple of 1024.
int64_t NetworkBytes(const cuda::NetworkShape& shape, int64_t message_bytes);

// Adds the network to a group that has been made. NVSHMEM has to run. Replaces that of a group of
// the same id. Returns an error text, or nothing.
std::optional<std::string> AddNetwork(const NetworkSpec& spec);

// That of the rank on `device`, or null.
const NetworkMember* FindNetworkMember(int64_t group_id, int device);

}  // namespace jax_ep::transport
