// Checks of calls that only GPUs have: dispatches with their plans, and calls of latency mode, of
// whole ops, of their start calls and of their done calls.

#include "ffi/decode.h"
#include "ffi/decode_parts.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

template <typename Attrs>
PlanAttrs PlanAttrsOf(const Attrs& attrs) {
  return {attrs.group, attrs.alignment, attrs.expert_capacity, attrs.masked};
}

template <typename Attrs>
DispatchAttrs DispatchAttrsOf(const Attrs& attrs) {
  return {attrs.group, attrs.quantization, attrs.dense_output, attrs.unused_rows};
}

#define JAX_EP_SAME_BUFFER(name) buffers.name,

// A dispatch with its results: in one call, or the done call.
template <typename Attrs, typename Buffers>
void DecodeDispatch(Checker& check, const Attrs& attrs, const Buffers& buffers,
                    ops::PlanArgs& plan_args, ops::DispatchArgs& args) {
  const PlanBuffers of_plan{JAX_EP_PLAN_OPERANDS(JAX_EP_SAME_BUFFER)
                                JAX_EP_PLAN_RESULTS(JAX_EP_SAME_BUFFER)};
  Decode(check, PlanAttrsOf(attrs), of_plan, plan_args);
  if (!check.ok()) return;
  const DispatchBuffers of_rows{JAX_EP_DISPATCH_OPERANDS(JAX_EP_SAME_BUFFER)
                                    JAX_EP_DISPATCH_RESULTS(JAX_EP_SAME_BUFFER)};
  Decode(check, DispatchAttrsOf(attrs), of_rows, args);
}

// The same of latency mode, whose scales may be packed.
template <typename Buffers>
void DecodeLatencyDispatch(Checker& check, const LatencyDispatchAttrs& attrs,
                           const Buffers& buffers, ops::PlanArgs& plan_args,
                           ops::DispatchArgs& args) {
  const bool packs = attrs.packed_scales != 0;
  check.Attribute("packed_scales", attrs.packed_scales == 0 || attrs.packed_scales == 1, "0 or 1",
                  attrs.packed_scales);
  if (packs) {
    const auto dims = buffers.rows.dimensions();
    const int64_t rows = attrs.masked != 0 ? attrs.alignment : (dims.size() > 0 ? dims[0] : 0);
    args.packed_rows = static_cast<int32_t>(rows);
    check.Attribute("packed_scales", rows > 0, "0 without rows", attrs.packed_scales);
    if (!check.ok()) return;
  }
  DecodeDispatch(check, attrs, buffers, plan_args, args);
  check.Attribute("packed_scales", !packs || args.row_scales != nullptr, "0 without row_scales",
                  attrs.packed_scales);
}

}  // namespace

void Decode(Checker& check, const PlanDispatchAttrs& attrs, const PlanDispatchBuffers& buffers,
            ops::PlanArgs& plan_args, ops::DispatchArgs& args) {
  DecodeDispatch(check, attrs, buffers, plan_args, args);
}

void Decode(Checker& check, const LatencyDispatchAttrs& attrs,
            const LatencyDispatchBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args) {
  DecodeLatencyDispatch(check, attrs, buffers, plan_args, args);
}

void Decode(Checker& check, const LatencyDispatchStartAttrs& attrs,
            const LatencyDispatchStartBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args) {
  plan_args.shape = CheckPlanShape(check, PlanAttrsOf(attrs), buffers.topk_idx, attrs.capacity);
  if (!check.ok()) return;
  plan_args.buffers.topk_idx = Ints(buffers.topk_idx);
  args.geometry = ops::GeometryOf(plan_args.shape);
  CheckSent(check, DispatchAttrsOf(attrs), buffers.x, buffers.scales, buffers.weights, args);
}

void Decode(Checker& check, const LatencyDispatchAttrs& attrs,
            const LatencyDispatchDoneBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args) {
  DecodeLatencyDispatch(check, attrs, buffers, plan_args, args);
}

void Decode(Checker& check, const CombineAttrs& attrs, const LatencyCombineStartBuffers& buffers,
            ops::CombineArgs& args) {
  args.handle = CheckHandleOperands(check, attrs.group, buffers, args.geometry);
  if (check.ok()) CheckSummed(check, buffers.rows, buffers.row_weights, args);
}

void Decode(Checker& check, const CombineAttrs& attrs, const LatencyCombineDoneBuffers& buffers,
            ops::CombineArgs& args) {
  const LatencyCombineStartBuffers of_start{JAX_EP_LATENCY_COMBINE_START_OPERANDS(
      JAX_EP_SAME_BUFFER) JAX_EP_LATENCY_COMBINE_START_RESULTS(JAX_EP_SAME_BUFFER)};
  Decode(check, attrs, of_start, args);
  if (!check.ok()) return;
  check.Result("y", buffers.y, buffers.rows.element_type(),
               {args.geometry.num_tokens, args.geometry.hidden});
  args.y = buffers.y.untyped_data();
}

#undef JAX_EP_SAME_BUFFER

}  // namespace jax_ep
