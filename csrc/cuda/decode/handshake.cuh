// How an op of latency mode begins, waits for words and ends (README.md).
//
// Params has group, inboxes, calls and kind.
#pragma once

#include <cstdint>

#include "cuda/core/clock_stamps.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/decode/inbox.h"
#include "cuda/decode/phases.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// The running op. Latency mode counts its ops by itself, so throughput ops may come between.
struct DecodeOp {
  uint64_t epoch;

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

// Whose inbox a message goes to, and as whose message.
struct Envelope {
  int to, from;
};

// For what this rank tells `rank`. In the place of an absent rank, it tells itself what that rank
// would say. So no wait has to know which ranks are absent.
__device__ __forceinline__ Envelope EnvelopeFor(const GroupParams& group, int rank) {
  return IsAbsent(group, rank) ? Envelope{group.rank, rank} : Envelope{rank, group.rank};
}

__device__ __forceinline__ SentOp LoadSent(const DecodeInbox& own) {
  const uint4 word = ptx::LoadRelaxedSystem16(&own.sent);
  return {uint64_t{word.y} << 32 | word.x, word.z, word.w};
}

__device__ __forceinline__ void StoreSent(DecodeInbox& own, SentOp sent) {
  ptx::StoreRelaxedSystem16(
      &own.sent, make_uint4(static_cast<uint32_t>(sent.epoch),
                            static_cast<uint32_t>(sent.epoch >> 32), sent.tag, sent.kind));
}

// The tag by which peers know the op: that of its only call, or of its start call.
template <typename Params>
__device__ __forceinline__ uint32_t TagOf(const Params& p) {
  return p.calls == Calls::kDone ? LoadSent(OwnInbox(p)).tag : p.group.tag;
}

// All threads learn the op's number. Every op counts for all blocks, so each block has the same.
// `found_other`, in shared memory, says at the end whether another op of this rank ran in the
// block's place.
template <typename Params>
__device__ __forceinline__ DecodeOp BeginDecode(const Params& p, bool& found_other) {
  const uint64_t launched = StampTime(p.group);
  DecodeInbox& own = OwnInbox(p);
  const DecodeOp op{ptx::LoadRelaxedSystem(&own.epochs[blockIdx.x]) + 1};
  StampClockAt(p.group, op.epoch, DecodePhase::kLaunched, launched);
  StampClock(p.group, op.epoch, DecodePhase::kBegun);
  // By a thread that has nothing to do until the answer comes.
  if (threadIdx.x == blockDim.x - 1) {
    found_other = atomicExch(&own.busy[blockIdx.x], 1u) != 0u;
    if (found_other) {
      Fail(p.group, ErrorKind::kConcurrent, WordKind::kNone, p.group.rank, op.epoch, op.epoch, 0);
    }
  }
  return op;
}

// One warp of the first block tells all ranks which op this is, unless a start call has done so. It
// does not if the group has failed before, if the program takes this device for another rank, or if
// start and done calls do not alternate; then it returns false in all lanes. Without this word the
// op fails on all ranks.
template <typename Params>
__device__ __forceinline__ bool SayHello(const Params& p, DecodeOp op) {
  const int lane = threadIdx.x % 32;
  bool ok = lane != 0 || !HasFailed(p.group, op.epoch);
  if (p.calls != Calls::kOne && lane == 0 && ok) {
    const SentOp sent = LoadSent(OwnInbox(p));
    ok = p.calls == Calls::kStart ? sent.epoch != op.epoch
                                  : sent.epoch == op.epoch && sent.kind == p.kind;
    if (!ok) {
      Fail(p.group, ErrorKind::kUnpaired, WordKind::kNone, p.group.rank, op.epoch, op.epoch, 0);
    } else if (p.calls == Calls::kStart) {
      StoreSent(OwnInbox(p), {op.epoch, p.group.tag, p.kind});
    }
  }
  if (!__all_sync(~0u, ok)) return false;
  if (p.calls == Calls::kDone) return true;
  if (lane < p.group.num_ranks && !TestWithholds(p.group, lane, WordKind::kHello)) {
    const Envelope envelope = EnvelopeFor(p.group, lane);
    StoreWord(&p.inboxes.of[envelope.to]->hello[op.parity()][envelope.from],
              p.group.tag & ((1u << kTagBits) - 1), 0, 0, op.stamp());
  }
  StampClock(p.group, op.epoch, DecodePhase::kHelloSent);
  return true;
}

// The flag by which `peer` shows that it is at another op, if that is so: of latency mode (kHello)
// or of throughput mode, of which this rank has none open (kArrivalFlag). Else kNone.
template <typename Params>
__device__ __forceinline__ WordKind OtherOp(const Params& p, DecodeOp op, int peer,
                                            uint64_t& flag) {
  const GroupParams& group = p.group;
  const uint4 hello = ptx::LoadRelaxedSystem16(&OwnInbox(p).hello[op.parity()][peer]);
  flag = FlagValue(hello.w, hello.x);
  if (hello.w == op.stamp()) {
    return flag != FlagValue(op.stamp(), TagOf(p)) ? WordKind::kHello : WordKind::kNone;
  }
  // On other channels throughput ops run beside the program, so a peer may begin one early.
  if (group.channel != 0) return WordKind::kNone;
  const uint64_t next = ptx::LoadRelaxedSystem(&Own(group).last.epoch) + 1;
  flag = ptx::LoadAcquireSystem(&Own(group).arrival[next % 2][peer].value);
  const bool is_there = peer != group.rank && flag >> kTagBits >= next;
  return is_there ? WordKind::kArrivalFlag : WordKind::kNone;
}

// Records why a wait has given up. What it found is still there.
template <typename Params>
__device__ __noinline__ void ReportWait(const Params& p, DecodeOp op, WordKind word, int peer,
                                        uint32_t seen, uint64_t waited_ns) {
  const GroupParams& group = p.group;
  if (ptx::LoadAcquireSystem(&Own(group).failed) != 0u) {
    return Fail(group, ErrorKind::kAborted, word, peer, op.stamp(), seen, 0);
  }
  uint64_t flag;
  if (const WordKind other = OtherOp(p, op, peer, flag); other != WordKind::kNone) {
    const uint64_t expected = FlagValue(op.stamp(), TagOf(p));
    return Fail(group, ErrorKind::kMismatch, other, peer, expected, flag, 0);
  }
  const uint32_t lost = ptx::LoadAcquireSystem(&group.error->lost_peer);
  if (lost == 0u) return Fail(group, ErrorKind::kTimeout, word, peer, op.stamp(), seen, waited_ns);
  const int peer_lost = static_cast<int>(lost) - 1 - group.first_rank;
  Fail(group, ErrorKind::kPeerLost, word, peer_lost, op.stamp(), seen, waited_ns);
}

// Whether it is this thread's turn to look across PCIe whether a peer is gone: about one thread's a
// millisecond. If all threads that wait did so, their loads would take longer than many ops. The
// peers would wait for that and do the same, and so on in every op.
template <typename Params>
__device__ __forceinline__ bool TakesLook(const Params& p, uint64_t now) {
  const uint32_t time = static_cast<uint32_t>(now >> 20);
  uint32_t* const looked = &OwnInbox(p).looked;
  return __ldcg(looked) != time && atomicExch(looked, time) != time;
}

// Bounds a wait for words of a peer. The waiting loop has no call in it, so that calls take no
// registers from it.
class DecodeWait {
 public:
  // After each look at the words: whether to go on.
  template <typename Params>
  __device__ __forceinline__ bool Continue(const Params& p, DecodeOp op, WordKind word, int peer) {
    if (++spins_ % 64 != 0) return true;
    uint64_t flag;
    if (ptx::LoadAcquireSystem(&Own(p.group).failed) != 0u) return false;
    if (OtherOp(p, op, peer, flag) != WordKind::kNone) return false;
    if (is_lost_) return false;  // and nothing has come since that the peer had sent before
    const uint64_t now = ptx::GlobalTimer();
    if (begin_ == 0) begin_ = now;
    is_lost_ = TakesLook(p, now) && ptx::LoadAcquireSystem(&p.group.error->lost_peer) != 0u;
    const uint64_t limit =
        PhaseOf(word) == Phase::kArrival ? p.group.arrival_timeout_ns : p.group.op_timeout_ns;
    return now - begin_ <= limit;
  }

