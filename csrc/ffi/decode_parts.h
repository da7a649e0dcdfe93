// Parts of the checks in decode.cc that calls of latency mode have too (latency_decode.cc).
#pragma once

#include <cstdint>

#include "ffi/checker.h"
#include "ffi/signatures.h"
#include "ops/combine.h"
#include "ops/dispatch.h"
#include "ops/plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

inline int32_t* Ints(::xla::ffi::AnyBuffer buffer) {
  return static_cast<int32_t*>(buffer.untyped_data());
}

// Checks the operands and attributes of a plan of `capacity` rows, and gives its shape.
plan::PlanShape CheckPlanShape(Checker& check, const PlanAttrs& attrs,
                               ::xla::ffi::AnyBuffer topk_idx, int64_t capacity);

// Checks what a dispatch sends, and fills that in. args.geometry has all but hidden and dtype.
void CheckSent(Checker& check, const DispatchAttrs& attrs, ::xla::ffi::AnyBuffer x,
               ::xla::ffi::AnyBuffer scales, ::xla::ffi::AnyBuffer weights,
               ops::DispatchArgs& args);

// Checks the scales that a dispatch of such rows gives, and fills them in.
inline void CheckRowScales(Checker& check, ::xla::ffi::AnyBuffer row_scales,
                           ops::DispatchArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  if (args.packed_rows == 0) {
    check.Result("row_scales", row_scales, ::xla::ffi::F32,
                 {geometry.capacity, geometry.hidden / ops::kScaleBlock});
  } else {
    const ops::PackedScales packed = ops::PackedScalesOf(args);
    check.Result("row_scales", row_scales, ::xla::ffi::S32,
                 {geometry.capacity / packed.rows * packed.words, packed.padded_rows()});
  }
  args.row_scales = static_cast<float*>(row_scales.untyped_data());
}

// What CheckSent does, of a combine with plain or weighted sums.
void CheckSummed(Checker& check, ::xla::ffi::AnyBuffer rows, ::xla::ffi::AnyBuffer row_weights,
                 ops::CombineArgs& args);

// Checks the handle that is among the operands of an op of a group on one host.
ops::Handle CheckHandleOperands(Checker& check, const GroupAttrs& attrs,
                                const LatencyCombineStartBuffers& buffers, ops::Geometry& geometry);

}  // namespace jax_ep
