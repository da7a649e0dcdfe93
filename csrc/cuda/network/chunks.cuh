// Chunks on their way between hosts: what senders, forwarders and readers wait for, and what they
// tell others.
//
// All of them go through chunks in the same order: window by window, and in each window the hosts
// or ranks in turn. A wait for a slot is a wait for earlier windows, so waits cannot form a circle.
// A forwarder holds nothing while it waits: it looks at all its ways in turn.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/network/net.cuh"
#include "cuda/network/params.h"

namespace jax_ep::cuda {

// Tells all ranks of the group that it has failed: Fail has told those of this host.
__device__ __noinline__ inline void TellHosts(const NetworkParams& network) {
  for (int32_t h = 0; h < network.shape.num_hosts; ++h) {
    if (h != network.host) net::Signal(network.Own().failed(), 1, network.counterparts[h].pe);
  }
}

// BeginOp that also checks whether the group has failed before on another host.
__device__ __forceinline__ OpNumbers BeginNetworkOp(const NetworkParams& network) {
  const OpNumbers op = BeginOp(network.node);
  if (blockIdx.x == 0 && threadIdx.x == 0 && ptx::LoadAcquireSystem(network.Own().failed()) != 0) {
    Fail(network.node, ErrorKind::kAborted, WordKind::kNone, network.node.rank, op.epoch, op.epoch,
         0);
  }
  return op;
}

// Deadline::Continue that also ends when another host has failed.
__device__ __forceinline__ bool Continue(const NetworkParams& network, Deadline& deadline,
                                         WordKind kind, int32_t peer, uint64_t expected,
                                         uint64_t seen) {
  if (ptx::LoadAcquireSystem(network.Own().failed()) != 0) {
    Fail(network.node, ErrorKind::kAborted, kind, peer, expected, seen, 0);
    return false;
  }
  return deadline.Continue(network.node, kind, peer, expected, seen);
}

// The state of a word that `peer` writes.
enum class Seen { kNot, kHere, kOther };

__device__ __forceinline__ Seen LookAt(const uint64_t* word, uint64_t expected, uint64_t& seen) {
  seen = ptx::LoadAcquireSystem(word);
  if (seen == expected) return Seen::kHere;
  // Another op of this number, or a later one.
  const uint64_t op_of_seen = seen >> kChunkBits, op = expected >> kChunkBits;
  const bool is_other = seen >> 32 >= expected >> 32 && op_of_seen != op;
  return is_other ? Seen::kOther : Seen::kNot;
}

// Waits for a word; false once the group has failed. By one thread.
__device__ inline bool WaitWord(const NetworkParams& network, const uint64_t* word,
                                uint64_t expected, WordKind kind, int32_t peer) {
  for (Deadline deadline;;) {
    uint64_t seen;
    const Seen what = LookAt(word, expected, seen);
    if (what == Seen::kHere) return true;
    if (what == Seen::kOther && kind != WordKind::kCredit) {
      Fail(network.node, ErrorKind::kMismatch, kind, peer, expected, seen, 0);
      return false;
    }
    if (!Continue(network, deadline, kind, peer, expected, seen)) return false;
  }
}

// One end of a way, which is a lane to a host.
struct Way {
  int32_t host;
  int32_t lane;
  int32_t num_lanes;

  // The `number`-th of `ways`. Hosts come in turn, beginning after `own_host`, so that not all
  // ranks send to the same host at once.
  __device__ Way(const Ways& ways, const NetworkParams& network, int32_t number)
      : host((network.host + 1 + number / ways.num_lanes) % network.shape.num_hosts),
        lane(number % ways.num_lanes),
        num_lanes(ways.num_lanes) {}

  __device__ int32_t NumWindows(int32_t num_tokens, int32_t tokens_per_window) const {
    return cuda::NumWindows(num_tokens, tokens_per_window, lane, num_lanes);
  }
  // The `n`-th window.
  __device__ int32_t Window(int32_t n) const { return lane + n * num_lanes; }
  __device__ SlotIndex Slot(int32_t n) const { return {host, lane, n % kChunkSlots}; }
};

// Calls `do_window(way, turn, n, window)` for the block's ways, `turns` times for each: for the
// first window of all ways, then for the second one, and so on. `window` is the n-th of its way.
// All ranks keep this order. `turn` counts over all ways of the block. Returns false as soon as a
// call does.
template <typename DoWindow>
__device__ __forceinline__ bool ForEachWindow(const NetworkParams& network, const Ways& ways,
                                              int32_t num_tokens, int32_t window_tokens,
                                              int32_t turns, DoWindow&& do_window) {
  bool more = true;
  for (int32_t n = 0; more; ++n) {
    more = false;
    for (int32_t turn = 0;; ++turn) {
      const int32_t number = blockIdx.x + turn / turns * gridDim.x;
      if (number >= ways.count) break;
      const Way way(ways, network, number);
      if (n >= way.NumWindows(num_tokens, window_tokens)) continue;
      if (TestStops(network.node.tag, n)) return false;
      more = true;
      if (!do_window(way, turn, n, way.Window(n))) return false;
    }
  }
  return true;
}

// The word of the previous chunk in the slot of the way's `n`-th chunk. It is a word of this op, or
// the one that an earlier op has left in `last`. `last` is not written before this chunk.
__device__ __forceinline__ uint64_t WordBefore(const NetworkParams& network, uint64_t epoch,
                                               const Way& way, int32_t n, const uint64_t* last) {
  return n < kChunkSlots ? ptx::LoadRelaxedSystem(last)
                         : ChunkWord(epoch, network.node.tag, way.Window(n - kChunkSlots));
}

// Sends the chunks of a way. A counterpart whose memory this device reaches needs no network:
// chunks are packed where they have to be.
class ChunkSender {
 public:
  __device__ ChunkSender(const NetworkParams& network, Way way, uint64_t epoch)
      : network_(network), way_(way), epoch_(epoch), to_(network.counterparts[way.host]) {}

