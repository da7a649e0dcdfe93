// Handler of target jax_ep_combine_vjp.

#include "cpu/combine_vjp.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Future CombineVjp(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool,
                       CombineVjpAttrs attrs, ffi::AnyBuffer dy, ffi::AnyBuffer rows,
                       ffi::AnyBuffer row_weights, ffi::AnyBuffer topk, ffi::AnyBuffer dest_row,
                       ffi::AnyBuffer recv_rows, ffi::AnyBuffer recv_src, ffi::AnyBuffer expert_idx,
                       ffi::AnyBuffer coords, Out d_rows, Out d_weights) {
  const auto decode = [&](Checker& check, cpu::CombineVjpArgs& args) {
    DecodeCombineVjp(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                     {dy, rows, row_weights, *d_rows, *d_weights}, args);
  };
  return JoinGroup<cpu::CombineVjpArgs, cpu::CombineVjpWork>(
      Target::kCombineVjp, {state, run_id, pool}, attrs.group, coords, decode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_vjp_execute, CombineVjp,
                              BindGroupCall<CombineVjpAttrs>()
                                  .Arg<ffi::AnyBuffer>()    // dy
                                  .Arg<ffi::AnyBuffer>()    // rows
                                  .Arg<ffi::AnyBuffer>()    // row_weights
                                  .Arg<ffi::AnyBuffer>()    // topk
                                  .Arg<ffi::AnyBuffer>()    // dest_row
                                  .Arg<ffi::AnyBuffer>()    // recv_rows
                                  .Arg<ffi::AnyBuffer>()    // recv_src
                                  .Arg<ffi::AnyBuffer>()    // expert_idx
                                  .Arg<ffi::AnyBuffer>()    // coords
                                  .Ret<ffi::AnyBuffer>()    // d_rows
                                  .Ret<ffi::AnyBuffer>());  // d_weights

}  // namespace jax_ep
