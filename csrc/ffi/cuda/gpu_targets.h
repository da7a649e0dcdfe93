// The XLA FFI targets that only GPUs have, stated once (compare ffi/targets.h): a dispatch with its
// plan, and latency mode.
#pragma once

#include "xla/ffi/api/c_api.h"

// clang-format off
#define JAX_EP_GPU_FFI_TARGETS(X)     \
  X(jax_ep_plan_dispatch)             \
  X(jax_ep_latency_dispatch)          \
  X(jax_ep_latency_dispatch_start)    \
  X(jax_ep_latency_dispatch_done)     \
  X(jax_ep_latency_combine)           \
  X(jax_ep_latency_combine_start)     \
  X(jax_ep_latency_combine_done)
// clang-format on

#define JAX_EP_GPU_TARGET_DECLARE(name) \
  extern "C" XLA_FFI_Error* name##_execute(XLA_FFI_CallFrame* call_frame);
JAX_EP_GPU_FFI_TARGETS(JAX_EP_GPU_TARGET_DECLARE)
#undef JAX_EP_GPU_TARGET_DECLARE

namespace jax_ep {

struct GpuTargetInfo {
  const char* name;
  XLA_FFI_Handler* execute;
};

#define JAX_EP_GPU_TARGET_INFO(name) {#name, name##_execute},
inline constexpr GpuTargetInfo kGpuTargets[] = {JAX_EP_GPU_FFI_TARGETS(JAX_EP_GPU_TARGET_INFO)};
#undef JAX_EP_GPU_TARGET_INFO

}  // namespace jax_ep
