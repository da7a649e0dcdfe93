// Hooks that stress tests build into the kernels: delays that bring races to light; mutations, each
// of which removes one wait, to show that the tests would notice; a shorter ring, which few tokens
// fill; and ranks that stop in the middle of an op or do not send some words. The library has none
// of them.
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"

namespace jax_ep::cuda {

#ifdef JAX_EP_MUTATION
constexpr int kMutation = JAX_EP_MUTATION;
#else
constexpr int kMutation = 0;
#endif

// The waits that can be removed.
constexpr int kWithoutArrival = 1;     // of peers' inputs
constexpr int kWithoutClose = 2;       // until peers have read this rank's inputs
constexpr int kWithoutRingReady = 3;   // for sums of peers
constexpr int kWithoutRingFree = 4;    // until home has read a slot
constexpr int kWithoutPlanWords = 5;   // for the messages of the plan that pushes
constexpr int kWithoutPlanTotals = 6;  // for the totals of the plan that pulls
constexpr int kWithoutCredit = 8;      // until a host has read the chunk before
constexpr int kWithoutChunk = 9;       // for a chunk at its forwarder
constexpr int kWithoutDone = 10;       // until the ranks of the host have read a chunk
constexpr int kWithoutPart = 12;       // for the ranks' sums of a chunk
constexpr int kWithoutPartDone = 13;   // until the forwarder has read them
constexpr int kWithoutHome = 14;       // for the chunks that come home
constexpr int kWithoutTeam = 15;       // until all warps of a team have done a chunk
constexpr int kWithoutStamp = 16;      // latency mode: for words
constexpr int kWithoutHello = 17;      // latency mode: until all ranks have begun the op
// Not waits: in latency mode, all ops use the same half of the inboxes, or words get their stamps
// before their bytes.
constexpr int kWithOneSlot = 18;
constexpr int kStampEarly = 19;
// Not waits: a chunk and its signal are sent by two calls without an order between them, or the
// signal by the first one.
constexpr int kWithSeparateSignal = 11;
constexpr int kWithEarlySignal = 20;
// Waits of a dispatch behind its plan: until peers have begun that plan, until it is there, and for
// the rows that are cast meanwhile.
constexpr int kWithoutPlansBegun = 21;
constexpr int kWithoutPlan = 22;
constexpr int kWithoutCast = 23;
// Not a wait: the epoch tells addresses from those of earlier ops.
constexpr int kNumberByEpoch = 7;

// The most slots of the ring that are used for the sums of one peer.
#ifdef JAX_EP_TEST_RING_SLOTS
constexpr int kMostRingSlots = JAX_EP_TEST_RING_SLOTS;
#else
constexpr int kMostRingSlots = 1 << 30;
#endif

// Some blocks, at some points of some ops, wait for up to 30 us. With the number of a warp, so do
// some warps of some blocks.
__device__ __forceinline__ void TestDelay([[maybe_unused]] int rank,
                                          [[maybe_unused]] uint64_t epoch,
                                          [[maybe_unused]] uint32_t point,
                                          [[maybe_unused]] uint32_t warp = 0) {
#ifdef JAX_EP_TEST_DELAYS
  uint32_t x = static_cast<uint32_t>(epoch) * 2654435761u ^ point * 40503u ^
               (blockIdx.x + 1) * 2246822519u ^ (rank + 1) * 3266489917u ^ warp * 668265263u;
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  if (x % 4 == 0) __nanosleep(x / 4 % 30000);
#endif
}

// Only the lower half of a tag is sent. In tests, the upper half is 0, or 1 + the number of items
// after which the rank stops, or kWithholds + the kind of the words that the rank sends to no peer.
constexpr uint32_t kWithholds = 0xff00;

// Whether this rank stops in this op like one whose process is gone. Each warp of combine stops
// after that number of items, and no block ends the op.
__device__ __forceinline__ bool TestStops([[maybe_unused]] uint32_t tag,
                                          [[maybe_unused]] uint32_t num_items) {
#ifdef JAX_EP_TEST_STOPS
  return tag >> 16 != 0 && tag >> 16 < kWithholds && num_items >= (tag >> 16) - 1;
#else
  return false;
#endif
}

// Whether this rank sends none of its words of this kind to the peer in this op.
__device__ __forceinline__ bool TestWithholds([[maybe_unused]] const GroupParams& group,
                                              [[maybe_unused]] int peer,
                                              [[maybe_unused]] WordKind word) {
#ifdef JAX_EP_TEST_STOPS
  return group.tag >> 16 == kWithholds + static_cast<uint32_t>(word) && peer != group.rank;
#else
  return false;
#endif
}

}  // namespace jax_ep::cuda