  // After Continue was false.
  template <typename Params>
  __device__ __forceinline__ void Report(const Params& p, DecodeOp op, WordKind word, int peer,
                                         uint32_t seen) const {
    ReportWait(p, op, word, peer, seen, begin_ == 0 ? 0 : ptx::GlobalTimer() - begin_);
  }

 private:
  uint32_t spins_ = 0;
  bool is_lost_ = false;  // a peer was gone when this wait looked last
  uint64_t begin_ = 0;
};

// Loads words `lane`, `lane` + 32, ... of `count` from `from` on and waits until they are there;
// every lane has `data` of its own, and that of word `count` - 1 beyond the end. False once the
// group has failed.
template <int kWords, typename Params>
__device__ __forceinline__ bool WaitWords(const Params& p, DecodeOp op, const StampedWord* from,
                                          int32_t count, WordKind word, int peer,
                                          uint4 (&data)[kWords]) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t stamp = op.stamp();
  DecodeWait wait;
  uint32_t seen;
  do {
    seen = stamp;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      // Lanes past the end load the last word, so that all loads are alike. All words are loaded
      // each time, so that none is kept meanwhile.
      data[j] = ptx::LoadRelaxedSystem16(from + plan::Min(lane + 32 * j, count - 1));
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) seen = data[j].w != stamp ? data[j].w : seen;
    if (seen == stamp || kMutation == kWithoutStamp) return true;
  } while (wait.Continue(p, op, word, peer));
  wait.Report(p, op, word, peer, seen);
  return false;
}

