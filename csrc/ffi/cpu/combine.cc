// Handler of target jax_ep_combine.

#include "cpu/combine.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Future Combine(const CallContext& context, const CombineAttrs& attrs,
                    const CombineBuffers& buffers) {
  return JoinGroup<ops::CombineArgs, cpu::CombineWork>(Target::kCombine, context, attrs, buffers);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_execute, WithBuffers(Combine),
                              BindGroupCall<CombineAttrs>() JAX_EP_BIND_BUFFERS(COMBINE));

}  // namespace jax_ep
