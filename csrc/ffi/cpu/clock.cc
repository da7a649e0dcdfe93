// Handler of target jax_ep_clock.

#include "ffi/clock.h"

#include <chrono>
#include <cstdint>

#include "ffi/cpu/test_hooks.h"
#include "ffi/targets.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Clock(const ClockBuffers& buffers) {
  OnCall(Target::kClock);
  Checker check("clock");
  CheckClock(check, buffers);
  if (!check.ok()) return check.error();
  const uint64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                           std::chrono::steady_clock::now().time_since_epoch())
                           .count();
  uint32_t* words = static_cast<uint32_t*>(buffers.time.untyped_data());
  words[0] = static_cast<uint32_t>(now);
  words[1] = static_cast<uint32_t>(now >> 32);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_ep_clock_execute, [](ClockAttrs, auto... buffers) { return Clock({BufferOf(buffers)...}); },
    ffi::Ffi::Bind().Attrs<ClockAttrs>() JAX_EP_BIND_BUFFERS(CLOCK));

}  // namespace jax_ep
