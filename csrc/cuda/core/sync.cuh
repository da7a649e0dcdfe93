// How the ranks of a group keep step inside kernels: arrival, closing, deadlines and failures.
//
// Every op of a group is one kernel on each rank, or two (plan/pull.cu), and runs in these steps:
//
//   1. BeginOp: all blocks learn the numbers of the op.
//   2. Publish: once this rank's inputs are ready, it tells every peer their addresses.
//   3. WaitInputs: every block waits until all peers have done so; then it may read their inputs.
//   4. EndOp: the last block to finish tells every peer that this rank reads no more, and waits
//      until all peers have said the same; then the inputs may be reused. An op whose inputs no
//      peer reads ends without that (EndOpAtOnce).
//
// A wait that passes its deadline, or that meets another op, records the failure, tells all peers
// and returns false. From then on every wait of the group returns false at once. Nothing traps: the
// last block overwrites all results with poison. And a rank that has failed does not close. So if a
// rank fails before it has read everything, the op fails on all ranks (EndOp).
//
// Order of memory, as PTX defines it. A word that tells a peer that memory is ready, or has been
// read, is released at system scope: by a release store, or by a fence of system scope and a
// relaxed store of the same thread. Earlier accesses of other threads are included, because these
// threads have met that thread at a barrier (of a warp or a block) or through a counter between
// fences (IsLastBlock). The peer acquires the word at system scope, and its other threads meet the
// thread that did. Words that hand no memory over, because they contain all of their message, use
// relaxed stores without a fence (the plans' counts and ids, and the arrival flag of plan/push.cu).
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/core/ptx.cuh"
#include "cuda/core/test_hooks.cuh"
#include "cuda/core/workspace.h"

namespace jax_ep::cuda {

__device__ __forceinline__ Channel& Own(const GroupParams& group) {
  return *group.peers[group.rank];
}

// A channel of a rank's workspace other than the op's.
__device__ __forceinline__ Channel& OnChannel(const GroupParams& group, int rank, int channel) {
  Channel* own = group.peers[rank];
  return *(own - group.channel + channel);
}

// Records the failure unless there was one before, and tells all peers of this host. `peer` counts
// from the first rank of this host, so it is negative for ranks of earlier hosts. This function is
// not inlined, like all code that runs only when a wait takes long, because there are many waits
// and their code should stay short.
__device__ __noinline__ inline void Fail(const GroupParams& group, ErrorKind kind, WordKind word,
                                         int peer, uint64_t expected, uint64_t seen,
                                         uint64_t waited_ns) {
  // Its own flag belongs to another op, which runs beside this one.
  if (kind == ErrorKind::kMismatch && peer == group.rank) kind = ErrorKind::kConcurrent;
  ErrorRecord* error = group.error;
  if (atomicCAS_system(&error->set, 0u, 2u) == 0u) {
    error->kind = static_cast<uint32_t>(kind);
    error->rank = group.first_rank + group.rank;
    error->peer = group.first_rank + peer;
    error->op = static_cast<uint32_t>(group.op);
    error->word = static_cast<uint32_t>(word);
    error->expected = expected;
    error->seen = seen;
    error->waited_ns = waited_ns;
    ptx::StoreReleaseSystem(&error->set, 1u);
  }
  for (int r = 0; r < group.num_ranks; ++r) {
    if (IsAbsent(group, r)) continue;
    for (int channel = 0; channel < group.num_channels; ++channel) {
      ptx::StoreReleaseSystem(&OnChannel(group, r, channel).failed, 1u);
    }
  }
  // All peers are told before a block acts on the mark, because after that the inputs that they
  // read may be gone.
  ptx::FenceAcquireReleaseSystem();
  atomicOr(&Own(group).blocks_done, kFailedHere);
}

// Bounds a wait. Continue is called now and then while the wait goes on.
class Deadline {
 public:
  // False once the group has failed. `expected` and `seen`, packed as `word` says, are for the
  // report. For a message, all bits of the epoch are expected.
  __device__ __forceinline__ bool Continue(const GroupParams& group, WordKind word, int peer,
                                           uint64_t expected, uint64_t seen) {
    if (++spins_ % 64 != 0) return true;
    const uint64_t looked = Look(group, word, peer, expected, seen, spins_, looked_);
    if (looked != 0) looked_ = looked;
    return looked != 0;
  }

