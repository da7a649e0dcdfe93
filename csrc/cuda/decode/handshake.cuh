// How an op of latency mode begins, waits for words and ends (README.md).
//
// Params has group and inboxes.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/decode/inbox.h"

namespace jax_ep::cuda {

// The running op. Latency mode counts its ops by itself, so throughput ops may come between.
struct DecodeOp {
  uint64_t epoch;
  bool is_alone;  // false in the thread that has found another op of this rank at the same time

  // Never 0, which is what unwritten words have. Epochs 2^32 and 1 share a stamp but not a half.
  __device__ __forceinline__ uint32_t stamp() const {
    const uint32_t low = static_cast<uint32_t>(epoch);
    return low != 0 ? low : 1;
  }
  __device__ __forceinline__ int parity() const {
    return kMutation == kWithOneSlot ? 0 : static_cast<int>(epoch % 2);
  }
};

template <typename Params>
__device__ __forceinline__ DecodeInbox& OwnInbox(const Params& p) {
  return *p.inboxes.of[p.group.rank];
}

// The words of this op at `rank`.
template <typename Params>
__device__ __forceinline__ StampedWord* WordsAt(const Params& p, DecodeOp op, int rank) {
  return p.inboxes.of[rank]->Half(op.parity(), p.inboxes.half_words);
}

__device__ __forceinline__ void StoreWord(StampedWord* to, uint32_t a, uint32_t b, uint32_t c,
                                          uint32_t stamp) {
  if (kMutation == kStampEarly) {
    ptx::StoreRelaxedSystem16(to, make_uint4(~0u, ~0u, ~0u, stamp));
    ptx::FenceAcquireReleaseSystem();
  }
  ptx::StoreRelaxedSystem16(to, make_uint4(a, b, c, stamp));
}

// All threads learn the op's number. Every op counts for all blocks, so each block has the same.
template <typename Params>
__device__ __forceinline__ DecodeOp BeginDecode(const Params& p) {
  DecodeInbox& own = OwnInbox(p);
  DecodeOp op{ptx::LoadRelaxedSystem(&own.epochs[blockIdx.x]) + 1, true};
  // By a thread that has nothing to do until the answer comes.
  if (threadIdx.x == blockDim.x - 1 && atomicExch(&own.busy[blockIdx.x], 1u) != 0u) {
    Fail(p.group, ErrorKind::kConcurrent, WordKind::kNone, p.group.rank, op.epoch, op.epoch, 0);
    op.is_alone = false;
  }
  return op;
}

// The first block's first warp tells all ranks which op this is.
template <typename Params>
__device__ __forceinline__ void SayHello(const Params& p, DecodeOp op) {
  const int lane = threadIdx.x % 32;
  if (lane < p.group.num_ranks && !TestWithholds(p.group, lane, WordKind::kHello)) {
    StoreWord(&p.inboxes.of[lane]->hello[op.parity()][p.group.rank],
              p.group.tag & ((1u << kTagBits) - 1), 0, 0, op.stamp());
  }
}

// Bounds a wait for words of `peer`. If the peer is at another op, the words may never come.
class DecodeDeadline {
 public:
  template <typename Params>
  __device__ __forceinline__ bool Continue(const Params& p, DecodeOp op, WordKind word, int peer,
                                           uint32_t seen) {
    if (++spins_ % 64 == 0 && IsElsewhere(p, op, peer)) return false;
    return deadline_.Continue(p.group, word, peer, op.stamp(), seen);
  }

 private:
  template <typename Params>
  __device__ __noinline__ static bool IsElsewhere(const Params& p, DecodeOp op, int peer) {
    const uint4 hello = ptx::LoadRelaxedSystem16(&OwnInbox(p).hello[op.parity()][peer]);
    const uint64_t flag = FlagValue(op.stamp(), p.group.tag);
    if (hello.w == op.stamp()) {
      const uint64_t seen = FlagValue(op.stamp(), hello.x);
      if (seen == flag) return false;
      Fail(p.group, ErrorKind::kMismatch, WordKind::kHello, peer, flag, seen, 0);
      return true;
    }
    // It may be at an op of throughput mode, of which this rank has none open.
    const uint64_t next = ptx::LoadRelaxedSystem(&Own(p.group).last.epoch) + 1;
    const uint64_t arrival = ptx::LoadAcquireSystem(&Own(p.group).arrival[next % 2][peer].value);
    if (peer == p.group.rank || arrival >> kTagBits < next) return false;
    Fail(p.group, ErrorKind::kMismatch, WordKind::kArrivalFlag, peer, flag, arrival, 0);
    return true;
  }

