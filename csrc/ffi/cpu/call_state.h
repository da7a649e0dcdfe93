// What XLA keeps for one custom call of a compiled program: its identity.
#pragma once

#include <cstdint>

#include "xla/ffi/api/c_api.h"

namespace jax_ep {

// Made once per call when its executable is loaded and shared by all local devices, so that ranks
// that execute the same call can find each other. XLA destroys it with the executable; everything
// else refers to it by `id`, which is never used again.
struct CallState {
  static constexpr char kTypeName[] = "jax_ep_call_state";
  static XLA_FFI_TypeId id;  // set when the type is registered with XLA
  static XLA_FFI_TypeInfo info;

  int64_t call_id;
};

// The instantiate stage of every target.
extern "C" XLA_FFI_Error* jax_ep_instantiate(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_ep