 private:
  // Says when the wait began, with kLost if a peer's process was gone; 0 once the group has failed.
  // It takes and gives numbers: were it a method of the object, this would lie in local memory,
  // which every turn of a wait would read and write.
  __device__ static __noinline__ uint64_t Look(const GroupParams& group, WordKind word, int peer,
                                               uint64_t expected, uint64_t seen, uint32_t spins,
                                               uint64_t looked) {
    if (ptx::LoadAcquireSystem(&Own(group).failed) != 0u) {
      Fail(group, ErrorKind::kAborted, word, peer, expected, seen, 0);
      return 0;
    }
    // A peer at another op may never send the message that this rank waits for. The other waits are
    // for flags, which name their op, or begin after the peer's arrival flag was right.
    if (word == WordKind::kMessage) {
      const uint64_t epoch = expected;
      const uint64_t flag = FlagValue(epoch, group.tag);
      const uint64_t arrival = ptx::LoadAcquireSystem(&Own(group).arrival[epoch % 2][peer].value);
      if (arrival >> kTagBits >= epoch && arrival != flag) {
        Fail(group, ErrorKind::kMismatch, WordKind::kArrivalFlag, peer, flag, arrival, 0);
        return 0;
      }
    }
    const uint64_t now = ptx::GlobalTimer();
    const uint64_t start = looked == 0 ? now : looked & ~kLost;
    const uint64_t waited = now - start;
    bool is_lost = (looked & kLost) != 0;
    if (spins % 1024 == 0) {  // across PCIe, so less often
      const uint32_t lost = ptx::LoadAcquireSystem(&group.error->lost_peer);
      if (lost != 0u && is_lost) {
        const int peer_lost = static_cast<int>(lost) - 1 - group.first_rank;
        Fail(group, ErrorKind::kPeerLost, word, peer_lost, expected, seen, waited);
        return 0;
      }
      is_lost = lost != 0u;  // another look may still find what it sent before it ended
    }
    const uint64_t limit =
        PhaseOf(word) == Phase::kArrival ? group.arrival_timeout_ns : group.op_timeout_ns;
    if (waited <= limit) return max(start, uint64_t{1}) | (is_lost ? kLost : 0);
    Fail(group, ErrorKind::kTimeout, word, peer, expected, seen, waited);
    return 0;
  }

  static constexpr uint64_t kLost = uint64_t{1} << 63;  // the timer, in nanoseconds, is far below

  uint32_t spins_ = 0;
  uint64_t looked_ = 0;
};

// Waits for `flag` of `peer`, of the kind `word`, to reach `epoch`; false once the group has
// failed.
__device__ inline bool WaitFlag(const GroupParams& group, const uint64_t& flag, uint64_t epoch,
                                WordKind word, int peer) {
  const uint64_t expected = FlagValue(epoch, group.tag);
  for (Deadline deadline;;) {
    const uint64_t seen = ptx::LoadAcquireSystem(&flag);
    if (seen == expected) return true;
    if (seen >> kTagBits >= epoch) {
      Fail(group, ErrorKind::kMismatch, word, peer, expected, seen, 0);
      return false;
    }
    if (!deadline.Continue(group, word, peer, expected, seen)) return false;
  }
}

// The numbers of the running op. The publication counts only if the op publishes.
__device__ __forceinline__ OpNumbers NumbersOfOp(const GroupParams& group) {
  OpNumbers last;
  ptx::LoadRelaxedSystem(&Own(group).last.epoch, last.epoch, last.publication);  // by one load
  if (kMutation == kNumberByEpoch) last.publication = last.epoch;
  return {last.epoch + 1, last.publication + 1};
}

// The same in the op's first kernel. All threads of all blocks call it before EndOp.
__device__ __forceinline__ OpNumbers BeginOp(const GroupParams& group) {
  Channel& own = Own(group);
  const OpNumbers op = NumbersOfOp(group);
  // Called by a thread that has nothing else to do until the answer comes.
  if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1 && atomicExch(&own.active, 1u) != 0u) {
    Fail(group, ErrorKind::kConcurrent, WordKind::kNone, group.rank, op.epoch, op.epoch, 0);
  }
  return op;
}

