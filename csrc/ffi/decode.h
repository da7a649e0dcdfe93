// What all platforms decode and check alike: attributes and buffers of the targets.
//
// Each target's call becomes the argument struct of its op, which names every buffer with its
// shape.
#pragma once

#include <cstdint>

#include "cpu/combine.h"
#include "cpu/combine_vjp.h"
#include "cpu/dispatch.h"
#include "cpu/geometry.h"
#include "cpu/plan.h"
#include "ffi/checker.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Attributes of every target.
struct GroupAttrs {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t layout;      // plan::Layout
  int64_t group_id;    // for messages
  int64_t timeout_ms;  // for the arrival of all ranks
  int32_t num_sms;     // that the op may occupy on a GPU; 0 for the default
  int32_t ordinal;     // of the call among those of its program
};

// The members of GroupAttrs, for XLA_FFI_REGISTER_STRUCT_ATTR_DECODING of a struct that begins with
// a GroupAttrs: its braces may be left out when the struct is initialised from the flat list.
#define JAX_EP_GROUP_ATTRS                                                                        \
  ::xla::ffi::StructMember<int32_t>("num_ranks"),                                                 \
      ::xla::ffi::StructMember<int32_t>("num_experts"),                                           \
      ::xla::ffi::StructMember<int32_t>("layout"), ::xla::ffi::StructMember<int64_t>("group_id"), \
      ::xla::ffi::StructMember<int64_t>("timeout_ms"),                                            \
      ::xla::ffi::StructMember<int32_t>("num_sms"), ::xla::ffi::StructMember<int32_t>("ordinal")

struct PlanAttrs {
  GroupAttrs group;
  int32_t alignment;
  int32_t expert_capacity;
};

struct DispatchAttrs {
  GroupAttrs group;
  int32_t quantization;  // cpu::Quantization
  int32_t dense_output;  // 0 or 1
};

struct CombineAttrs {
  GroupAttrs group;
};

struct CombineVjpAttrs {
  GroupAttrs group;
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::PlanAttrs, JAX_EP_GROUP_ATTRS,
                                      ::xla::ffi::StructMember<int32_t>("alignment"),
                                      ::xla::ffi::StructMember<int32_t>("expert_capacity"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::DispatchAttrs, JAX_EP_GROUP_ATTRS,
                                      ::xla::ffi::StructMember<int32_t>("quantization"),
                                      ::xla::ffi::StructMember<int32_t>("dense_output"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::CombineAttrs, JAX_EP_GROUP_ATTRS);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_ep::CombineVjpAttrs, JAX_EP_GROUP_ATTRS);

namespace jax_ep {

// The place of one rank: operand coords, s32[2].
struct Coords {
  int32_t rank;         // within its group
  int32_t group_index;  // among the groups that lie side by side in the mesh
};

void CheckGroup(Checker& check, const GroupAttrs& attrs);
Coords CheckCoords(Checker& check, const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords);

// Checks what int32 indices need: T, K >= 1, and R * T * K and R * C below 2^31.
void CheckExtents(Checker& check, const GroupAttrs& attrs, int64_t num_tokens, int64_t top_k,
                  int64_t capacity);

// Operands that carry a handle, in the order in which they are bound.
struct HandleBuffers {
  ::xla::ffi::AnyBuffer topk, dest_row, recv_rows, recv_src, expert_idx;
};

// Fills `geometry` (all but hidden and dtype) from the attributes and the handle's shapes.
cpu::Handle CheckHandle(Checker& check, const GroupAttrs& attrs, const HandleBuffers& buffers,
                        cpu::Geometry& geometry);

// Checks that `x` is [num_rows, H] of a dtype that rows may have; sets geometry.hidden and
// geometry.dtype.
void CheckRows(Checker& check, const char* name, ::xla::ffi::AnyBuffer x, int64_t num_rows,
               cpu::Geometry& geometry);

// The same for rows to compute with: bf16, f16 or f32.
void CheckSummableRows(Checker& check, const char* name, ::xla::ffi::AnyBuffer x, int64_t num_rows,
                       cpu::Geometry& geometry);

// Checks float32 values that belong to rows: [C] in layout "expert", [C, K] in layout "token".
// `what` is "argument name" or "result name".
void CheckRowValues(Checker& check, const char* what, ::xla::ffi::AnyBuffer values,
                    const cpu::Geometry& geometry);

// The plan op's operands, but for its routes and coords, and its results.
struct PlanBuffers {
  ::xla::ffi::AnyBuffer topk_idx;
  ::xla::ffi::AnyBuffer topk, dest_row, recv_rows, recv_src, expert_idx, group_sizes, counts,
      demand, num_dropped, num_invalid;
};

// The dispatch op's operands, but for its routes and coords, and its results.
struct DispatchBuffers {
  ::xla::ffi::AnyBuffer x, scales, weights;
  ::xla::ffi::AnyBuffer rows, row_scales, row_weights;
};

// The combine op's operands, but for its routes and coords, and its results.
struct CombineBuffers {
  ::xla::ffi::AnyBuffer rows, row_weights, values;
  ::xla::ffi::AnyBuffer y, home;
};

// The combine_vjp op's operands, but for its routes and coords, and its results.
struct CombineVjpBuffers {
  ::xla::ffi::AnyBuffer dy, rows, row_weights;
  ::xla::ffi::AnyBuffer d_rows, d_weights;
};

// Check a call and fill the arguments of its op; nothing else in them counts if a check failed.
void DecodePlan(Checker& check, const PlanAttrs& attrs, const PlanBuffers& buffers,
                cpu::PlanArgs& args);
void DecodeDispatch(Checker& check, const DispatchAttrs& attrs, const HandleBuffers& routes,
                    const DispatchBuffers& buffers, cpu::DispatchArgs& args);
void DecodeCombine(Checker& check, const CombineAttrs& attrs, const HandleBuffers& routes,
                   const CombineBuffers& buffers, cpu::CombineArgs& args);
void DecodeCombineVjp(Checker& check, const CombineVjpAttrs& attrs, const HandleBuffers& routes,
                      const CombineVjpBuffers& buffers, cpu::CombineVjpArgs& args);

}  // namespace jax_ep
