// What a kernel must know about its group.
#pragma once

#include <cstdint>

#include "cuda/core/workspace.h"

namespace jax_ep::cuda {

struct ClockStamps;

// What every kernel of a group needs to know of it; passed by value.
struct GroupParams {
  // The op's channel of every rank's workspace, at this device's addresses; peers[rank] is its own.
  Channel* peers[kMaxRanks];
  ErrorRecord* error;     // pinned host memory
  int rank;               // index in `peers`; on this host if a group spans hosts
  int num_ranks;          // number of `peers`
  int first_rank;         // the rank of peers[0] in the group, for records
  int instance;           // which of the groups that lie side by side
  int channel;            // of the op
  int num_channels;       // of every rank's workspace
  const int32_t* coords;  // [2], rank and instance as the program counts them; null: not checked
  uint64_t arrival_timeout_ns;
  uint64_t op_timeout_ns;
  uint32_t tag;
  OpKind op;
  // Latency mode: a bit for each rank that takes no part. This rank neither waits for it nor writes
  // to it, and its pointers may be null. To a rank that is absent itself, all others are. Other
  // modes have none.
  uint32_t absent;
#ifdef JAX_EP_CLOCK_STAMPS
  ClockStamps* stamps;  // of this kernel, or null (clock_stamps.cuh)
#endif
};
static_assert(kMaxRanks <= 32, "a bit for each rank");

JAX_EP_HOST_DEVICE bool IsAbsent(const GroupParams& group, int rank) {
  return (group.absent >> rank & 1) != 0;
}

}  // namespace jax_ep::cuda