// True in all threads of the last block that comes here. That block sees all writes of the other
// blocks before they came. `counter` is reset. `failed` becomes whether `counter` is marked with
// kFailedHere; if it is, every block sees the writes of the blocks before it. Called by all threads
// of all blocks.
__device__ inline bool IsLastBlock(uint32_t* counter, bool& failed) {
  __shared__ uint32_t before;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(counter, 1u);
    const bool is_last = (before & ~kFailedHere) == gridDim.x - 1;
    if (is_last) {
      atomicAdd(counter, 0u - gridDim.x);
      // Two ops at once may together have counted below zero.
      if ((before & kFailedHere) != 0) atomicOr(counter, kFailedHere);
    }
    if (is_last || (before & kFailedHere) != 0) __threadfence();
  }
  __syncthreads();
  failed = (before & kFailedHere) != 0;
  return (before & ~kFailedHere) == gridDim.x - 1;
}

// The word by which peers find this rank's address; ~0 if they cannot read there.
__device__ inline uint64_t EncodeAddress(const GroupParams& group, uint64_t publication,
                                         const void* address) {
  const uint64_t value = reinterpret_cast<uint64_t>(address);
  for (int i = 0; i < kMaxRegions; ++i) {
    const Region region = Own(group).regions[group.rank][i];
    if (value - region.base < region.size) return PackAddress(i, value - region.base, publication);
  }
  return ~uint64_t{0};
}

// Tells every peer that this rank's inputs are ready, at `addresses` (null: none). Called by all
// threads of one block, after the inputs were made visible (by an earlier kernel, or IsLastBlock).
// Each thread has a fence before all of its stores. So the stores are relaxed and may arrive in any
// order.
__device__ inline void Publish(const GroupParams& group, OpNumbers op,
                               const void* const (&addresses)[kMaxAddresses]) {
  constexpr int kWords = kMaxAddresses + 1;
  const auto [epoch, publication] = op;
  TestDelay(group.rank, epoch, 0);
  ptx::FenceAcquireReleaseSystem();
  for (int i = threadIdx.x; i < group.num_ranks * kWords; i += blockDim.x) {
    Channel& peer = *group.peers[i / kWords];
    const int word = i % kWords;
    if (word == kMaxAddresses) {
      ptx::StoreRelaxedSystem(&peer.arrival[epoch % 2][group.rank].value,
                              FlagValue(epoch, group.tag));
      continue;
    }
    if (TestWithholds(group, i / kWords, WordKind::kAddress)) continue;
    const void* address = nullptr;
#pragma unroll
    for (int j = 0; j < kMaxAddresses; ++j) address = word == j ? addresses[j] : address;
    uint64_t encoded = PackAddress(0, 0, publication);
    if (address != nullptr) {
      encoded = EncodeAddress(group, publication, address);
      if (encoded == ~uint64_t{0}) {
        Fail(group, ErrorKind::kUnreachable, WordKind::kNone, group.rank,
             reinterpret_cast<uint64_t>(address), word, 0);
        continue;  // peers that wait for it will find that this rank has failed
      }
    }
    TestDelay(group.rank, epoch, ~0u);  // the flag may arrive before the address
    ptx::StoreRelaxedSystem(&peer.addresses[group.rank][word], encoded);
  }
}

// The peers' inputs, at this device's addresses. In shared memory.
struct PeerInputs {
  const char* address[kMaxRanks][kMaxAddresses];

  template <typename T>
  __device__ __forceinline__ const T* Of(int peer, int index) const {
    return reinterpret_cast<const T*>(address[peer][index]);
  }
};

// Whether the group had failed before this op, or the program takes this device for another rank.
// After a failure the op must not succeed, even if all that it waits for arrives. Called by one
// thread of a block, beside the waits of the others.
__device__ inline bool HasFailed(const GroupParams& group, uint64_t epoch) {
  int rank = group.rank, instance = group.instance;
  if (group.coords != nullptr) {
    rank = group.coords[0] - group.first_rank;
    instance = group.coords[1];
  }
  const bool failed = ptx::LoadAcquireSystem(&Own(group).failed) != 0u;  // loads meanwhile
  if (rank != group.rank || instance != group.instance) {
    Fail(group, ErrorKind::kMisplaced, WordKind::kNone, rank, group.instance, instance, 0);
    return true;
  }
  if (!failed) return false;
  Fail(group, ErrorKind::kAborted, WordKind::kNone, group.rank, epoch, epoch, 0);
  return true;
}

