// The routes of a rank of a group that spans hosts.
#pragma once

#include <cstdint>

#include "ops/geometry.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h. Nothing here grows with R * T.
struct NetworkRoutes {
  const int32_t* topk;  // [T, K], as a source: sanitised
  // As a destination. Entries are this rank's rows, in the order of (source rank, token, expert).
  const int32_t* recv_start;  // [R + 1], where the entries of each source rank begin
  const int32_t* recv_token;  // [C]
  const int32_t* recv_row;    // [C]

  static NetworkRoutes Of(const ops::Handle& handle) {
    return {handle.topk, handle.recv_start, handle.recv_token, handle.recv_row};
  }
};

}  // namespace jax_ep::cuda
