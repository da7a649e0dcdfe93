// Handler of target jax_ep_clock.

#include "ffi/clock.h"

#include <chrono>
#include <cstdint>

#include "ffi/cpu/test_hooks.h"
#include "ffi/targets.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Clock(int32_t ordinal, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> same,
                 ffi::Result<ffi::AnyBuffer> time) {
  static_cast<void>(ordinal);
  OnCall(Target::kClock);
  Checker check("clock");
  CheckClock(check, x, *same, *time);
  if (!check.ok()) return ToError(check.status());
  const uint64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                           std::chrono::steady_clock::now().time_since_epoch())
                           .count();
  uint32_t* words = static_cast<uint32_t*>(time->untyped_data());
  words[0] = static_cast<uint32_t>(now);
  words[1] = static_cast<uint32_t>(now >> 32);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_clock_execute, Clock,
                              ffi::Ffi::Bind()
                                  .Attr<int32_t>("ordinal")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Ret<ffi::AnyBuffer>()    // the same buffer
                                  .Ret<ffi::AnyBuffer>());  // time

}  // namespace jax_ep
