// The way of chunks between hosts: what senders, forwarders and readers wait for and tell.
//
// All of them go through chunks in the same order: those of a lane one after the other, and of each
// the hosts or ranks in turn. Who waits for a slot waits for chunks before its own, so no circle of
// waits can close. A forwarder holds nothing while it waits: it looks at all hosts by turns.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/network/net.cuh"
#include "cuda/network/params.h"

namespace jax_ep::cuda {

// Tells all ranks of the group that it has failed: Fail has told those of this host.
__device__ __noinline__ inline void TellHosts(const NetworkParams& network) {
  for (int32_t h = 0; h < network.shape.num_hosts; ++h) {
    if (h != network.host) net::Signal(network.Own().failed(), 1, network.counterpart_pe[h]);
  }
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

// What has come of a word that `peer` writes.
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

// Sends a lane's chunks to other hosts.
class ChunkSender {
 public:
  __device__ ChunkSender(const NetworkParams& network, uint64_t epoch)
      : network_(network), epoch_(epoch) {}

  // Waits until the slot of the lane's `n`-th chunk for `host` is free. All lanes of a warp; the
  // same in all of them.
  __device__ bool WaitSlot(int32_t host, int32_t n) const {
    bool ok = true;
    if (threadIdx.x % 32 == 0 && kMutation != kWithoutCredit) {
      const SlotIndex at = At(host, n);
      const NetworkMemory own = network_.Own();
      const int32_t peer = host * network_.shape.host_ranks + network_.node.rank;
      ok = WaitWord(network_, own.credit(at), *own.sent(at), WordKind::kCredit, peer);
    }
    return __shfl_sync(~0u, ok, 0);
  }

  __device__ char* Memory(int32_t host, int32_t n) const { return network_.Own().out(At(host, n)); }

  // Sends the lane's `n`-th chunk, chunk `chunk` of the list, of which `bytes` are packed. All
  // lanes of a warp, after their bulk stores are complete.
  __device__ void Send(int32_t host, int32_t n, int32_t chunk, int32_t bytes) const {
    const SlotIndex at = At(host, n), there{network_.host, at.lane, at.slot};
    const NetworkMemory own = network_.Own();
    const uint64_t word = ChunkWord(epoch_, network_.node.tag, chunk);
    const int32_t pe = network_.counterpart_pe[host];
    if (threadIdx.x % 32 == 0) *own.sent(at) = word;
    ptx::FenceProxyAsyncGlobal();
    ptx::FenceAcquireReleaseSystem();
    __syncwarp();
    if (kMutation == kWithSeparateSignal) {
      net::PutAndSignal(own.in(there), own.out(at), bytes, own.failed() + 1, word, pe);
      if (threadIdx.x % 32 == 0) net::Signal(own.arrived(there), word, pe);
      return;
    }
    net::PutAndSignal(own.in(there), own.out(at), bytes, own.arrived(there), word, pe);
  }

 private:
  __device__ SlotIndex At(int32_t host, int32_t n) const {
    return {host, static_cast<int32_t>(blockIdx.x), n % kChunkSlots};
  }

  const NetworkParams& network_;
  uint64_t epoch_;
};

// Forwards a lane's chunks from all hosts, by one warp: `rows(host)` says how many rows the
// counterpart there sends, `rows_per_chunk` of them in each. False once the group has failed.
template <typename Rows>
__device__ inline bool ForwardChunks(const NetworkParams& network, uint64_t epoch,
                                     int32_t rows_per_chunk, Rows&& rows) {
  constexpr int kHostsPerLane = kMaxHosts / 32;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const int32_t lane = static_cast<int32_t>(blockIdx.x), index = network.node.rank;
  int32_t first[kHostsPerLane], count[kHostsPerLane], told[kHostsPerLane], read[kHostsPerLane];
  bool more = false;
#pragma unroll
  for (int i = 0; i < kHostsPerLane; ++i) {
    const int32_t host = threadIdx.x % 32 + 32 * i;
    const bool is_other = host < shape.num_hosts && host != network.host;
    const ChunkShare share(is_other ? rows(host) : 0, rows_per_chunk, lane, gridDim.x);
    first[i] = share.first;
    count[i] = share.count;
    told[i] = read[i] = 0;
    more = more || count[i] > 0;
  }
  bool ok = true;
  Deadline deadline;
  while (more && ok) {
    more = false;
    uint64_t expected = 0, seen = 0;
    WordKind kind = WordKind::kChunkArrived;
    int32_t peer = 0;
#pragma unroll
    for (int i = 0; i < kHostsPerLane; ++i) {
      const int32_t host = threadIdx.x % 32 + 32 * i;
      const int32_t counterpart = host * shape.host_ranks + index;
      if (told[i] < count[i] && told[i] < read[i] + kChunkSlots) {
        const SlotIndex at{host, lane, told[i] % kChunkSlots};
        const uint64_t word = ChunkWord(epoch, network.node.tag, first[i] + told[i]);
        uint64_t value;
        const Seen what = LookAt(own.arrived(at), word, value);
        if (what == Seen::kHere) {
          net::Accept(own.arrived(at), word);
          for (int32_t d = 0; d < shape.host_ranks; ++d) {
            ptx::StoreReleaseSystem(network.Of(d).ready(index, at), word);
          }
          ++told[i];
          deadline = Deadline();
        } else if (what == Seen::kOther) {
          Fail(network.node, ErrorKind::kMismatch, kind, counterpart, word, value, 0);
          ok = false;
        } else {
          kind = WordKind::kChunkArrived, peer = counterpart, expected = word, seen = value;
        }
      }
      if (read[i] < told[i]) {
        const SlotIndex at{host, lane, read[i] % kChunkSlots};
        const uint64_t word = ChunkWord(epoch, network.node.tag, first[i] + read[i]);
        bool all = true;
        for (int32_t d = 0; d < shape.host_ranks && all; ++d) {
          uint64_t value;
          all = kMutation == kWithoutDone || LookAt(own.done(d, at), word, value) == Seen::kHere;
          if (!all) {
            kind = WordKind::kChunkDone, expected = word, seen = value;
            peer = network.host * shape.host_ranks + d;
          }
        }
        if (all) {
          const SlotIndex there{network.host, lane, at.slot};
          net::Signal(own.credit(there), word, network.counterpart_pe[host]);
          ++read[i];
          deadline = Deadline();
        }
      }
      more = more || read[i] < count[i];
    }
    if (more && ok && expected != 0) {
      ok = Continue(network, deadline, kind, peer, expected, seen);
    }
  }
  return __all_sync(~0u, ok);
}

// Reads chunks in the memory of forwarders.
class ChunkReader {
 public:
  __device__ ChunkReader(const NetworkParams& network, uint64_t epoch)
      : network_(network), epoch_(epoch) {}

  // Waits for the lane's `n`-th chunk from the rank with `index` on `host`, chunk `chunk` of its
  // list. All lanes of a warp; the same in all of them.
  __device__ bool Wait(int32_t host, int32_t index, int32_t n, int32_t chunk) const {
    bool ok = true;
    if (threadIdx.x % 32 == 0 && kMutation != kWithoutChunk) {
      const int32_t forwarder = network_.host * network_.shape.host_ranks + index;
      ok = WaitWord(network_, network_.Own().ready(index, At(host, n)), Word(chunk),
                    WordKind::kChunkReady, forwarder);
    }
    ok = __shfl_sync(~0u, ok, 0);
    ptx::FenceProxyAsyncGlobal();  // bulk loads come next
    __syncwarp();
    return ok;
  }

  __device__ const char* Memory(int32_t host, int32_t index, int32_t n) const {
    return network_.Of(index).in(At(host, n));
  }

  // All loads of the chunk by this warp are complete.
  __device__ void Done(int32_t host, int32_t index, int32_t n, int32_t chunk) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    ptx::StoreReleaseSystem(network_.Of(index).done(network_.node.rank, At(host, n)), Word(chunk));
  }

 private:
  __device__ SlotIndex At(int32_t host, int32_t n) const {
    return {host, static_cast<int32_t>(blockIdx.x), n % kChunkSlots};
  }
  __device__ uint64_t Word(int32_t chunk) const {
    return ChunkWord(epoch_, network_.node.tag, chunk);
  }

  const NetworkParams& network_;
  uint64_t epoch_;
};

}  // namespace jax_ep::cuda
