// Handler of target jax_ep_plan.

#include "cpu/plan.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Future Plan(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool, PlanAttrs attrs,
                 ffi::AnyBuffer topk_idx, ffi::AnyBuffer coords, Out topk, Out dest_row,
                 Out recv_rows, Out recv_src, Out expert_idx, Out group_sizes, Out counts,
                 Out demand, Out num_dropped, Out num_invalid) {
  const auto decode = [&](Checker& check, cpu::PlanArgs& args) {
    DecodePlan(check, attrs,
               {topk_idx, *topk, *dest_row, *recv_rows, *recv_src, *expert_idx, *group_sizes,
                *counts, *demand, *num_dropped, *num_invalid},
               args);
  };
  return JoinGroup<cpu::PlanArgs, cpu::PlanWork>(Target::kPlan, {state, run_id, pool}, attrs.group,
                                                 coords, decode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_execute, Plan,
                              BindGroupCall<PlanAttrs>()
                                  .Arg<ffi::AnyBuffer>()    // topk_idx
                                  .Arg<ffi::AnyBuffer>()    // coords
                                  .Ret<ffi::AnyBuffer>()    // topk
                                  .Ret<ffi::AnyBuffer>()    // dest_row
                                  .Ret<ffi::AnyBuffer>()    // recv_rows
                                  .Ret<ffi::AnyBuffer>()    // recv_src
                                  .Ret<ffi::AnyBuffer>()    // expert_idx
                                  .Ret<ffi::AnyBuffer>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>()    // counts
                                  .Ret<ffi::AnyBuffer>()    // demand
                                  .Ret<ffi::AnyBuffer>()    // num_dropped
                                  .Ret<ffi::AnyBuffer>());  // num_invalid

}  // namespace jax_ep
