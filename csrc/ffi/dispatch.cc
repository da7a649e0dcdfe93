// Handler of target jax_ep_dispatch.

#include "cpu/dispatch.h"

#include "ffi/group_call.h"

namespace jax_ep {

struct DispatchAttrs {
  GroupAttrs group;
  int32_t quantization;  // cpu::Quantization
  int32_t dense_output;  // 0 or 1
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::DispatchAttrs, JAX_EP_GROUP_ATTRS,
                                      ::xla::ffi::StructMember<int32_t>("quantization"),
                                      ::xla::ffi::StructMember<int32_t>("dense_output"));

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

// Checks the payload: x, its scales, and the rows that come of them.
void CheckPayload(Checker& check, const DispatchAttrs& attrs, ffi::AnyBuffer x,
                  ffi::AnyBuffer scales, Out& rows, Out& row_scales, cpu::DispatchArgs& args) {
  cpu::Geometry& geometry = args.geometry;
  CheckRows(check, "x", x, geometry.num_tokens, geometry);
  check.Attribute("quantization", attrs.quantization >= 0 && attrs.quantization <= 2,
                  "0 (none), 1 (float32 scales) or 2 (ue8m0 scales)", attrs.quantization);
  args.quantization = static_cast<cpu::Quantization>(attrs.quantization);
  args.dense_output = attrs.dense_output != 0;

  const bool quantize = args.quantization != cpu::Quantization::kNone;
  const bool quantized_input = geometry.dtype == cpu::DType::kFloat8E4M3FN;
  const bool quantized_output = quantized_input || (quantize && !args.dense_output);
  const int64_t num_blocks = geometry.hidden / cpu::kScaleBlock;
  if (quantize && quantized_input)
    check.Argument("x", x, ffi::BF16, {geometry.num_tokens, geometry.hidden});
  if ((quantize || quantized_input) && geometry.hidden % cpu::kScaleBlock != 0) {
    check.Fail("argument x", "a hidden size that is a multiple of 128",
               std::to_string(geometry.hidden));
  }
  if (quantized_input) {
    check.Argument("scales", scales, ffi::F32, {geometry.num_tokens, num_blocks});
  } else {
    check.Argument("scales", scales, ffi::F32, {0});
  }
  check.Result("rows", *rows, quantized_output ? ffi::F8E4M3FN : x.element_type(),
               {geometry.capacity, geometry.hidden});
  if (quantized_output) {
    check.Result("row_scales", *row_scales, ffi::F32, {geometry.capacity, num_blocks});
  } else {
    check.Result("row_scales", *row_scales, ffi::F32, {0});
  }
  args.x = x.untyped_data();
  args.rows = rows->untyped_data();
  args.scales = quantized_input ? static_cast<const float*>(scales.untyped_data()) : nullptr;
  args.row_scales = quantized_output ? static_cast<float*>(row_scales->untyped_data()) : nullptr;
}

ffi::Future Dispatch(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool, DispatchAttrs attrs,
                     ffi::AnyBuffer x, ffi::AnyBuffer scales, ffi::AnyBuffer weights,
                     ffi::AnyBuffer topk, ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows,
                     ffi::AnyBuffer recv_src, ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords,
                     Out rows, Out row_scales, Out row_weights) {
  const auto decode = [&](Checker& check, cpu::DispatchArgs& args) {
    args.handle = CheckHandle(check, attrs.group, {topk, dest_row, recv_rows, recv_src, expert_idx},
                              args.geometry);
    if (!check.ok()) return;
    CheckPayload(check, attrs, x, scales, rows, row_scales, args);
    const cpu::Geometry& geometry = args.geometry;
    if (!IsPresent(weights)) {
      check.Argument("weights", weights, ffi::F32, {0});
      check.Result("row_weights", *row_weights, ffi::F32, {0});
      return;
    }
    check.Argument("weights", weights, ffi::F32, {geometry.num_tokens, geometry.top_k});
    CheckRowValues(check, "result row_weights", *row_weights, geometry);
    args.weights = static_cast<const float*>(weights.untyped_data());
    args.row_weights = static_cast<float*>(row_weights->untyped_data());
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
