// The symmetric workspace: the memory of a rank that its peers write to, as one type.
//
// Every rank of a group has one, in device memory that all peers of its host map. Rows do not pass
// through it, because peers read each other's XLA buffers in place, at the addresses published
// here. Only sums of rows pass through it (ring), because they exist in no buffer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::cuda {

// Ranks of one group on one host.
constexpr int kMaxRanks = 32;
// Experts over the whole group.
constexpr int kMaxExperts = 4096;
// Addresses that one op publishes.
constexpr int kMaxAddresses = 3;
// Memory for the messages of one plan, in words. Consecutive plans alternate between two of these.
// A little less than a power of two, so that a workspace of two channels takes at most 90 MiB.
constexpr int kInboxWords = (1 << 19) - (1 << 12);
// Memory for the sums of rows in flight.
constexpr int kRingBytes = 32 << 20;
// The most sums in flight from one rank, and the most parts that a sum is sent in.
constexpr int kMaxRingSlots = 2048;
constexpr int kMaxParts = 4;
// Chunks of a rank's rows that a dispatch casts.
constexpr int kCastChunks = 8;

// A range of a rank's memory that its peers can read, at the address where the owner of the list
// maps it. Between GPUs of one process addresses are the same everywhere, and the regions are parts
// of the address space.
struct Region {
  uint64_t base;
  uint64_t size;
};
constexpr int kMaxRegions = 8;
constexpr int kRegionShift = 45;  // 8 regions of 2^45 bytes at most: 48 bits

// A flag on a cache line of its own. Its value is FlagValue(epoch, tag).
struct alignas(128) Flag {
  uint64_t value;
};

// The epoch numbers the ops of a group. The tag says which op it is, so that ranks notice if they
// are out of step.
constexpr int kTagBits = 16;
JAX_EP_HOST_DEVICE uint64_t FlagValue(uint64_t epoch, uint32_t tag) {
  return epoch << kTagBits | (tag & ((1u << kTagBits) - 1));
}

// The numbers of an op: its epoch, and how many ops of the group, up to this one, have published
// addresses. All ranks run the same ops, so both are the same on all ranks.
struct alignas(16) OpNumbers {
  uint64_t epoch;
  uint64_t publication;
};

// Words that carry a number of the op beside the value need no flag: a reader that finds the number
// has the value too. An address is sent as region and offset, which leaves only 16 bits for a
// number. They count publications, not epochs. Each publication writes all addresses, so the word
// before always has the number before, however many epochs have passed.
JAX_EP_HOST_DEVICE uint64_t PackAddress(uint64_t region, uint64_t offset, uint64_t publication) {
  return (region << kRegionShift | offset) << 16 | (publication & 0xffff);
}
JAX_EP_HOST_DEVICE uint64_t PackCount(int32_t count, uint64_t epoch) {
  return static_cast<uint64_t>(static_cast<uint32_t>(count)) << 32 | (epoch & 0xffffffff);
}
// A word of the ring: the token whose sum is in the slot, or has been read.
JAX_EP_HOST_DEVICE uint64_t RingWord(int32_t token, uint64_t epoch) {
  return epoch << 32 | static_cast<uint32_t>(token);
}

// The number of sums that the ring holds for each other rank; 0 if a row is too long.
JAX_EP_HOST_DEVICE int32_t RingSlots(int32_t num_ranks, int64_t row_bytes) {
  if (row_bytes == 0) return kMaxRingSlots;
  const int64_t bytes = (num_ranks > 1 ? num_ranks - 1 : 1) * row_bytes;  // one slot for each
  const int32_t slots = bytes > kRingBytes ? 0 : kRingBytes / static_cast<int32_t>(bytes);
  return slots < kMaxRingSlots ? slots : kMaxRingSlots;
}

// A mark in the count of finished blocks: an op of this rank has failed. Never reset.
constexpr uint32_t kFailedHere = 1u << 31;

// The phase of an op: what it waits for.
enum class Phase : uint32_t {
  kArrival = 0,  // a peer's inputs
  kClose = 1,    // a peer's last read of this rank's inputs
  kRows = 2,     // a peer's partial sums, or its totals of the plan
};

// The kind of word that a wait reads. It says how `expected` and `seen` of an ErrorRecord are
// packed.
enum class WordKind : uint32_t {
  kNone = 0,         // the failure is not about a word
  kArrivalFlag = 1,  // FlagValue
  kCloseFlag = 2,    // FlagValue
  kAddress = 3,      // PackAddress; expected is only the number of the publication
  kTotal = 4,        // PackCount of the plan that reads; expected is only the epoch
  kMessage = 5,      // PackCount of the plan that sends; expected is only the epoch
  kSum = 6,          // RingWord: a sum is in its slot of the ring
  kSumRead = 7,      // RingWord: home has read the sum
  // ChunkWord (network/layout.h):
  kChunkArrived = 8,  // a chunk of a counterpart on another host
  kChunkReady = 9,    // a chunk at its forwarder
  kChunkDone = 10,    // a rank of this host has read a chunk
  kCredit = 11,       // another host has read the chunk before in this slot
  kPart = 12,         // a rank's sums of a chunk's rows
  kPartDone = 13,     // the forwarder has read this rank's part
  // Latency mode (decode/inbox.h); expected and seen are stamps, of hello FlagValue(stamp, tag):
  kHello = 14,      // a peer has begun the op
  kIds = 15,        // the ids of a token
  kRowWords = 16,   // a row of a dispatch
  kSumWords = 17,   // a rank's sum for a token
  kCastChunk = 18,  // RingWord: a chunk of the rows that a peer casts
};

