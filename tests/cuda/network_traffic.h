// What the ops of a group that spans hosts must send over the network, from their routing alone.
// Each row crosses once to each other host that needs it, and a chunk has 16 bytes of its own.
// network_test compares the emulator's network with it, and tests/support/network_traffic.py the
// late one.
#pragma once

#include <cstdint>

#include "cuda/network/layout.h"
#include "plan/routing.h"

namespace jax_ep::traffic {

// What a rank sends to its counterpart on one host.
struct Traffic {
  int64_t puts;
  int64_t put_bytes;
  int64_t signals;  // those of puts too
};

// How many of a rank's tokens go to a host. `topk` [T, K] has its choices, -1 for none.
inline int64_t Crossings(const int32_t* topk, int num_tokens, int top_k, int experts_per_host,
                         int host) {
  int64_t crossings = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int k = 0; k < top_k; ++k) {
      const int32_t expert = topk[token * top_k + k];
      if (expert < 0 || expert / experts_per_host != host) continue;
      ++crossings;
      break;
    }
  }
  return crossings;
}

// Bytes of a row in a chunk of dispatch, with its scales and its weights (top_k=0: none); or of a
// cotangent, which has neither.
inline int DispatchRowBytes(int row_bytes, int num_scales, int top_k) {
  return row_bytes + plan::RoundUp(num_scales * 4, 16) + plan::RoundUp(top_k * 4, 16);
}

// Bytes of a row in a chunk of combine, with the values that go home (top_k=0: none).
inline int CombineRowBytes(int row_bytes, int top_k) {
  return row_bytes + plan::RoundUp(top_k * 4, 16);
}

// An op that sends `num_rows` of `num_tokens`, each with `row_bytes` in its chunk. The counterpart
// sends as many chunks, and gets a credit for each of them.
inline Traffic OfRows(const cuda::NetworkShape& shape, int num_lanes, int num_tokens, int row_bytes,
                      int64_t num_rows) {
  const int window = cuda::WindowTokens(shape, row_bytes, num_tokens, num_lanes);
  const int64_t chunks = (num_tokens + window - 1) / window;
  const int64_t headers = chunks * static_cast<int64_t>(sizeof(cuda::ChunkHeader));
  return {chunks, headers + num_rows * row_bytes, 2 * chunks};
}

// A plan: the choices of all tokens, two bytes each.
inline Traffic OfPlan(int num_tokens, int top_k) { return {1, int64_t{num_tokens} * top_k * 2, 1}; }

}  // namespace jax_ep::traffic
