// The operands, results and attributes of each FFI target, in the order in which they are passed.
//
// They are stated here once, as lists for macros: X(name) for a buffer, X(type, name) for an
// attribute. The buffer structs of all handlers, their bindings on every platform and the lists for
// Python (signatures()) are made of these lists. Shapes are in the argument structs (dispatch.h,
// ...). Absent optional operands are arrays of shape (0,). On GPUs the targets of a group have one
// operand more, `after`, and more results: scratch memory, for some, and `token`, s32[1]. Nobody
// reads or writes these two. A call whose `after` is the token of another, or any other result of
// it, comes behind it in the order of XLA.
#pragma once

#include <vector>

// clang-format off

// Attributes that every op of a group begins with.
//   num_ranks, num_experts   of the group
//   layout                   plan::Layout
//   group_id                 for messages
//   timeout_ms               for the arrival of all ranks
//   num_sms                  that the op may occupy on a GPU; 0 for the default
//   channel                  of the workspace, on GPUs; 0 elsewhere
//   ordinal                  of the call among those of its program
#define JAX_EP_GROUP_ATTRIBUTES(X) \
  X(int32_t, num_ranks) X(int32_t, num_experts) X(int32_t, layout) X(int64_t, group_id) \
  X(int64_t, timeout_ms) X(int32_t, num_sms) X(int32_t, channel) X(int32_t, ordinal)

// A handle, as operands (ops::Handle): of a group on one host, and of one that spans hosts.
#define JAX_EP_HANDLE_OPERANDS(X) X(topk) X(dest_row) X(recv_rows) X(recv_src) X(expert_idx)
#define JAX_EP_NETWORK_HANDLE_OPERANDS(X) \
  X(topk) X(recv_start) X(recv_token) X(recv_row) X(recv_src) X(expert_idx)

// The last operand that every op of a group has is coords: s32[2], the rank within its group, and
// the number of its group among those that lie side by side in the mesh.

// masked: 1 if each expert has `alignment` rows, used or not, else 0.
#define JAX_EP_PLAN_ATTRIBUTES(X) \
  X(int32_t, alignment) X(int32_t, expert_capacity) X(int32_t, masked)
#define JAX_EP_PLAN_OPERANDS(X) X(topk_idx) X(coords)
#define JAX_EP_PLAN_NUMBERS(X) \
  X(group_sizes) X(counts) X(demand) X(num_dropped) X(num_invalid)
#define JAX_EP_PLAN_RESULTS(X) JAX_EP_HANDLE_OPERANDS(X) JAX_EP_PLAN_NUMBERS(X)
#define JAX_EP_PLAN_AFTER(X) X(after)
#define JAX_EP_PLAN_SCRATCH(X) X(scratch) X(token)

// quantization is an ops::Quantization, dense_output 0 or 1, unused_rows an ops::UnusedRows.
#define JAX_EP_DISPATCH_ATTRIBUTES(X) \
  X(int32_t, quantization) X(int32_t, dense_output) X(int32_t, unused_rows)
#define JAX_EP_DISPATCH_OPERANDS(X) \
  X(x) X(scales) X(weights) JAX_EP_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_DISPATCH_RESULTS(X) X(rows) X(row_scales) X(row_weights)
#define JAX_EP_DISPATCH_AFTER(X) X(after)
#define JAX_EP_DISPATCH_SCRATCH(X) X(scratch) X(token)

#define JAX_EP_COMBINE_ATTRIBUTES(X)
#define JAX_EP_COMBINE_OPERANDS(X) \
  X(rows) X(row_weights) X(values) JAX_EP_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_COMBINE_RESULTS(X) X(y) X(home)
#define JAX_EP_COMBINE_AFTER(X) X(after)
#define JAX_EP_COMBINE_SCRATCH(X) X(token)

#define JAX_EP_COMBINE_VJP_ATTRIBUTES(X) X(int32_t, unused_rows)
#define JAX_EP_COMBINE_VJP_OPERANDS(X) \
  X(dy) X(rows) X(row_weights) JAX_EP_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_COMBINE_VJP_RESULTS(X) X(d_rows) X(d_weights)
