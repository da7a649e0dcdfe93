// What a kernel must know about a group that spans hosts.
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/network/layout.h"

namespace jax_ep::cuda {

// Passed by value. Rank `host * host_ranks + index` is the one with that index on that host.
struct NetworkParams {
  GroupParams node;         // the ranks of this host; node.rank is this rank's index
  char* memory[kMaxRanks];  // network memory of the ranks of this host, as this device maps it
  NetworkShape shape;
  int32_t host;                   // this rank's
  const int32_t* counterpart_pe;  // [P], processing elements of the ranks with this index

  __device__ NetworkMemory Of(int32_t index) const { return NetworkMemory(memory[index], shape); }
  __device__ NetworkMemory Own() const { return Of(node.rank); }
  // The rank with this index on a host, as Fail and waits count it: from this host's first rank.
  __device__ int32_t Peer(int32_t of_host, int32_t index) const {
    return (of_host - host) * shape.host_ranks + index;
  }
};

}  // namespace jax_ep::cuda
