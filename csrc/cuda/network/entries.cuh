// The entries of a rank (network/routes.h).
#pragma once

#include <cstdint>

#include "plan/routing.h"

namespace jax_ep::cuda {

// The first entry from `begin` to `end` whose token is `token` or a later one. By one warp, which
// looks at 32 of them at a time.
__device__ inline int32_t FirstEntry(const int32_t* tokens, int32_t begin, int32_t end,
                                     int32_t token) {
  const int32_t lane = threadIdx.x % 32;
  while (begin < end) {
    const int32_t step = (end - begin + 31) / 32;
    const int32_t at = begin + lane * step;
    const uint32_t below = __ballot_sync(~0u, at < end && tokens[at] < token);
    if (below == 0) return begin;
    const int32_t last = 31 - __clz(static_cast<int>(below));
    begin += last * step + 1;
    if (last < 31) end = plan::Min(end, begin + step - 1);
  }
  return begin;
}

}  // namespace jax_ep::cuda
