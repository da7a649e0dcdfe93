// Handler of target jax_ep_combine_vjp on GPUs.

#include "cuda/node/combine_vjp.h"

#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error CombineVjp(cudaStream_t stream, int32_t device, CombineVjpAttrs attrs, ffi::AnyBuffer dy,
                      ffi::AnyBuffer rows, ffi::AnyBuffer row_weights, ffi::AnyBuffer topk,
                      ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows, ffi::AnyBuffer recv_src,
                      ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords, Out d_rows, Out d_weights) {
  Checker check("combine_vjp");
  cpu::CombineVjpArgs args{};
  DecodeCombineVjp(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                   {dy, rows, row_weights, *d_rows, *d_weights}, args);
  const cpu::Geometry& geometry = args.geometry;
  check.Attribute("hidden", cuda::FitsCombineVjp(geometry.row_bytes()),
                  "rows of about 100 KB at most on GPUs", geometry.hidden);
  DeviceGroup group;
  if (auto error = PrepareGroup(check, attrs.group, coords, device, cuda::OpKind::kCombineVjp,
                                {geometry.num_tokens, geometry.top_k, geometry.capacity,
                                 geometry.hidden, static_cast<int64_t>(geometry.dtype)},
                                group);
      error.failure()) {
    return error;
  }
  cuda::CombineVjpParams params{};
  params.group = group.params;
  SharedOperands shared(group, stream);
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.num_rows = geometry.rows_per_source();
  params.capacity = geometry.capacity;
  params.hidden = geometry.hidden;
  params.dy = shared.Input("dy", args.dy, geometry.num_tokens * geometry.row_bytes());
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.recv_rows = args.handle.recv_rows;
  params.recv_src = args.handle.recv_src;
  params.d_rows = args.d_rows;
  params.d_weights = args.d_weights;
  params.num_blocks = group.NumBlocks(attrs.group, 64);
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchCombineVjp(params, stream), "combine_vjp");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_vjp_execute, CombineVjp,
                              BindDeviceCall<CombineVjpAttrs>()
                                  .Arg<ffi::AnyBuffer>()   // dy
                                  .Arg<ffi::AnyBuffer>()   // rows
                                  .Arg<ffi::AnyBuffer>()   // row_weights
                                  .Arg<ffi::AnyBuffer>()   // topk
                                  .Arg<ffi::AnyBuffer>()   // dest_row
                                  .Arg<ffi::AnyBuffer>()   // recv_rows
                                  .Arg<ffi::AnyBuffer>()   // recv_src
                                  .Arg<ffi::AnyBuffer>()   // expert_idx
                                  .Arg<ffi::AnyBuffer>()   // coords
                                  .Ret<ffi::AnyBuffer>()   // d_rows
                                  .Ret<ffi::AnyBuffer>(),  // d_weights
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
