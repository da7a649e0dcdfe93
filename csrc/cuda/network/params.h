// What a kernel must know about a group that spans hosts.
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/network/layout.h"

namespace jax_ep::cuda {

// The rank with the same index on another host.
struct Counterpart {
  int32_t pe;    // its processing element
  char* memory;  // its network memory as this device maps it; null: only the network reaches it
};

// Passed by value. Rank `host * host_ranks + index` is the one with that index on that host.
struct NetworkParams {
  GroupParams node;         // the ranks of this host; node.rank is this rank's index
  char* memory[kMaxRanks];  // network memory of the ranks of this host, as this device maps it
  NetworkShape shape;
  int32_t host;                     // this rank's
  const Counterpart* counterparts;  // [P], the ranks with this index

  JAX_EP_HOST_DEVICE NetworkMemory Of(int32_t index) const {
    return NetworkMemory(memory[index], shape);
  }
  JAX_EP_HOST_DEVICE NetworkMemory Own() const { return Of(node.rank); }
  // The rank with this index on a host, as Fail and waits name it: counted from this host's first.
  JAX_EP_HOST_DEVICE int32_t Peer(int32_t of_host, int32_t index) const {
    return (of_host - host) * shape.host_ranks + index;
  }
};

}  // namespace jax_ep::cuda
