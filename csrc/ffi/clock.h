// What handlers of target jax_ep_clock check alike.
//
// The target is no op of a group: it says when a device comes to it. Its first result is its
// operand, in place, so that what is given that result runs after the clock was read.
#pragma once

#include "ffi/checker.h"
#include "ffi/signatures.h"

namespace jax_ep {

void CheckClock(Checker& check, const ClockBuffers& buffers);

}  // namespace jax_ep
