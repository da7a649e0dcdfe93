// The ring: how sums of rows get from the rank that makes them to the token's home.
//
// Home's workspace has slots for the sums of each peer; token t uses slot t % slots. A sum is sent
// in parts. Each part has two words: that it is there, and that home has read it.
//
// Params has group, num_tokens, num_rows, capacity and recv_rows as in node/combine.h.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"

namespace jax_ep::cuda {

// How one op uses the ring.
struct RingState {
  uint64_t epoch;
  int32_t row_bytes;
  int32_t part_bytes;  // of all parts of a row but the last
  int32_t num_parts;   // of a row; a power of two
  int32_t num_slots;   // for the sums of one peer
};

// A part of the sum of a token.
struct RingPlace {
  int32_t token;
  int32_t part;
  int32_t slot;  // token % num_slots
};

template <typename Params>
class Ring {
 public:
  __device__ Ring(const Params& p, const RingState& state) : p_(p), state_(state) {}

  // Where the sum of rank `source` for a token of `home` goes.
  __device__ char* Sum(int home, int source, const RingPlace& place) const {
    const int share = source < home ? source : source - 1;
    const int32_t slot = share * state_.num_slots + place.slot;
    return p_.group.peers[home]->ring + slot * state_.row_bytes;
  }

  // Source: waits until home has read the previous sum of the slot, if there was one. False once
  // the group has failed. Called by all lanes together.
  __device__ bool WaitFree(int home, const RingPlace& place) const {
    if (kMutation == kWithoutRingFree) return true;
    int32_t before = place.token;
    do {  // not every token has a sum
      before -= state_.num_slots;
    } while (before >= 0 && !HasRows(home * p_.num_tokens + before));
    const bool is_free =
        before < 0 || Wait(WordKind::kSumRead, Own(p_.group).ring_free[home], place, before, home);
    return __all_sync(~0u, is_free);
  }

  // Home: tells `source` that its sum has been read (by all lanes, before the last __syncwarp). The
  // store releases these loads, because the source then overwrites what they read, and in PTX's
  // memory model a relaxed store may be seen before an earlier load is done. Lanes that each wait
  // for a source call this together, so that the warp pays for one release and not for one for each
  // source.
  __device__ void TellFree(int source, const RingPlace& place) const {
    if (place.token + state_.num_slots >= p_.num_tokens) return;  // nobody will wait for it
    Tell(p_.group.peers[source]->ring_free[p_.group.rank], place);
  }

  // Source: tells home that the sum is there. All lanes have stored it before the last __syncwarp.
  // This is a release store and no fence, because a fence also acquires, which empties the SM's L1
  // cache.
  __device__ void TellReady(int home, const RingPlace& place) const {
    Tell(p_.group.peers[home]->ring_ready[p_.group.rank], place);
  }

  // Home: waits until the sum of `source` is there. False once the group has failed.
  __device__ bool WaitReady(int source, const RingPlace& place) const {
    return kMutation == kWithoutRingReady ||
           Wait(WordKind::kSum, Own(p_.group).ring_ready[source], place, place.token, source);
  }

 private:
  __device__ int32_t IndexOf(const RingPlace& place) const {
    return place.slot * state_.num_parts + place.part;
  }
  __device__ bool HasRows(int32_t source) const {
    const int32_t row = p_.recv_rows[int64_t{source} * p_.num_rows];
    return row >= 0 && row < p_.capacity;
  }
  __device__ void Tell(uint64_t* words, const RingPlace& place) const {
    ptx::StoreReleaseSystem(&words[IndexOf(place)], RingWord(place.token, state_.epoch));
  }
  // Waits until the word of the place names `token`.
  __device__ bool Wait(WordKind kind, const uint64_t* words, const RingPlace& place, int32_t token,
                       int peer) const {
    const uint64_t expected = RingWord(token, state_.epoch);
    for (Deadline deadline;;) {
      const uint64_t seen = ptx::LoadAcquireSystem(&words[IndexOf(place)]);
      if (seen == expected) return true;
      if (!deadline.Continue(p_.group, kind, peer, expected, seen)) return false;
    }
  }

  const Params& p_;
  const RingState& state_;
};

}  // namespace jax_ep::cuda
