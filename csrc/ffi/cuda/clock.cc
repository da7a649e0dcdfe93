// Handler of target jax_ep_clock on GPUs.

#include "cuda/measure/clock.h"

#include "ffi/clock.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Clock(cudaStream_t stream, int32_t device, int32_t ordinal, ffi::AnyBuffer x,
                 ffi::Result<ffi::AnyBuffer> same, ffi::Result<ffi::AnyBuffer> time) {
  static_cast<void>(device);
  static_cast<void>(ordinal);
  Checker check("clock");
  CheckClock(check, x, *same, *time);
  if (!check.ok()) return ToError(check.status());
  return ToError(cuda::LaunchClock(static_cast<uint32_t*>(time->untyped_data()), stream), "clock");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_clock_execute, Clock,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attr<int32_t>("ordinal")
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Ret<ffi::AnyBuffer>()   // the same buffer
                                  .Ret<ffi::AnyBuffer>(),  // time
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
