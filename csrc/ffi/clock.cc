#include "ffi/clock.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

void CheckClock(Checker& check, ffi::AnyBuffer x, ffi::AnyBuffer same, ffi::AnyBuffer time) {
  if (same.untyped_data() != x.untyped_data()) {
    check.Fail("result 0", "the operand's own buffer (operand_output_aliases)", "another one");
  }
  check.Result("time", time, ffi::U32, {2});
}

}  // namespace jax_ep
