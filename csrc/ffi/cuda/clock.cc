// Handler of target jax_ep_clock on GPUs.

#include "cuda/measure/clock.h"

#include "ffi/clock.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Clock(cudaStream_t stream, int32_t, const ClockAttrs&,
                 const DeviceClockBuffers& buffers) {
  Checker check("clock");
  CheckClock(check, buffers);
  if (!check.ok()) return check.error();
  auto* time = static_cast<uint32_t*>(buffers.time.untyped_data());
  return ToError(cuda::LaunchClock(time, stream), "clock");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_clock_execute, Clock, CLOCK);

}  // namespace jax_ep
