// What handlers of target jax_ep_clock check alike.
//
// The target is no op of a group: it says when a device comes to it. Its first result is its
// operand, in place, so that what is given that result runs after the clock was read.
#pragma once

#include "ffi/checker.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// `time` is [2] uint32: nanoseconds, low word first.
void CheckClock(Checker& check, ::xla::ffi::AnyBuffer x, ::xla::ffi::AnyBuffer same,
                ::xla::ffi::AnyBuffer time);

}  // namespace jax_ep
