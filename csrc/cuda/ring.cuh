// The ring: how sums of rows get from the rank that makes them to the token's home.
//
// Home's workspace has slots for the sums of each peer, which token t uses as slot t % slots. A sum
// travels in parts, each with two words: that it is there, and that home has read it.
#pragma once

#include <cstdint>

#include "cuda/combine.h"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

// What all warps of a running combine need to know. In shared memory: registers are scarce.
struct CombineState {
  uint64_t epoch;
  int32_t row_bytes;
  int32_t part_bytes;  // of all parts of a row but the last
  int32_t num_parts;   // of a row
  int32_t num_slots;   // for the sums of one peer
  int32_t num_peers;   // that sums are made for
  int32_t num_units;   // parts of rows of all tokens
  int32_t lag;         // see GetItem
  PeerInputs inputs;
};

class Ring {
 public:
  __device__ Ring(const CombineParams& p, const CombineState& state) : p_(p), state_(state) {}

  // Where the sum of rank `source` for a token of `home` goes.
  __device__ char* Sum(int home, int source, int32_t token) const {
    const int share = source < home ? source : source - 1;
    const int32_t slot = share * state_.num_slots + token % state_.num_slots;
    return p_.group.peers[home]->ring + slot * state_.row_bytes;
  }

  // Source: waits until home has read the sum that was in the slot of `token` before, if there was
  // one. False once the group has failed. Called by all lanes together.
  __device__ bool WaitFree(int home, int32_t token, int32_t part) const {
    if (kMutation == kWithoutRingFree) return true;
    do {  // not every token has a sum
      token -= state_.num_slots;
    } while (token >= 0 && !HasRows(home * p_.num_tokens + token));
    const bool is_free = token < 0 || Wait(Own(p_.group).ring_free[home], token, part, home);
    return __all_sync(~0u, is_free);
  }

  // Home: tells that the sum of `source` is read, by all lanes, before the last __syncwarp.
  __device__ void TellFree(int source, int32_t token, int32_t part) const {
    if (token + state_.num_slots >= p_.num_tokens) return;  // nobody will ask
    Tell(p_.group.peers[source]->ring_free[p_.group.rank], token, part);
  }

  // Source: tells that the sum is there, which all lanes have stored before the last __syncwarp.
  __device__ void TellReady(int home, int32_t token, int32_t part) const {
    ptx::FenceAcquireReleaseSystem();
    Tell(p_.group.peers[home]->ring_ready[p_.group.rank], token, part);
  }

  // Home: waits until the sum of `source` is there. False once the group has failed.
  __device__ bool WaitReady(int source, int32_t token, int32_t part) const {
    return kMutation == kWithoutRingReady ||
           Wait(Own(p_.group).ring_ready[source], token, part, source);
  }

 private:
  __device__ uint64_t Word(int32_t token) const {
    return state_.epoch << 32 | static_cast<uint32_t>(token);
  }
  __device__ int32_t IndexOf(int32_t token, int32_t part) const {
    return token % state_.num_slots * state_.num_parts + part;
  }
  __device__ bool HasRows(int32_t source) const {
    const int32_t row = p_.recv_rows[int64_t{source} * p_.num_rows];
    return row >= 0 && row < p_.capacity;
  }
  __device__ void Tell(uint64_t* words, int32_t token, int32_t part) const {
    ptx::StoreRelaxedSystem(&words[IndexOf(token, part)], Word(token));
  }
  __device__ bool Wait(const uint64_t* words, int32_t token, int32_t part, int peer) const {
    const uint64_t expected = Word(token);
    for (Deadline deadline;;) {
      const uint64_t seen = ptx::LoadAcquireSystem(&words[IndexOf(token, part)]);
      if (seen == expected) return true;
      if (!deadline.Continue(p_.group, Phase::kRows, peer, expected, seen)) return false;
    }
  }

  const CombineParams& p_;
  const CombineState& state_;
};

}  // namespace jax_ep::cuda
