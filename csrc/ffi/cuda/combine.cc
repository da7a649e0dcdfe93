// Handler of target jax_ep_combine on GPUs.

#include "cuda/node/combine.h"

#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Combine(cudaStream_t stream, int32_t device, CombineAttrs attrs, ffi::AnyBuffer rows,
                   ffi::AnyBuffer row_weights, ffi::AnyBuffer values, ffi::AnyBuffer topk,
                   ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows, ffi::AnyBuffer recv_src,
                   ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords, Out y, Out home) {
  Checker check("combine");
  cpu::CombineArgs args{};
  DecodeCombine(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                {rows, row_weights, values, *y, *home}, args);
  const cpu::Geometry& geometry = args.geometry;
  const bool by_expert = geometry.layout == plan::Layout::kExpert;
  check.Attribute("hidden",
                  !by_expert || cuda::RingSlots(geometry.num_ranks, geometry.row_bytes()) > 0,
                  "rows that fit the ring of sums", geometry.hidden);
  DeviceGroup group;
  if (auto error =
          PrepareGroup(check, attrs.group, coords, device, cuda::OpKind::kCombine,
                       {geometry.num_tokens, geometry.top_k, geometry.capacity, geometry.hidden,
                        static_cast<int64_t>(geometry.dtype), args.row_weights != nullptr,
                        args.values != nullptr, static_cast<int64_t>(geometry.layout)},
                       group);
      error.failure()) {
    return error;
  }
  cuda::CombineParams params{};
  params.group = group.params;
  SharedOperands shared(group, stream);
  params.layout = geometry.layout;
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.num_experts = geometry.num_experts;
  params.capacity = geometry.capacity;
  params.num_rows = geometry.rows_per_source();
  params.hidden = geometry.hidden;
  // Sums of rows, in layout "expert", reach home through its ring.
  params.rows = by_expert
                    ? args.rows
                    : shared.Input("rows", args.rows, geometry.capacity * geometry.row_bytes());
  params.row_weights = args.row_weights;
  params.values =
      shared.Input("values", args.values,
                   int64_t{geometry.capacity} * (by_expert ? 1 : geometry.top_k) * sizeof(float));
  params.topk = args.handle.topk;
  params.dest_row = args.handle.dest_row;
  params.recv_rows = args.handle.recv_rows;
  params.y = args.y;
  params.home = args.home;
  params.num_blocks = group.NumBlocks(attrs.group, by_expert ? 64 : 24);
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchCombine(params, stream), "combine");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_execute, Combine,
                              BindDeviceCall<CombineAttrs>()
                                  .Arg<ffi::AnyBuffer>()   // rows
                                  .Arg<ffi::AnyBuffer>()   // row_weights
                                  .Arg<ffi::AnyBuffer>()   // values
                                  .Arg<ffi::AnyBuffer>()   // topk
                                  .Arg<ffi::AnyBuffer>()   // dest_row
                                  .Arg<ffi::AnyBuffer>()   // recv_rows
                                  .Arg<ffi::AnyBuffer>()   // recv_src
                                  .Arg<ffi::AnyBuffer>()   // expert_idx
                                  .Arg<ffi::AnyBuffer>()   // coords
                                  .Ret<ffi::AnyBuffer>()   // y
                                  .Ret<ffi::AnyBuffer>(),  // home
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