#define JAX_EP_COMBINE_VJP_AFTER(X) X(after)
#define JAX_EP_COMBINE_VJP_SCRATCH(X) X(token)

// The same ops of a group that spans hosts.
#define JAX_EP_NETWORK_PLAN_ATTRIBUTES(X) JAX_EP_PLAN_ATTRIBUTES(X)
#define JAX_EP_NETWORK_PLAN_OPERANDS(X) JAX_EP_PLAN_OPERANDS(X)
#define JAX_EP_NETWORK_PLAN_RESULTS(X) JAX_EP_NETWORK_HANDLE_OPERANDS(X) JAX_EP_PLAN_NUMBERS(X)
#define JAX_EP_NETWORK_PLAN_AFTER(X) X(after)
#define JAX_EP_NETWORK_PLAN_SCRATCH(X) JAX_EP_PLAN_SCRATCH(X)

#define JAX_EP_NETWORK_DISPATCH_ATTRIBUTES(X) JAX_EP_DISPATCH_ATTRIBUTES(X)
#define JAX_EP_NETWORK_DISPATCH_OPERANDS(X) \
  X(x) X(scales) X(weights) JAX_EP_NETWORK_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_NETWORK_DISPATCH_RESULTS(X) JAX_EP_DISPATCH_RESULTS(X)
#define JAX_EP_NETWORK_DISPATCH_AFTER(X) X(after)
#define JAX_EP_NETWORK_DISPATCH_SCRATCH(X) JAX_EP_DISPATCH_SCRATCH(X)

#define JAX_EP_NETWORK_COMBINE_ATTRIBUTES(X)
#define JAX_EP_NETWORK_COMBINE_OPERANDS(X) \
  X(rows) X(row_weights) X(values) JAX_EP_NETWORK_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_NETWORK_COMBINE_RESULTS(X) JAX_EP_COMBINE_RESULTS(X)
#define JAX_EP_NETWORK_COMBINE_AFTER(X) X(after)
#define JAX_EP_NETWORK_COMBINE_SCRATCH(X) X(token)

#define JAX_EP_NETWORK_COMBINE_VJP_ATTRIBUTES(X) JAX_EP_COMBINE_VJP_ATTRIBUTES(X)
#define JAX_EP_NETWORK_COMBINE_VJP_OPERANDS(X) \
  X(dy) X(rows) X(row_weights) JAX_EP_NETWORK_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_NETWORK_COMBINE_VJP_RESULTS(X) JAX_EP_COMBINE_VJP_RESULTS(X)
#define JAX_EP_NETWORK_COMBINE_VJP_AFTER(X) X(after)
#define JAX_EP_NETWORK_COMBINE_VJP_SCRATCH(X) X(token)

// On GPUs only: a dispatch with its plan. Its scratch memory is that of the plan, then that of the
// dispatch, which begins at a multiple of 128 bytes.
#define JAX_EP_PLAN_DISPATCH_ATTRIBUTES(X) \
  JAX_EP_PLAN_ATTRIBUTES(X) JAX_EP_DISPATCH_ATTRIBUTES(X)
#define JAX_EP_PLAN_DISPATCH_OPERANDS(X) X(x) X(scales) X(weights) X(topk_idx) X(coords)
#define JAX_EP_PLAN_DISPATCH_RESULTS(X) JAX_EP_DISPATCH_RESULTS(X) JAX_EP_PLAN_RESULTS(X)
#define JAX_EP_PLAN_DISPATCH_AFTER(X) X(after)
#define JAX_EP_PLAN_DISPATCH_SCRATCH(X) X(scratch) X(token)

// Latency mode, on GPUs only: the same in one launch, and a combine. packed_scales is 1 if the result
// row_scales is packed (ops::PackedScales), else 0.
#define JAX_EP_LATENCY_DISPATCH_ATTRIBUTES(X) \
  JAX_EP_PLAN_DISPATCH_ATTRIBUTES(X) X(int32_t, packed_scales)
#define JAX_EP_LATENCY_DISPATCH_OPERANDS(X) JAX_EP_PLAN_DISPATCH_OPERANDS(X)
#define JAX_EP_LATENCY_DISPATCH_RESULTS(X) JAX_EP_PLAN_DISPATCH_RESULTS(X)
#define JAX_EP_LATENCY_DISPATCH_AFTER(X) X(after)
#define JAX_EP_LATENCY_DISPATCH_SCRATCH(X) X(token)