  Deadline deadline_;
  uint32_t spins_ = 0;
};

// Loads words `lane`, `lane` + 32, ... of `count` from `from` on and waits until they are there;
// every lane has `data` of its own. False once the group has failed.
template <int kWords, typename Params>
__device__ __forceinline__ bool WaitWords(const Params& p, DecodeOp op, const StampedWord* from,
                                          int32_t count, WordKind word, int peer,
                                          uint4 (&data)[kWords]) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t stamp = op.stamp();
  for (DecodeDeadline deadline;;) {
    uint32_t seen = stamp;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (lane + 32 * j < count) data[j] = ptx::LoadRelaxedSystem16(from + lane + 32 * j);
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (lane + 32 * j < count && data[j].w != stamp) seen = data[j].w;
    }
    if (seen == stamp || kMutation == kWithoutStamp) return true;
    // All words are loaded again, so that none takes registers meanwhile.
    if (!deadline.Continue(p, op, word, peer, seen)) return false;
  }
}

// The first block's first warp waits until all ranks have begun this op. So a rank ends an op only
// when all ranks have ended the one before, and nobody reads that one's words any more. False in
// all lanes once the group has failed, or if it had failed before.
template <typename Params>
__device__ bool WaitHellos(const Params& p, DecodeOp op) {
  const int peer = static_cast<int>(threadIdx.x % 32);
  bool ok = peer != 0 || !HasFailed(p.group, op.epoch);
  if (ok && peer < p.group.num_ranks && kMutation != kWithoutHello) {
    const uint64_t expected = FlagValue(op.stamp(), p.group.tag);
    for (DecodeDeadline deadline;;) {
      const uint4 hello = ptx::LoadRelaxedSystem16(&OwnInbox(p).hello[op.parity()][peer]);
      const uint64_t seen = FlagValue(hello.w, hello.x);
      if (seen == expected) break;
      if (hello.w == op.stamp()) {
        Fail(p.group, ErrorKind::kMismatch, WordKind::kHello, peer, expected, seen, 0);
        ok = false;
      } else {
        ok = deadline.Continue(p, op, WordKind::kHello, peer, hello.w);
      }
      if (!ok) break;
    }
  }
  return __all_sync(~0u, ok);
}

// Ends the op; called by all threads of all blocks after their last access, also after a failure
// (`ok` is false in some thread of the block). If a wait of a block has failed, that block waits
// until all others have ended and then runs `poison` with all its threads, which overwrites all
// results. So results are right or poison, whichever block was first to end.
template <typename Params, typename Poison>
__device__ inline void EndDecode(const Params& p, DecodeOp op, bool ok, Poison&& poison) {
  DecodeInbox& own = OwnInbox(p);
  TestDelay(p.group.rank, op.epoch, 2);
  ok = __syncthreads_and(ok && op.is_alone);
  if (TestStops(p.group.tag, ~0u)) return;
  const int32_t block = blockIdx.x + gridDim.x * threadIdx.x;
  if (threadIdx.x == 0) {
    own.busy[block] = 0;
    __threadfence();  // releases the block's results to the one that may write poison over them
  }
  if (block < kMaxDecodeBlocks) ptx::StoreRelaxedSystem(&own.epochs[block], op.epoch);
  if (ok) return;
  const uint64_t begin = ptx::GlobalTimer();
  for (int32_t b = threadIdx.x; b < static_cast<int32_t>(gridDim.x); b += blockDim.x) {
    // All waits are bounded, so this ends; the limit is for blocks that never ran.
    while (ptx::LoadAcquireSystem(&own.epochs[b]) < op.epoch &&
           ptx::GlobalTimer() - begin < p.group.op_timeout_ns) {
    }
  }
  __syncthreads();
  poison();
}

}  // namespace jax_ep::cuda
