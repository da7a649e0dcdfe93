// Handler of target jax_ep_plan.

#include "cpu/plan.h"

#include "ffi/group_call.h"
#include "plan/routing.h"

namespace jax_ep {

struct PlanAttrs {
  GroupAttrs group;
  int32_t alignment;
  int32_t expert_capacity;
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::PlanAttrs, JAX_EP_GROUP_ATTRS,
                                      ::xla::ffi::StructMember<int32_t>("alignment"),
                                      ::xla::ffi::StructMember<int32_t>("expert_capacity"));

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

int32_t* Ints(Out& buffer) { return static_cast<int32_t*>(buffer->untyped_data()); }

ffi::Future Plan(CallState* state, ffi::RunId run_id, ffi::ThreadPool pool, PlanAttrs attrs,
                 ffi::AnyBuffer topk_idx, ffi::AnyBuffer coords, Out topk, Out dest_row,
                 Out recv_rows, Out recv_src, Out expert_idx, Out group_sizes, Out counts,
                 Out demand, Out num_dropped, Out num_invalid) {
  const auto decode = [&](Checker& check, cpu::PlanArgs& args) {
    const auto [num_tokens, top_k] = check.MatrixArgument("topk_idx", topk_idx);
    const int64_t capacity = static_cast<int64_t>(recv_src->element_count());
    CheckExtents(check, attrs.group, num_tokens, top_k, capacity);
    const bool by_token = attrs.group.layout == static_cast<int32_t>(plan::Layout::kToken);
    check.Attribute("expert_capacity", attrs.expert_capacity >= 0, "a number of rows",
                    attrs.expert_capacity);
    check.Attribute("alignment", attrs.alignment > 0, "a positive number", attrs.alignment);
    if (!check.ok()) return;
    check.Attribute("alignment", by_token || capacity % attrs.alignment == 0,
                    "a divisor of the capacity", attrs.alignment);

    plan::PlanShape& shape = args.shape;
    shape = {attrs.group.num_ranks,          static_cast<int32_t>(num_tokens),
             static_cast<int32_t>(top_k),    attrs.group.num_experts,
             static_cast<int32_t>(capacity), attrs.alignment,
             attrs.expert_capacity,          static_cast<plan::Layout>(attrs.group.layout)};
    const int64_t num_local_experts = shape.num_local_experts();
    check.Argument("topk_idx", topk_idx, ffi::S32, {num_tokens, top_k});
    check.Result("topk", *topk, ffi::S32, {num_tokens, top_k});
    check.Result("dest_row", *dest_row, ffi::S32, {num_tokens, top_k});
    check.Result("recv_rows", *recv_rows, ffi::S32,
                 {shape.num_ranks * num_tokens, shape.rows_per_source()});
    check.Result("recv_src", *recv_src, ffi::S32, {capacity});
    check.Result("expert_idx", *expert_idx, ffi::S32, {by_token ? capacity : 0, top_k});
    check.Result("group_sizes", *group_sizes, ffi::S32, {num_local_experts});
    check.Result("counts", *counts, ffi::S32, {num_local_experts});
    check.Result("demand", *demand, ffi::S32, {num_local_experts});
    check.Result("num_dropped", *num_dropped, ffi::S32, {1});
    check.Result("num_invalid", *num_invalid, ffi::S32, {1});
    args.buffers = {static_cast<const int32_t*>(topk_idx.untyped_data()),
                    Ints(topk),
                    Ints(dest_row),
                    Ints(recv_rows),
                    Ints(recv_src),
                    Ints(expert_idx),
                    Ints(group_sizes),
                    Ints(counts),
                    Ints(demand),
                    Ints(num_dropped),
                    Ints(num_invalid)};
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
