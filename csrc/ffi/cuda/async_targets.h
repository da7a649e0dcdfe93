// The XLA FFI targets of ops that run beside others, stated once (compare ffi/targets.h).
//
// They do what the targets without "_async" do, but XLA does not capture them in command buffers
// (CUDA graphs). XLA makes a chain of what a graph captures, so an op in a graph would run beside
// nothing; and it captures an asynchronous region only if all that runs beside it can be captured.
#pragma once

#include "ffi/targets.h"
#include "xla/ffi/api/c_api.h"

// clang-format off
#define JAX_EP_ASYNC_FFI_TARGETS(X)                            \
  X(jax_ep_dispatch_async,    "dispatch",    Dispatch)         \
  X(jax_ep_combine_async,     "combine",     Combine)          \
  X(jax_ep_combine_vjp_async, "combine_vjp", CombineVjp)
// clang-format on

namespace jax_ep {

JAX_EP_ASYNC_FFI_TARGETS(JAX_EP_TARGET_DECLARE)

inline constexpr TargetInfo kAsyncTargets[] = {JAX_EP_ASYNC_FFI_TARGETS(JAX_EP_TARGET_INFO)};

// Whether XLA may capture calls of a handler in command buffers, as the handler itself says.
bool IsCapturable(XLA_FFI_Handler* handler);

}  // namespace jax_ep
