#include "ffi/cuda/async_targets.h"

namespace jax_ep {

bool IsCapturable(XLA_FFI_Handler* handler) {
  // A handler that is called with this extension fills in what it is, and does nothing else.
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension{};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame call_frame{};
  call_frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  call_frame.extension_start = &extension.extension_base;
  if (handler(&call_frame) != nullptr) return false;
  return (metadata.traits & XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE) != 0;
}

}  // namespace jax_ep
