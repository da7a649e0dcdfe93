// The routes of a rank of a group that spans hosts.
#pragma once

#include <cstdint>

namespace jax_ep::cuda {

// A rank's *list* for a host has its tokens, ascending, that go to any rank there. Symbols as in
// plan/routing.h; P is the number of hosts. Nothing here grows with R * T.
struct NetworkRoutes {
  // As a source:
  const int32_t* send_tokens;  // [T * min(P, K)], the lists for all hosts, one after the other;
                               // that for its own host is empty
  const int32_t* send_start;  // [P + 1], where each begins, and the last ends
  // As a destination. Entries are its rows, in the order of (source rank, token, local expert).
  const int32_t* list_size;  // [R], of each source rank's list for this host; of no use for ranks
                             // of this host
  const int32_t* recv_start;  // [R + 1], where the entries of each source rank begin
  const int32_t*
      recv_place;           // [C], place in the source's list; of a source on this host, the token
  const int32_t* recv_row;  // [C], row
};

}  // namespace jax_ep::cuda
