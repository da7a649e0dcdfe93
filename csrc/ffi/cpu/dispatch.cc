// Handler of target jax_ep_dispatch.

#include "cpu/dispatch.h"

#include "ffi/cpu/group_call.h"
#include "ffi/decode.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Future Dispatch(const CallContext& context, const DispatchAttrs& attrs,
                     const DispatchBuffers& buffers) {
  return JoinGroup<ops::DispatchArgs, cpu::DispatchWork>(Target::kDispatch, context, attrs,
                                                         buffers);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_execute, WithBuffers(Dispatch),
                              BindGroupCall<DispatchAttrs>() JAX_EP_BIND_BUFFERS(DISPATCH));

}  // namespace jax_ep
