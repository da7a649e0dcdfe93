// What a kernel needs to know of its group.
#pragma once

#include <cstdint>

#include "cuda/core/workspace.h"

namespace jax_ep::cuda {

// What every kernel of a group needs to know of it; passed by value.
struct GroupParams {
  // The op's channel of every rank's workspace, as this device maps them; peers[rank] is its own.
  Channel* peers[kMaxRanks];
  ErrorRecord* error;     // pinned host memory
  int rank;               // of those here; where a group spans hosts, on this host
  int num_ranks;          // that `peers` has
  int first_rank;         // what the first of them is in the group: records name ranks of the group
  int instance;           // which of the groups side by side
  int channel;            // of the op
  const int32_t* coords;  // [2], rank and instance as the program counts them; null: not checked
  uint64_t arrival_timeout_ns;
  uint64_t op_timeout_ns;
  uint32_t tag;
  OpKind op;
};

}  // namespace jax_ep::cuda