  // Waits until the slot of the way's `n`-th chunk is free. All lanes of a warp; the same in all of
  // them. Any warps of a block.
  __device__ bool WaitSlot(int32_t n) const {
    bool ok = true;
    if (threadIdx.x % 32 == 0 && kMutation != kWithoutCredit) {
      const SlotIndex at = way_.Slot(n);
      const NetworkMemory own = network_.Own();
      const int32_t peer = network_.Peer(way_.host, network_.node.rank);
      const uint64_t before = WordBefore(network_, epoch_, way_, n, own.sent(at));
      ok = WaitWord(network_, own.credit(at), before, WordKind::kCredit, peer);
    }
    return __shfl_sync(~0u, ok, 0);
  }

  __device__ char* Memory(int32_t n) const {
    return to_.memory != nullptr ? There().in(SlotThere(n)) : network_.Own().out(way_.Slot(n));
  }

  // Sends the `n`-th chunk, that of `window`, with `bytes` packed. Called by all lanes of a warp,
  // after their bulk stores are complete.
  __device__ void Send(int32_t n, int32_t window, int32_t bytes) const {
    const SlotIndex at = way_.Slot(n), there = SlotThere(n);
    const NetworkMemory own = network_.Own();
    const uint64_t word = ChunkWord(epoch_, network_.node.tag, window);
    const int32_t pe = to_.pe;
    if (threadIdx.x % 32 == 0) *own.sent(at) = word;
    ptx::FenceProxyAsyncGlobal();
    __syncwarp();
    if (to_.memory != nullptr) {
      if (threadIdx.x % 32 == 0) ptx::StoreReleaseSystem(There().arrived(there), word);
      return;
    }
    ptx::FenceAcquireReleaseSystem();
    __syncwarp();
    if (kMutation == kWithSeparateSignal || kMutation == kWithEarlySignal) {
      const bool is_first = kMutation == kWithEarlySignal, sends = threadIdx.x % 32 == 0;
      if (sends && is_first) net::Signal(own.arrived(there), word, pe);
      __syncwarp();
      net::PutAlone(own.in(there), own.out(at), bytes, pe);
      if (sends && !is_first) net::Signal(own.arrived(there), word, pe);
      return;
    }
    net::PutAndSignal(own.in(there), own.out(at), bytes, own.arrived(there), word, pe);
  }

 private:
  // The slot as the counterpart counts: there, this host is the one at the other end.
  __device__ SlotIndex SlotThere(int32_t n) const {
    const SlotIndex at = way_.Slot(n);
    return {network_.host, at.lane, at.slot};
  }
  __device__ NetworkMemory There() const { return NetworkMemory(to_.memory, network_.shape); }

