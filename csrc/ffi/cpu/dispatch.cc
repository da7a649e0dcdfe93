// Handler of target jax_ep_dispatch.

#include "cpu/dispatch.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Future Dispatch(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool, DispatchAttrs attrs,
                     ffi::AnyBuffer x, ffi::AnyBuffer scales, ffi::AnyBuffer weights,
                     ffi::AnyBuffer topk, ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows,
                     ffi::AnyBuffer recv_src, ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords,
                     Out rows, Out row_scales, Out row_weights) {
  const auto decode = [&](Checker& check, cpu::DispatchArgs& args) {
    DecodeDispatch(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                   {x, scales, weights, *rows, *row_scales, *row_weights}, args);
  };
  return JoinGroup<cpu::DispatchArgs, cpu::DispatchWork>(Target::kDispatch, {state, run_id, pool},
                                                         attrs.group, coords, decode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_execute, Dispatch,
                              BindGroupCall<DispatchAttrs>()
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // scales
                                  .Arg<ffi::AnyBuffer>()    // weights
                                  .Arg<ffi::AnyBuffer>()    // topk
                                  .Arg<ffi::AnyBuffer>()    // dest_row
                                  .Arg<ffi::AnyBuffer>()    // recv_rows
                                  .Arg<ffi::AnyBuffer>()    // recv_src
                                  .Arg<ffi::AnyBuffer>()    // expert_idx
                                  .Arg<ffi::AnyBuffer>()    // coords
                                  .Ret<ffi::AnyBuffer>()    // rows
                                  .Ret<ffi::AnyBuffer>()    // row_scales
                                  .Ret<ffi::AnyBuffer>());  // row_weights

}  // namespace jax_ep