#define JAX_EP_LATENCY_COMBINE_ATTRIBUTES(X) JAX_EP_COMBINE_ATTRIBUTES(X)
#define JAX_EP_LATENCY_COMBINE_OPERANDS(X) JAX_EP_COMBINE_OPERANDS(X)
#define JAX_EP_LATENCY_COMBINE_RESULTS(X) JAX_EP_COMBINE_RESULTS(X)
#define JAX_EP_LATENCY_COMBINE_AFTER(X) JAX_EP_COMBINE_AFTER(X)
#define JAX_EP_LATENCY_COMBINE_SCRATCH(X) JAX_EP_COMBINE_SCRATCH(X)

// The same ops in two calls. The start call gives `sent`, s32[1], which nobody writes. The done call
// has the operands of the start call, `sent`, and `work`, of any shape; it reads neither, but so it
// comes behind the start call, and behind what gives `work`. `capacity` is C, which a start call's
// buffers do not show.
#define JAX_EP_LATENCY_DISPATCH_START_ATTRIBUTES(X) \
  JAX_EP_LATENCY_DISPATCH_ATTRIBUTES(X) X(int32_t, capacity)
#define JAX_EP_LATENCY_DISPATCH_START_OPERANDS(X) JAX_EP_LATENCY_DISPATCH_OPERANDS(X)
#define JAX_EP_LATENCY_DISPATCH_START_RESULTS(X) X(sent)
#define JAX_EP_LATENCY_DISPATCH_START_AFTER(X) X(after)
#define JAX_EP_LATENCY_DISPATCH_START_SCRATCH(X) X(token)

#define JAX_EP_LATENCY_DISPATCH_DONE_ATTRIBUTES(X) JAX_EP_LATENCY_DISPATCH_ATTRIBUTES(X)
#define JAX_EP_LATENCY_DISPATCH_DONE_OPERANDS(X) \
  JAX_EP_LATENCY_DISPATCH_OPERANDS(X) X(sent) X(work)
#define JAX_EP_LATENCY_DISPATCH_DONE_RESULTS(X) JAX_EP_LATENCY_DISPATCH_RESULTS(X)
#define JAX_EP_LATENCY_DISPATCH_DONE_AFTER(X) X(after)
#define JAX_EP_LATENCY_DISPATCH_DONE_SCRATCH(X) X(token)

#define JAX_EP_LATENCY_COMBINE_START_ATTRIBUTES(X)
#define JAX_EP_LATENCY_COMBINE_START_OPERANDS(X) \
  X(rows) X(row_weights) JAX_EP_HANDLE_OPERANDS(X) X(coords)
#define JAX_EP_LATENCY_COMBINE_START_RESULTS(X) X(sent)
#define JAX_EP_LATENCY_COMBINE_START_AFTER(X) X(after)
#define JAX_EP_LATENCY_COMBINE_START_SCRATCH(X) X(token)

#define JAX_EP_LATENCY_COMBINE_DONE_ATTRIBUTES(X)
#define JAX_EP_LATENCY_COMBINE_DONE_OPERANDS(X) \
  JAX_EP_LATENCY_COMBINE_START_OPERANDS(X) X(sent) X(work)
#define JAX_EP_LATENCY_COMBINE_DONE_RESULTS(X) X(y)
#define JAX_EP_LATENCY_COMBINE_DONE_AFTER(X) X(after)
#define JAX_EP_LATENCY_COMBINE_DONE_SCRATCH(X) X(token)

// No op of a group: `same` is x in place, `time` u32[2], nanoseconds, low word first.
#define JAX_EP_CLOCK_ATTRIBUTES(X) X(int32_t, ordinal)
#define JAX_EP_CLOCK_OPERANDS(X) X(x)
#define JAX_EP_CLOCK_RESULTS(X) X(same) X(time)
#define JAX_EP_CLOCK_SCRATCH(X)
#define JAX_EP_CLOCK_AFTER(X)

// clang-format on

