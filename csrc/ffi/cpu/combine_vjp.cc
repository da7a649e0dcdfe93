// Handler of target jax_ep_combine_vjp.

#include "cpu/combine_vjp.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Future CombineVjp(const CallContext& context, const CombineVjpAttrs& attrs,
                       const CombineVjpBuffers& buffers) {
  return JoinGroup<ops::CombineVjpArgs, cpu::CombineVjpWork>(Target::kCombineVjp, context, attrs,
                                                             buffers);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_vjp_execute, WithBuffers(CombineVjp),
                              BindGroupCall<CombineVjpAttrs>() JAX_EP_BIND_BUFFERS(COMBINE_VJP));

}  // namespace jax_ep
