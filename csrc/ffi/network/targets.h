// The XLA FFI targets of the library of groups that span hosts, stated once (compare
// ffi/targets.h).
#pragma once

#include "xla/ffi/api/c_api.h"

// clang-format off
#define JAX_EP_NETWORK_FFI_TARGETS(X) \
  X(jax_ep_network_plan)              \
  X(jax_ep_network_dispatch)          \
  X(jax_ep_network_combine)           \
  X(jax_ep_network_combine_vjp)
// clang-format on

#define JAX_EP_NETWORK_TARGET_DECLARE(name) \
  extern "C" XLA_FFI_Error* name##_execute(XLA_FFI_CallFrame* call_frame);
JAX_EP_NETWORK_FFI_TARGETS(JAX_EP_NETWORK_TARGET_DECLARE)
#undef JAX_EP_NETWORK_TARGET_DECLARE

namespace jax_ep {

struct NetworkTargetInfo {
  const char* name;
  XLA_FFI_Handler* execute;
};

#define JAX_EP_NETWORK_TARGET_INFO(name) {#name, name##_execute},
inline constexpr NetworkTargetInfo kNetworkTargets[] = {
    JAX_EP_NETWORK_FFI_TARGETS(JAX_EP_NETWORK_TARGET_INFO)};
#undef JAX_EP_NETWORK_TARGET_INFO

}  // namespace jax_ep
