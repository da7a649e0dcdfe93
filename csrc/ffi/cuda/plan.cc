// Handler of target jax_ep_plan on GPUs.

#include "cuda/plan/plan.h"

#include <string>

#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

cuda::PlanParams ShapeOf(const plan::PlanShape& shape) {
  cuda::PlanParams params{};
  params.layout = shape.layout;
  params.num_tokens = shape.num_tokens;
  params.top_k = shape.top_k;
  params.num_experts = shape.num_experts;
  params.capacity = shape.capacity;
  params.alignment = shape.alignment;
  params.expert_capacity = shape.expert_capacity;
  return params;
}

ffi::Error Plan(cudaStream_t stream, int32_t device, PlanAttrs attrs, ffi::AnyBuffer topk_idx,
                ffi::AnyBuffer coords, Out topk, Out dest_row, Out recv_rows, Out recv_src,
                Out expert_idx, Out group_sizes, Out counts, Out demand, Out num_dropped,
                Out num_invalid, Out scratch) {
  Checker check("plan");
  cpu::PlanArgs args;
  DecodePlan(check, attrs,
             {topk_idx, *topk, *dest_row, *recv_rows, *recv_src, *expert_idx, *group_sizes, *counts,
              *demand, *num_dropped, *num_invalid},
             args);
  const plan::PlanShape& shape = args.shape;
  DeviceGroup group;
  if (auto error = PrepareGroup(check, attrs.group, coords, device, cuda::OpKind::kPlan,
                                {shape.num_tokens, shape.top_k, shape.num_experts, shape.capacity,
                                 shape.alignment, static_cast<int64_t>(shape.layout)},
                                group);
      error.failure()) {
    return error;
  }
  cuda::PlanParams params = ShapeOf(shape);
  params.group = group.params;
  params.max_blocks = group.member->max_blocks;
  const cuda::PlanKernel kernel = cuda::ChoosePlanKernel(params);
  if (kernel == cuda::PlanKernel::kNone) {
    check.Fail("attributes num_experts and num_ranks", "a plan that fits the GPU's shared memory",
               std::to_string(shape.num_experts) + " and " + std::to_string(shape.num_ranks));
  }
  CheckScratch(check, *scratch, cuda::PlanScratchSize(params) * sizeof(int32_t));
  if (!check.ok()) return ToError(check.status());
  SharedOperands shared(group, stream);
  const plan::RankPlan& buffers = args.buffers;
  params.topk_idx = buffers.topk_idx;
  params.topk = buffers.topk;
  params.dest_row = buffers.dest_row;
  params.recv_rows = buffers.recv_rows;
  params.recv_src = buffers.recv_src;
  params.expert_idx = buffers.expert_idx;
  params.group_sizes = buffers.group_sizes;
  params.counts = buffers.counts;
  params.demand = buffers.demand;
  params.num_dropped = buffers.num_dropped;
  params.num_invalid = buffers.num_invalid;
  if (kernel == cuda::PlanKernel::kPull) {
    params.shared_topk = shared.Scratch("topk", buffers.topk,
                                        int64_t{shape.num_tokens} * shape.top_k * sizeof(int32_t));
    params.scratch = shared.Scratch("scratch", static_cast<int32_t*>(scratch->untyped_data()),
                                    scratch->size_bytes());
  }
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchPlan(params, kernel, stream), "plan");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_execute, Plan,
                              BindDeviceCall<PlanAttrs>()
                                  .Arg<ffi::AnyBuffer>()   // topk_idx
                                  .Arg<ffi::AnyBuffer>()   // coords
                                  .Ret<ffi::AnyBuffer>()   // topk
                                  .Ret<ffi::AnyBuffer>()   // dest_row
                                  .Ret<ffi::AnyBuffer>()   // recv_rows
                                  .Ret<ffi::AnyBuffer>()   // recv_src
                                  .Ret<ffi::AnyBuffer>()   // expert_idx
                                  .Ret<ffi::AnyBuffer>()   // group_sizes
                                  .Ret<ffi::AnyBuffer>()   // counts
                                  .Ret<ffi::AnyBuffer>()   // demand
                                  .Ret<ffi::AnyBuffer>()   // num_dropped
                                  .Ret<ffi::AnyBuffer>()   // num_invalid
                                  .Ret<ffi::AnyBuffer>(),  // scratch
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
