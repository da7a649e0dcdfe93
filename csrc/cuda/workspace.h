// The symmetric workspace: the memory of a rank that its peers write to, as one type.
//
// Every rank of a group has one, in device memory that all peers of its host map. Payload never
// passes through it: peers read each other's XLA buffers in place, at the addresses published here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::cuda {

// Ranks of one group on one host.
constexpr int kMaxRanks = 32;
// Experts over the whole group.
constexpr int kMaxExperts = 4096;
// Chunks of the tokens of one rank that combine signals one by one.
constexpr int kMaxRowChunks = 128;
// Addresses that one op publishes.
constexpr int kMaxAddresses = 3;

// A flag on a cache line of its own. Its value is FlagValue(epoch, tag).
struct alignas(128) Flag {
  uint64_t value;
};

// The epoch numbers the ops of a group; the tag tells which op it is, so that ranks that fell out
// of step find out.
constexpr int kTagBits = 16;
JAX_EP_HOST_DEVICE uint64_t FlagValue(uint64_t epoch, uint32_t tag) {
  return epoch << kTagBits | (tag & ((1u << kTagBits) - 1));
}

// Words that carry the epoch beside the value need no flag of their own: who finds the epoch has
// the value too. An address is below 2^48; 16 bits of the epoch tell an op from the one before it.
JAX_EP_HOST_DEVICE uint64_t PackAddress(const void* address, uint64_t epoch) {
  return reinterpret_cast<uint64_t>(address) << 16 | (epoch & 0xffff);
}
JAX_EP_HOST_DEVICE uint64_t PackCount(int32_t count, uint64_t epoch) {
  return static_cast<uint64_t>(static_cast<uint32_t>(count)) << 32 | (epoch & 0xffffffff);
}

// What an op waits for.
enum class Phase : uint32_t {
  kArrival = 0,  // a peer's inputs
  kClose = 1,    // a peer's last read of this rank's inputs
  kRows = 2,     // a peer's partial sums
};

// The first failure of a group on one rank, in pinned host memory, so that it can be read whatever
// state the device is in. `set` is written last.
struct ErrorRecord {
  uint32_t set;
  uint32_t kind;  // ErrorKind
  uint32_t rank;
  uint32_t peer;
  uint32_t op;  // OpKind
  uint32_t phase;
  uint64_t expected;
  uint64_t seen;
  uint64_t waited_ns;
};

enum class ErrorKind : uint32_t {
  kTimeout = 1,   // a peer did not come within the deadline
  kMismatch = 2,  // a peer came with another op
  kAborted = 3,   // a peer reported a failure
};

enum class OpKind : uint32_t { kPlan = 0, kDispatch = 1, kCombine = 2, kCombineVjp = 3 };

struct Workspace {
  // Written by peer r into entry r, for the op of that epoch. One of each is enough: no rank begins
  // the next op before all have closed this one.
  Flag arrival[kMaxRanks];                       // its inputs are ready, its addresses below
  Flag close[kMaxRanks];                         // it reads this rank's inputs no more
  uint64_t rows[kMaxRanks][kMaxRowChunks];       // combine: its partial sums of a chunk are ready
  uint64_t addresses[kMaxRanks][kMaxAddresses];  // of its inputs, PackAddress
  uint64_t totals[kMaxRanks]
                 [kMaxExperts + kMaxRanks];  // plan: its entries of each column, PackCount
  // Any rank: not 0 once a rank of the group has failed. Never reset.
  uint32_t failed;
  // This rank only:
  uint32_t chunk_tokens[kMaxRanks][kMaxRowChunks];  // combine: tokens done of a chunk
  uint32_t blocks_arrived;                          // of the running kernel
  uint32_t blocks_done;                             // of the running kernel
  uint64_t epoch;                                   // of the last op that completed
  int32_t num_invalid;                          // plan: of the running kernel; zero between plans
  int32_t own_totals[kMaxExperts + kMaxRanks];  // plan: this rank's totals; zero between plans
};

}  // namespace jax_ep::cuda
