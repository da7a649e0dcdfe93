// Handler of target jax_ep_combine.

#include "cpu/combine.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Future Combine(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool, CombineAttrs attrs,
                    ffi::AnyBuffer rows, ffi::AnyBuffer row_weights, ffi::AnyBuffer values,
                    ffi::AnyBuffer topk, ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows,
                    ffi::AnyBuffer recv_src, ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords,
                    Out y, Out home) {
  const auto decode = [&](Checker& check, cpu::CombineArgs& args) {
    DecodeCombine(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                  {rows, row_weights, values, *y, *home}, args);
  };
  return JoinGroup<cpu::CombineArgs, cpu::CombineWork>(Target::kCombine, {state, run_id, pool},
                                                       attrs.group, coords, decode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_execute, Combine,
                              BindGroupCall<CombineAttrs>()
                                  .Arg<ffi::AnyBuffer>()    // rows
                                  .Arg<ffi::AnyBuffer>()    // row_weights
                                  .Arg<ffi::AnyBuffer>()    // values
                                  .Arg<ffi::AnyBuffer>()    // topk
                                  .Arg<ffi::AnyBuffer>()    // dest_row
                                  .Arg<ffi::AnyBuffer>()    // recv_rows
                                  .Arg<ffi::AnyBuffer>()    // recv_src
                                  .Arg<ffi::AnyBuffer>()    // expert_idx
                                  .Arg<ffi::AnyBuffer>()    // coords
                                  .Ret<ffi::AnyBuffer>()    // y
                                  .Ret<ffi::AnyBuffer>());  // home

}  // namespace jax_ep