  const NetworkParams& network_;
  Way way_;
  uint64_t epoch_;
  Counterpart to_;
};

// Takes a chunk that has arrived, as NVSHMEM wants it before its bytes are read. By one thread.
__device__ __forceinline__ void Accept(const NetworkParams& network, SlotIndex at, uint64_t word) {
  if (network.counterparts[at.host].memory != nullptr) return;
  net::Accept(network.Own().arrived(at), word);
}

// Tells the counterpart on `at.host` that its chunk in this slot has been read. By one thread.
__device__ __forceinline__ void GiveCredit(const NetworkParams& network, SlotIndex at,
                                           uint64_t word) {
  const SlotIndex there{network.host, at.lane, at.slot};
  const Counterpart& to = network.counterparts[at.host];
  if (to.memory != nullptr) {
    ptx::StoreReleaseSystem(NetworkMemory(to.memory, network.shape).credit(there), word);
  } else {
    net::Signal(network.Own().credit(there), word, to.pe);
  }
}

// Forwards the chunks of a block's ways, by one warp. Each lane looks at some of the ways in turn.
// False once the group has failed.
__device__ inline bool ForwardChunks(const NetworkParams& network, const Ways& ways, uint64_t epoch,
                                     int32_t num_tokens, int32_t tokens_per_window) {
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const int32_t index = network.node.rank, stride = gridDim.x;
  bool ok = true;
  for (int32_t first = blockIdx.x; first < ways.count; first += 32 * stride) {
    const int32_t number = first + static_cast<int32_t>(threadIdx.x % 32) * stride;
    const Way way(ways, network, number);
    const int32_t count = number < ways.count ? way.NumWindows(num_tokens, tokens_per_window) : 0;
    const int32_t counterpart = network.Peer(way.host, index);
    int32_t told = 0, read = 0;
    Deadline deadline;
    while (read < count && ok) {
      if (TestStops(network.node.tag, told)) {
        ok = false;
        break;
      }
      WordKind kind = WordKind::kNone;
      int32_t peer = 0;
      uint64_t expected = 0, seen = 0;
      if (told < count && told < read + kChunkSlots) {
        const SlotIndex at = way.Slot(told);
        const uint64_t word = ChunkWord(epoch, network.node.tag, way.Window(told));
        uint64_t value;
        const Seen what = LookAt(own.arrived(at), word, value);
        if (what == Seen::kOther) {
          Fail(network.node, ErrorKind::kMismatch, WordKind::kChunkArrived, counterpart, word,
               value, 0);
          ok = false;
          break;
        }
        if (what == Seen::kHere) {
          Accept(network, at, word);
          for (int32_t d = 0; d < shape.host_ranks; ++d) {
            ptx::StoreReleaseSystem(network.Of(d).ready(index, at), word);
          }
          ++told;
          deadline = Deadline();
          continue;
        }
        kind = WordKind::kChunkArrived, peer = counterpart, expected = word, seen = value;
      }
      if (read < told) {
        const SlotIndex at = way.Slot(read);
        const uint64_t word = ChunkWord(epoch, network.node.tag, way.Window(read));
        int32_t d = 0;
        for (; d < shape.host_ranks && kMutation != kWithoutDone; ++d) {
          uint64_t value;
          if (LookAt(own.done(d, at), word, value) == Seen::kHere) continue;
          kind = WordKind::kChunkDone, peer = d;
          expected = word, seen = value;
          break;
        }
        if (d == shape.host_ranks || kMutation == kWithoutDone) {
          GiveCredit(network, at, word);
          ++read;
          deadline = Deadline();
          continue;
        }
      }
      ok = Continue(network, deadline, kind, peer, expected, seen);
    }
    ok = __all_sync(~0u, ok);
  }
  return ok;
}

// Reads the chunks of a way in the memory of the forwarder with `index`.
class ChunkReader {
 public:
  __device__ ChunkReader(const NetworkParams& network, Way way, int32_t index, uint64_t epoch)
      : network_(network), way_(way), index_(index), epoch_(epoch) {}

  // Whether the `n`-th chunk, that of `window`, is there, or something else that Wait has to see.
  // All lanes of a warp; the same in all of them.
  __device__ bool IsHere(int32_t n, int32_t window) const {
    bool here = false;
    if (threadIdx.x % 32 == 0) {
      uint64_t seen;
      here = LookAt(network_.Own().ready(index_, way_.Slot(n)), Word(window), seen) != Seen::kNot;
    }
    return __shfl_sync(~0u, here, 0);
  }

  // Waits for it. All lanes of a warp; the same in all of them. A wait in vain names the rank that
  // sends it: were its forwarder gone, the group would have been told at once.
  __device__ bool Wait(int32_t n, int32_t window) const {
    bool ok = true;
    if (threadIdx.x % 32 == 0 && kMutation != kWithoutChunk) {
      ok = WaitWord(network_, network_.Own().ready(index_, way_.Slot(n)), Word(window),
                    WordKind::kChunkReady, network_.Peer(way_.host, index_));
    }
    ok = __shfl_sync(~0u, ok, 0);
    ptx::FenceProxyAsyncGlobal();  // bulk loads come next
    __syncwarp();
    return ok;
  }

  __device__ const char* Memory(int32_t n) const { return network_.Of(index_).in(way_.Slot(n)); }

  // All loads of the chunk by this warp are complete.
  __device__ void Done(int32_t n, int32_t window) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    ptx::StoreReleaseSystem(network_.Of(index_).done(network_.node.rank, way_.Slot(n)),
                            Word(window));
  }

 private:
  __device__ uint64_t Word(int32_t window) const {
    return ChunkWord(epoch_, network_.node.tag, window);
  }

  const NetworkParams& network_;
  Way way_;
  int32_t index_;
  uint64_t epoch_;
};

}  // namespace jax_ep::cuda
