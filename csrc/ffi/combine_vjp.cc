// Handler of target jax_ep_combine_vjp.

#include "cpu/combine_vjp.h"

#include "ffi/group_call.h"

namespace jax_ep {

struct CombineVjpAttrs {
  GroupAttrs group;
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::CombineVjpAttrs, JAX_EP_GROUP_ATTRS);

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
    cpu::Geometry& geometry = args.geometry;
    check.Attribute("layout", attrs.group.layout == 0, "0 (expert)", attrs.group.layout);
    args.handle = CheckHandle(check, attrs.group, {topk, dest_row, recv_rows, recv_src, expert_idx},
                              geometry);
    if (!check.ok()) return;
    CheckSummableRows(check, "rows", rows, geometry.capacity, geometry);
    check.Argument("dy", dy, rows.element_type(), {geometry.num_tokens, geometry.hidden});
    check.Argument("row_weights", row_weights, ffi::F32, {geometry.capacity});
    check.Result("d_rows", *d_rows, rows.element_type(), {geometry.capacity, geometry.hidden});
    check.Result("d_weights", *d_weights, ffi::F32, {geometry.capacity});
    args.dy = dy.untyped_data();
    args.rows = rows.untyped_data();
    args.row_weights = static_cast<const float*>(row_weights.untyped_data());
    args.d_rows = d_rows->untyped_data();
    args.d_weights = static_cast<float*>(d_weights->untyped_data());
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
