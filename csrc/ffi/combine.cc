// Handler of target jax_ep_combine.

#include "cpu/combine.h"

#include "ffi/group_call.h"

namespace jax_ep {

struct CombineAttrs {
  GroupAttrs group;
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::CombineAttrs, JAX_EP_GROUP_ATTRS);

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
    cpu::Geometry& geometry = args.geometry;
    args.handle = CheckHandle(check, attrs.group, {topk, dest_row, recv_rows, recv_src, expert_idx},
                              geometry);
    if (!check.ok()) return;
    CheckSummableRows(check, "rows", rows, geometry.capacity, geometry);
    check.Result("y", *y, rows.element_type(), {geometry.num_tokens, geometry.hidden});
    args.rows = rows.untyped_data();
    args.y = y->untyped_data();
    if (IsPresent(row_weights)) {
      check.Argument("row_weights", row_weights, ffi::F32, {geometry.capacity});
      args.row_weights = static_cast<const float*>(row_weights.untyped_data());
    } else {
      check.Argument("row_weights", row_weights, ffi::F32, {0});
    }
    if (IsPresent(*home)) {
      CheckRowValues(check, "argument values", values, geometry);
      check.Result("home", *home, ffi::F32, {geometry.num_tokens, geometry.top_k});
      args.values = static_cast<const float*>(values.untyped_data());
      args.home = static_cast<float*>(home->untyped_data());
    } else {
      check.Argument("values", values, ffi::F32, {0});
      check.Result("home", *home, ffi::F32, {0});
    }
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