// Waits until all ranks have arrived. Then `inputs` says where their inputs are. False in all
// threads once the group has failed. Called by all threads of a block.
__device__ inline bool WaitInputs(const GroupParams& group, OpNumbers op, PeerInputs& inputs) {
  Channel& own = Own(group);
  const uint64_t epoch = op.epoch, number = PackAddress(0, 0, op.publication);
  bool arrived = threadIdx.x + 1 != blockDim.x || !HasFailed(group, epoch);
  for (int i = threadIdx.x; i < group.num_ranks * kMaxAddresses; i += blockDim.x) {
    const int r = i / kMaxAddresses;
    const uint64_t& flag = own.arrival[epoch % 2][r].value;
    if (kMutation != kWithoutArrival && !WaitFlag(group, flag, epoch, WordKind::kArrivalFlag, r)) {
      arrived = false;
      break;
    }
    // The address was sent together with the flag. After a failure it may never arrive.
    uint64_t word;
    for (Deadline deadline; arrived;) {
      word = ptx::LoadRelaxedSystem(&own.addresses[r][i % kMaxAddresses]);
      if ((word & 0xffff) == number || kMutation == kWithoutArrival) break;
      arrived = deadline.Continue(group, WordKind::kAddress, r, number, word);
    }
    if (!arrived) break;
    const uint64_t encoded = word >> 16;
    const Region region = own.regions[r][encoded >> kRegionShift];
    const uint64_t offset = encoded & ((uint64_t{1} << kRegionShift) - 1);
    // Ranges that this device does not map cannot be named.
    inputs.address[r][i % kMaxAddresses] =
        reinterpret_cast<const char*>(region.base + (offset < region.size ? offset : 0));
  }
  TestDelay(group.rank, epoch, 1);
  return __syncthreads_and(arrived);
}

// Ends the op: the last block returns once all ranks read no more. Called by all threads of all
// blocks, each after its last read of a peer, also after a failure. Meanwhile all threads of the
// last block run `finish`, which sees the other blocks' writes. If the group has failed, they then
// run `poison`, which overwrites all results, because blocks that did not fail have written theirs.
//
// A rank whose waits or inputs were wrong (kFailedHere) does not close. So its peers fail too,
// because they may have read these inputs before they were told. That also makes one look at
// `failed` enough: a peer that fails after its close has read all that it needed, and this rank's
// results are right.
//
// Two ops that run at once share the count of blocks, and the last block of either may not know
// that it is the last. So every block that comes after a failure on this rank writes poison over
// what earlier blocks wrote.
template <typename Finish, typename Poison>
__device__ inline void EndOp(const GroupParams& group, uint64_t epoch, Finish&& finish,
                             Poison&& poison) {
  Channel& own = Own(group);
  TestDelay(group.rank, epoch, 2);
  if (TestStops(group.tag, ~0u)) return;
  bool failed;
  const bool is_last = IsLastBlock(&own.blocks_done, failed);
  if (!is_last && !failed) return;
  if (!failed) {
    // Releases the reads of all blocks, which IsLastBlock has ordered for this GPU only. They
    // include bulk loads, which were complete once their barriers had been waited for.
    for (int r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
      ptx::StoreReleaseSystem(&group.peers[r]->close[group.rank].value,
                              FlagValue(epoch, group.tag));
    }
    if (threadIdx.x == 0 && ptx::LoadAcquireSystem(&own.failed) != 0u) {
      // Waits may not have found it, because a peer that failed after its own close has sent
      // everything.
      Fail(group, ErrorKind::kAborted, WordKind::kCloseFlag, group.rank,
           FlagValue(epoch, group.tag), 0, 0);
      failed = true;
    }
    finish();
    for (int r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
      if (kMutation != kWithoutClose &&
          !WaitFlag(group, own.close[r].value, epoch, WordKind::kCloseFlag, r)) {
        failed = true;
      }
    }
    failed = __syncthreads_or(failed);
  }
  if (failed) poison();
  if (!is_last || threadIdx.x != 0) return;
  own.tickets = 0;
  own.plan_blocks = 0;
  own.last.epoch = epoch;
  // Adds without the old value: the end would wait for that value, or keep a register for it.
  atomicAdd(reinterpret_cast<unsigned long long*>(&own.last.publication), 1ull);
  own.active = 0;
}

template <typename Poison>
__device__ inline void EndOp(const GroupParams& group, uint64_t epoch, Poison&& poison) {
  EndOp(group, epoch, [] {}, poison);
}

// Ends an op whose peers read nothing of this rank, and which published nothing. Called by one
// thread, after all blocks' waits.
__device__ inline void EndOpAtOnce(const GroupParams& group, uint64_t epoch) {
  Own(group).last.epoch = epoch;
  Own(group).active = 0;
}

}  // namespace jax_ep::cuda