namespace jax_ep::ops {

// The names in the lists of a target.
struct Signature {
  const char* target;
  std::vector<const char*> attributes, operands, results, after, scratch;
};

#define JAX_EP_NO_ATTRIBUTES(X)
#define JAX_EP_ATTRIBUTE_NAME(type, name) #name,
#define JAX_EP_BUFFER_NAME(name) #name,
#define JAX_EP_SIGNATURE(target, GROUP_ATTRIBUTES, LIST)         \
  {                                                              \
    #target,                                                     \
        {GROUP_ATTRIBUTES(JAX_EP_ATTRIBUTE_NAME)                 \
             JAX_EP_##LIST##_ATTRIBUTES(JAX_EP_ATTRIBUTE_NAME)}, \
        {JAX_EP_##LIST##_OPERANDS(JAX_EP_BUFFER_NAME)},          \
        {JAX_EP_##LIST##_RESULTS(JAX_EP_BUFFER_NAME)},           \
        {JAX_EP_##LIST##_AFTER(JAX_EP_BUFFER_NAME)}, {           \
      JAX_EP_##LIST##_SCRATCH(JAX_EP_BUFFER_NAME)                \
    }                                                            \
  }
inline std::vector<Signature> Signatures() {
  return {
      JAX_EP_SIGNATURE(jax_ep_plan, JAX_EP_GROUP_ATTRIBUTES, PLAN),
      JAX_EP_SIGNATURE(jax_ep_dispatch, JAX_EP_GROUP_ATTRIBUTES, DISPATCH),
      JAX_EP_SIGNATURE(jax_ep_combine, JAX_EP_GROUP_ATTRIBUTES, COMBINE),
      JAX_EP_SIGNATURE(jax_ep_combine_vjp, JAX_EP_GROUP_ATTRIBUTES, COMBINE_VJP),
      JAX_EP_SIGNATURE(jax_ep_clock, JAX_EP_NO_ATTRIBUTES, CLOCK),
  };
}

// Those of GPUs only.
inline std::vector<Signature> GpuSignatures() {
  return {
      JAX_EP_SIGNATURE(jax_ep_plan_dispatch, JAX_EP_GROUP_ATTRIBUTES, PLAN_DISPATCH),
      JAX_EP_SIGNATURE(jax_ep_latency_dispatch, JAX_EP_GROUP_ATTRIBUTES, LATENCY_DISPATCH),
      JAX_EP_SIGNATURE(jax_ep_latency_combine, JAX_EP_GROUP_ATTRIBUTES, LATENCY_COMBINE),
      JAX_EP_SIGNATURE(jax_ep_latency_dispatch_start, JAX_EP_GROUP_ATTRIBUTES,
                       LATENCY_DISPATCH_START),
      JAX_EP_SIGNATURE(jax_ep_latency_dispatch_done, JAX_EP_GROUP_ATTRIBUTES,
                       LATENCY_DISPATCH_DONE),
      JAX_EP_SIGNATURE(jax_ep_latency_combine_start, JAX_EP_GROUP_ATTRIBUTES,
                       LATENCY_COMBINE_START),
      JAX_EP_SIGNATURE(jax_ep_latency_combine_done, JAX_EP_GROUP_ATTRIBUTES, LATENCY_COMBINE_DONE),
  };
}

// Those of groups that span hosts.
inline std::vector<Signature> NetworkSignatures() {
  return {
      JAX_EP_SIGNATURE(jax_ep_network_plan, JAX_EP_GROUP_ATTRIBUTES, NETWORK_PLAN),
      JAX_EP_SIGNATURE(jax_ep_network_dispatch, JAX_EP_GROUP_ATTRIBUTES, NETWORK_DISPATCH),
      JAX_EP_SIGNATURE(jax_ep_network_combine, JAX_EP_GROUP_ATTRIBUTES, NETWORK_COMBINE),
      JAX_EP_SIGNATURE(jax_ep_network_combine_vjp, JAX_EP_GROUP_ATTRIBUTES, NETWORK_COMBINE_VJP),
  };
}
#undef JAX_EP_SIGNATURE
#undef JAX_EP_BUFFER_NAME
#undef JAX_EP_ATTRIBUTE_NAME
#undef JAX_EP_NO_ATTRIBUTES

}  // namespace jax_ep::ops
