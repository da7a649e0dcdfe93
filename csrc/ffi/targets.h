// The XLA FFI targets of a platform library, stated once: name for XLA, name of the op, and the
// function prefix of its handler. Handlers, call counts, bindings and the test that compares the
// builds are all made from this list.
#pragma once

#include "xla/ffi/api/c_api.h"

// clang-format off
#define JAX_EP_FFI_TARGETS(X)                      \
  X(jax_ep_plan,        "plan",        Plan)       \
  X(jax_ep_dispatch,    "dispatch",    Dispatch)   \
  X(jax_ep_combine,     "combine",     Combine)    \
  X(jax_ep_combine_vjp, "combine_vjp", CombineVjp) \
  X(jax_ep_clock,       "clock",       Clock)
// clang-format on

namespace jax_ep {

enum class Target {
#define JAX_EP_TARGET_ENUM(name, op, Prefix) k##Prefix,
  JAX_EP_FFI_TARGETS(JAX_EP_TARGET_ENUM)
#undef JAX_EP_TARGET_ENUM
};

struct TargetInfo {
  const char* name;  // for XLA
  const char* op;    // for messages
  XLA_FFI_Handler* execute;
};

#define JAX_EP_TARGET_DECLARE(name, op, Prefix) \
  extern "C" XLA_FFI_Error* name##_execute(XLA_FFI_CallFrame* call_frame);
JAX_EP_FFI_TARGETS(JAX_EP_TARGET_DECLARE)

#define JAX_EP_TARGET_INFO(name, op, Prefix) {#name, op, name##_execute},
inline constexpr TargetInfo kTargets[] = {JAX_EP_FFI_TARGETS(JAX_EP_TARGET_INFO)};

inline constexpr int kNumTargets = sizeof(kTargets) / sizeof(kTargets[0]);

}  // namespace jax_ep