JAX_EP_HOST_DEVICE Phase PhaseOf(WordKind word) {
  switch (word) {
    case WordKind::kCloseFlag:
      return Phase::kClose;
    case WordKind::kTotal:
    case WordKind::kSum:
    case WordKind::kSumRead:
    case WordKind::kChunkDone:
    case WordKind::kPart:
    case WordKind::kPartDone:
    case WordKind::kRowWords:
    case WordKind::kCastChunk:
      return Phase::kRows;
    default:
      return Phase::kArrival;
  }
}

// The first failure of a group on one rank. It is in pinned host memory, so that the host can read
// it in any state of the device. `set` is written last.
struct ErrorRecord {
  uint32_t set;
  uint32_t kind;  // ErrorKind
  uint32_t rank;  // of the group
  uint32_t peer;  // of the group
  uint32_t op;    // OpKind
  uint32_t word;  // WordKind
  uint64_t expected;
  uint64_t seen;
  uint64_t waited_ns;
  // Written by the host and polled by every wait: 1 + the rank of a peer once its process is gone,
  // else 0.
  uint32_t lost_peer;
};

enum class ErrorKind : uint32_t {
  kTimeout = 1,      // a peer did not come within the deadline
  kMismatch = 2,     // a peer came with another op
  kAborted = 3,      // a peer reported a failure
  kPeerLost = 4,     // the process of a peer is gone
  kUnreachable = 5,  // an input of this rank is in memory that peers cannot read
  kConcurrent = 6,   // another op of the group was running
  kMisplaced = 7,    // the program's mesh has another rank in this place
  kUnpaired = 8,     // latency mode: start and done calls of a channel do not alternate
};

enum class OpKind : uint32_t { kPlan = 0, kDispatch = 1, kCombine = 2, kCombineVjp = 3 };

// The memory that consecutive ops of a group use: epoch, flags, inbox and ring. Ops of a group that
// run at the same time must be on different channels. All ranks run the ops of one channel in the
// same order.
struct Channel {
  // Peer r writes entry r, for the op of that epoch. One of each is enough, because no rank begins
  // the next op before all have closed this one. Arrival has two, because an op that does not wait
  // for the others' end may be followed by the next one's arrival.
  Flag arrival[2][kMaxRanks];                    // by epoch % 2: its inputs are ready
  Flag close[kMaxRanks];                         // it reads this rank's inputs no more
  uint64_t addresses[kMaxRanks][kMaxAddresses];  // of its inputs, PackAddress
  uint64_t totals[kMaxRanks]
                 [kMaxExperts + kMaxRanks];    // plan: its entries of each column, PackCount
  alignas(16) uint64_t inbox[2][kInboxWords];  // plan: messages, by epoch % 2
  // Combine: slot (token % slots) of rank r's share of the ring holds a part of a sum ...
  // (In a dispatch that casts: chunk n of rank r's rows is there, node/cast.h.)
  uint64_t ring_ready[kMaxRanks][kMaxRingSlots * kMaxParts];
  // ... and the part that this rank had put there, at home r, has been read.
  uint64_t ring_free[kMaxRanks][kMaxRingSlots * kMaxParts];
  alignas(1024) char ring[kRingBytes];
  // Any rank, on all channels: not 0 once a rank of the group has failed. Never reset.
  uint32_t failed;
  // This rank only:
  Region regions[kMaxRanks][kMaxRegions];       // of every rank, as this device maps them; the same
                                                // on all channels
  uint32_t active;                              // 1 while an op of the channel runs
  uint32_t blocks_arrived;                      // of the running kernel
  uint32_t blocks_done;                         // of the running kernel; and kFailedHere
  uint32_t tickets;                             // of the running kernel (Tickets); zero between ops
  uint32_t cast_pieces[kCastChunks];            // of the running cast, done; zero between casts
  uint32_t plan_blocks;                         // of a plan with a dispatch behind it, that have
                                                // written their results; zero between ops
  OpNumbers last;                               // epoch and publication that completed last
  int32_t num_invalid;                          // plan: of the running kernel; zero between plans
  int32_t own_totals[kMaxExperts + kMaxRanks];  // plan: this rank's totals; zero between plans
};

// The channels that a workspace may have: channel 0 for the ops that XLA runs in its own order of
// the program, and one for each op that may run beside them (asynchronous targets).
constexpr int kMaxChannels = 4;

// As many channels as the group was made with follow each other. There is no memory for others: the
// inboxes of latency mode come next (decode/inbox.h), if the group has that mode. So the size of a
// workspace is never that of this type.
struct Workspace {
  Channel channels[kMaxChannels];
};

JAX_EP_HOST_DEVICE constexpr int64_t ChannelsBytes(int num_channels) {
  return int64_t{num_channels} * static_cast<int64_t>(sizeof(Channel));
}
static_assert(ChannelsBytes(2) <= 90 << 20, "of a group that was made without options");

}  // namespace jax_ep::cuda
