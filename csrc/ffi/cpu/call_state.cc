#include "ffi/cpu/call_state.h"

#include <atomic>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

XLA_FFI_TypeId CallState::id = {};
XLA_FFI_TypeInfo CallState::info = ffi::MakeTypeInfo<CallState>();

namespace {

ffi::ErrorOr<std::unique_ptr<CallState>> Instantiate() {
  static std::atomic<int64_t> next_call_id{0};
  return std::make_unique<CallState>(CallState{next_call_id++});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_instantiate, Instantiate, ffi::Ffi::BindInstantiate());

}  // namespace jax_ep
