// The way of a GPU call from its handler to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/group_params.h"
#include "cuda/row_type.h"
#include "ffi/checker.h"
#include "ffi/decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Starts the binding of a group op: context, then attributes; operands and results follow.
template <typename Attrs>
auto BindDeviceCall() {
  return ::xla::ffi::Ffi::Bind()
      .Ctx<::xla::ffi::PlatformStream<cudaStream_t>>()
      .Ctx<::xla::ffi::DeviceOrdinal>()
      .template Attrs<Attrs>();
}

// Checks the common part of a call and finds this device's member of the group. The tag is a digest
// of the op and `shape`, which all ranks must agree on.
::xla::ffi::Error PrepareGroup(Checker& check, const GroupAttrs& attrs, int32_t device,
                               cuda::OpKind op, std::initializer_list<int64_t> shape,
                               cuda::GroupParams& group);

// Checks that a scratch result has at least `bytes`.
void CheckScratch(Checker& check, ::xla::ffi::AnyBuffer scratch, int64_t bytes);

cuda::RowType RowTypeOf(cpu::DType dtype);

// Blocks of an op: what the caller asked for, or `fallback`.
int32_t NumBlocks(const GroupAttrs& attrs, int32_t fallback);

::xla::ffi::Error ToError(cudaError_t error, const char* op);

}  // namespace jax_ep
