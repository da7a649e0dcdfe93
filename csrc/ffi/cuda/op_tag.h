// The tag of an op, which its flags carry beside the epoch: what the op is, and where in the
// program.
#pragma once

#include <cstdint>

#include "cuda/core/workspace.h"

namespace jax_ep {

// A digest of the op and of `shape`, the numbers that all ranks must agree on, plus the ordinal of
// the call in its program. So calls that differ in their ordinals alone have different tags, up to
// 2^15 calls; others share one with a probability of 2^-15. Never 0.
template <typename Shape>
uint32_t OpTag(cuda::OpKind op, const Shape& shape, int32_t ordinal) {
  uint64_t digest = 14695981039346656037u;  // FNV-1a
  const auto add = [&](uint64_t value) { digest = (digest ^ value) * 1099511628211u; };
  add(static_cast<uint64_t>(op));
  for (const int64_t value : shape) add(static_cast<uint64_t>(value));
  const uint64_t folded = digest ^ digest >> 32;
  const uint64_t place = (folded ^ folded >> 16) + static_cast<uint64_t>(ordinal);
  return static_cast<uint32_t>(place << 1 & ((1u << cuda::kTagBits) - 1)) | 1u;
}

}  // namespace jax_ep
