// The way of a GPU call from its handler to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/core/group_params.h"
#include "ffi/checker.h"
#include "ffi/decode.h"
#include "transport/member.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// What XLA calls with what was bound: has `call` get the buffers as a struct.
template <typename Attrs, typename Buffers>
auto WithBuffers(::xla::ffi::Error (*call)(cudaStream_t stream, int32_t device, const Attrs&,
                                           const Buffers&)) {
  return [call](cudaStream_t stream, int32_t device, Attrs attrs, auto... buffers) {
    return call(stream, device, attrs, Buffers{BufferOf(buffers)...});
  };
}

#define JAX_EP_BIND_DEVICE_CALL(Call, LIST)            \
  ::xla::ffi::Ffi::Bind()                              \
      .Ctx<::xla::ffi::PlatformStream<cudaStream_t>>() \
      .Ctx<::xla::ffi::DeviceOrdinal>()                \
      .Attrs<Call##Attrs>() JAX_EP_BIND_BUFFERS(LIST) JAX_EP_BIND_DEVICE_BUFFERS(LIST)

// Defines handler `symbol` of function `Call`, which takes CallAttrs and DeviceCallBuffers, as made
// from the lists of `LIST`.
#define JAX_EP_DEFINE_DEVICE_CALL(symbol, Call, LIST)                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, WithBuffers(Call), JAX_EP_BIND_DEVICE_CALL(Call, LIST), \
                                {::xla::ffi::Traits::kCmdBufferCompatible})

// The same for a target of ffi/cuda/async_targets.h.
#define JAX_EP_DEFINE_ASYNC_CALL(symbol, Call, LIST) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, WithBuffers(Call), JAX_EP_BIND_DEVICE_CALL(Call, LIST))

// What a call needs to know of its group.
struct DeviceGroup {
  cuda::GroupParams params;
  const transport::Member* member = nullptr;

  // Blocks of an op: what the caller asked for, or `fallback`, as far as the GPU has room for the
  // blocks of all its ranks at once.
  int32_t NumBlocks(const GroupAttrs& attrs, int32_t fallback) const;
};

// Checks what calls have in common: the group and coords, whose values are on the device.
void CheckDeviceGroup(Checker& check, const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords);

// Finds this device's member of the group of a call that has been checked; the kernel compares its
// place with `coords`, that of the device in the program's mesh. The tag is that of the op, of the
// numbers that all ranks must agree on, and of the call's ordinal.
::xla::ffi::Error PrepareGroup(const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords,
                               int32_t device, cuda::OpKind op, const ops::AgreedNumbers& agreed,
                               DeviceGroup& group);

// Checks a call and fills the arguments of its op.
template <typename Attrs, typename Buffers, typename Args>
void CheckCall(Checker& check, const Attrs& attrs, const Buffers& buffers, Args& args) {
  CheckDeviceGroup(check, attrs.group, buffers.coords);
  if (check.ok()) Decode(check, attrs, buffers, args);
}

// Where peers find the operands and scratch memory of a call: in place, or, in a group whose
// members cannot read each other's XLA buffers, in staging memory.
class SharedOperands {
 public:
  SharedOperands(const DeviceGroup& group, cudaStream_t stream)
      : member_(*group.member), stream_(stream) {}

  // An operand, copied on the stream if need be. Null stays null.
  template <typename T>
  const T* Input(const char* name, const T* pointer, int64_t bytes) {
    return static_cast<const T*>(Place(name, pointer, bytes, /*copy=*/true));
  }

  // Memory that the op itself writes.
  template <typename T>
  T* Scratch(const char* name, T* pointer, int64_t bytes) {
    return static_cast<T*>(const_cast<void*>(Place(name, pointer, bytes, /*copy=*/false)));
  }

  // The first operand that found no place.
  ::xla::ffi::Error error() const;

 private:
  const void* Place(const char* name, const void* pointer, int64_t bytes, bool copy);

  const transport::Member& member_;
  cudaStream_t stream_;
  uint64_t used_ = 0;
  std::string failure_;
};

// Checks that a scratch result has at least `bytes`.
void CheckScratch(Checker& check, ::xla::ffi::AnyBuffer scratch, int64_t bytes);

::xla::ffi::Error ToError(cudaError_t error, const char* op);

}  // namespace jax_ep
