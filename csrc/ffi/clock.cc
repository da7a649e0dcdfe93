#include "ffi/clock.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

void CheckClock(Checker& check, const ClockBuffers& buffers) {
  if (buffers.same.untyped_data() != buffers.x.untyped_data()) {
    check.Fail("result 0", "the operand's own buffer (operand_output_aliases)", "another one");
  }
  check.Result("time", buffers.time, ffi::U32, {2});
}

}  // namespace jax_ep
