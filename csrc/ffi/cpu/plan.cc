// Handler of target jax_ep_plan.

#include "cpu/plan.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Future Plan(const CallContext& context, const PlanAttrs& attrs, const PlanBuffers& buffers) {
  return JoinGroup<ops::PlanArgs, cpu::PlanWork>(Target::kPlan, context, attrs, buffers);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_execute, WithBuffers(Plan),
                              BindGroupCall<PlanAttrs>() JAX_EP_BIND_BUFFERS(PLAN));

}  // namespace jax_ep