// That warp waits until all ranks have begun this op. So a rank ends an op only when all ranks have
// ended the one before, and nobody reads that one's words any more. False in all lanes once the
// group has failed.
template <typename Params>
__device__ bool WaitHellos(const Params& p, DecodeOp op) {
  const int peer = static_cast<int>(threadIdx.x % 32);
  bool ok = true;
  if (peer < p.group.num_ranks && kMutation != kWithoutHello) {
    const uint64_t expected = FlagValue(op.stamp(), TagOf(p));
    DecodeWait wait;
    uint4 hello;
    do {
      hello = ptx::LoadRelaxedSystem16(&OwnInbox(p).hello[op.parity()][peer]);
      ok = FlagValue(hello.w, hello.x) == expected;
    } while (!ok && wait.Continue(p, op, WordKind::kHello, peer));
    if (!ok) wait.Report(p, op, WordKind::kHello, peer, hello.w);
  }
  StampClock(p.group, op.epoch, DecodePhase::kHellosThere);
  return __all_sync(~0u, ok);
}

// Ends a start call, after which the op goes on; called by all threads of all blocks.
template <typename Params>
__device__ __forceinline__ void EndStart(const Params& p, DecodeOp op, const bool& found_other) {
  __syncthreads();
  StampClock(p.group, op.epoch, DecodePhase::kEnd);
  if (TestStops(p.group.tag, ~0u)) return;
  if (threadIdx.x == 0 && !found_other) OwnInbox(p).busy[blockIdx.x] = 0;
}

// Ends the op; called by all threads of all blocks after their last access, also after a failure
// (`ok` is false in some thread of the block). If a wait of a block has failed, that block waits
// until all others have ended and then runs `poison` with all its threads, which overwrites all
// results. So results are right or poison, whichever block was first to end.
template <typename Params, typename Poison>
__device__ inline void EndDecode(const Params& p, DecodeOp op, const bool& found_other, bool ok,
                                 Poison&& poison) {
  DecodeInbox& own = OwnInbox(p);
  TestDelay(p.group.rank, op.epoch, 2);
  ok = __syncthreads_and(ok) && !found_other;
  if (TestStops(p.group.tag, ~0u)) return;
  const int32_t block = blockIdx.x + gridDim.x * threadIdx.x;
  if (threadIdx.x == 0) {
    __threadfence();  // releases the block's results to the one that may write poison over them
    own.busy[block] = 0;
  }
  if (block < kMaxDecodeBlocks) ptx::StoreRelaxedSystem(&own.epochs[block], op.epoch);
  StampClock(p.group, op.epoch, DecodePhase::kEnd);
  if (ok) return;
  // With two ops at once, a block may have counted an op more than others of its grid, so that
  // their epochs do not tell whether they have ended.
  const ErrorRecord& error = *p.group.error;
  const bool is_concurrent =
      ptx::LoadAcquireSystem(&error.set) == 1u &&
      ptx::LoadAcquireSystem(&error.kind) == static_cast<uint32_t>(ErrorKind::kConcurrent);
  const uint64_t begin = ptx::GlobalTimer();
  for (int32_t b = threadIdx.x; b < static_cast<int32_t>(gridDim.x); b += blockDim.x) {
    // All waits are bounded, so this ends; the limit is for blocks that never ran.
    while (ptx::LoadAcquireSystem(&own.epochs[b]) < op.epoch &&
           !(is_concurrent && ptx::LoadAcquireSystem(&own.busy[b]) == 0u) &&
           ptx::GlobalTimer() - begin < p.group.op_timeout_ns) {
    }
  }
  __syncthreads();
  poison();
}

}  // namespace jax_ep::cuda
