// The attributes and buffers of each target as structs, and how a handler is bound to them: made
// from the lists of ops/signatures.h.
#pragma once

#include <cstdint>

#include "ops/signatures.h"
#include "xla/ffi/api/ffi.h"

#define JAX_EP_ATTRIBUTE_FIELD(type, name) type name;
#define JAX_EP_BUFFER_FIELD(name) ::xla::ffi::AnyBuffer name;

namespace jax_ep {

// Attributes of every op of a group.
struct GroupAttrs {
  JAX_EP_GROUP_ATTRIBUTES(JAX_EP_ATTRIBUTE_FIELD)
};

// Its braces may be left out when a struct that begins with it is initialised from the flat list.
#define JAX_EP_DEFINE_GROUP_ATTRS(Prefix, LIST)        \
  struct Prefix##Attrs {                               \
    GroupAttrs group;                                  \
    JAX_EP_##LIST##_ATTRIBUTES(JAX_EP_ATTRIBUTE_FIELD) \
  };
JAX_EP_DEFINE_GROUP_ATTRS(Plan, PLAN)
JAX_EP_DEFINE_GROUP_ATTRS(Dispatch, DISPATCH)
JAX_EP_DEFINE_GROUP_ATTRS(Combine, COMBINE)
JAX_EP_DEFINE_GROUP_ATTRS(CombineVjp, COMBINE_VJP)
JAX_EP_DEFINE_GROUP_ATTRS(PlanDispatch, PLAN_DISPATCH)
JAX_EP_DEFINE_GROUP_ATTRS(LatencyDispatch, LATENCY_DISPATCH)
JAX_EP_DEFINE_GROUP_ATTRS(LatencyDispatchStart, LATENCY_DISPATCH_START)
#undef JAX_EP_DEFINE_GROUP_ATTRS

using LatencyDispatchDoneAttrs = LatencyDispatchAttrs;
using LatencyCombineAttrs = CombineAttrs;
using LatencyCombineStartAttrs = CombineAttrs;
using LatencyCombineDoneAttrs = CombineAttrs;
using NetworkPlanAttrs = PlanAttrs;
using NetworkDispatchAttrs = DispatchAttrs;
using NetworkCombineAttrs = CombineAttrs;
using NetworkCombineVjpAttrs = CombineVjpAttrs;

struct ClockAttrs {
  JAX_EP_CLOCK_ATTRIBUTES(JAX_EP_ATTRIBUTE_FIELD)
};

// Operands and results, as all platforms have them; and on GPUs, with those that only they have.
#define JAX_EP_DEFINE_BUFFERS(Prefix, LIST)                                                    \
  struct Prefix##Buffers {                                                                     \
    JAX_EP_##LIST##_OPERANDS(JAX_EP_BUFFER_FIELD) JAX_EP_##LIST##_RESULTS(JAX_EP_BUFFER_FIELD) \
  };                                                                                           \
  struct Device##Prefix##Buffers : Prefix##Buffers {                                           \
    JAX_EP_##LIST##_AFTER(JAX_EP_BUFFER_FIELD) JAX_EP_##LIST##_SCRATCH(JAX_EP_BUFFER_FIELD)    \
  };
JAX_EP_DEFINE_BUFFERS(Plan, PLAN)
JAX_EP_DEFINE_BUFFERS(Dispatch, DISPATCH)
JAX_EP_DEFINE_BUFFERS(Combine, COMBINE)
JAX_EP_DEFINE_BUFFERS(CombineVjp, COMBINE_VJP)
JAX_EP_DEFINE_BUFFERS(Clock, CLOCK)
JAX_EP_DEFINE_BUFFERS(PlanDispatch, PLAN_DISPATCH)
JAX_EP_DEFINE_BUFFERS(LatencyDispatch, LATENCY_DISPATCH)
JAX_EP_DEFINE_BUFFERS(LatencyCombine, LATENCY_COMBINE)
JAX_EP_DEFINE_BUFFERS(LatencyDispatchStart, LATENCY_DISPATCH_START)
JAX_EP_DEFINE_BUFFERS(LatencyDispatchDone, LATENCY_DISPATCH_DONE)
JAX_EP_DEFINE_BUFFERS(LatencyCombineStart, LATENCY_COMBINE_START)
JAX_EP_DEFINE_BUFFERS(LatencyCombineDone, LATENCY_COMBINE_DONE)
JAX_EP_DEFINE_BUFFERS(NetworkPlan, NETWORK_PLAN)
JAX_EP_DEFINE_BUFFERS(NetworkDispatch, NETWORK_DISPATCH)
JAX_EP_DEFINE_BUFFERS(NetworkCombine, NETWORK_COMBINE)
JAX_EP_DEFINE_BUFFERS(NetworkCombineVjp, NETWORK_COMBINE_VJP)
#undef JAX_EP_DEFINE_BUFFERS

// Continues a binding with the operands and results of a list, and with those that only GPUs have.
#define JAX_EP_BIND_OPERAND(name) .Arg<::xla::ffi::AnyBuffer>()
#define JAX_EP_BIND_RESULT(name) .Ret<::xla::ffi::AnyBuffer>()
#define JAX_EP_BIND_BUFFERS(LIST) \
  JAX_EP_##LIST##_OPERANDS(JAX_EP_BIND_OPERAND) JAX_EP_##LIST##_RESULTS(JAX_EP_BIND_RESULT)
#define JAX_EP_BIND_DEVICE_BUFFERS(LIST) \
  JAX_EP_##LIST##_AFTER(JAX_EP_BIND_OPERAND) JAX_EP_##LIST##_SCRATCH(JAX_EP_BIND_RESULT)

// A buffer as XLA hands it over, in either of two ways.
inline ::xla::ffi::AnyBuffer BufferOf(::xla::ffi::AnyBuffer operand) { return operand; }
inline ::xla::ffi::AnyBuffer BufferOf(::xla::ffi::Result<::xla::ffi::AnyBuffer> result) {
  return *result;
}

}  // namespace jax_ep

#define JAX_EP_ATTRIBUTE_MEMBER(type, name) , ::xla::ffi::StructMember<type>(#name)
#define JAX_EP_REGISTER_ATTRS(...) XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(__VA_ARGS__)
#define JAX_EP_REGISTER_GROUP_ATTRS(Prefix, LIST)                                                \
  JAX_EP_REGISTER_ATTRS(::jax_ep::Prefix##Attrs JAX_EP_GROUP_ATTRIBUTES(JAX_EP_ATTRIBUTE_MEMBER) \
                            JAX_EP_##LIST##_ATTRIBUTES(JAX_EP_ATTRIBUTE_MEMBER))
JAX_EP_REGISTER_GROUP_ATTRS(Plan, PLAN);
JAX_EP_REGISTER_GROUP_ATTRS(Dispatch, DISPATCH);
JAX_EP_REGISTER_GROUP_ATTRS(Combine, COMBINE);
JAX_EP_REGISTER_GROUP_ATTRS(CombineVjp, COMBINE_VJP);
JAX_EP_REGISTER_GROUP_ATTRS(PlanDispatch, PLAN_DISPATCH);
JAX_EP_REGISTER_GROUP_ATTRS(LatencyDispatch, LATENCY_DISPATCH);
JAX_EP_REGISTER_GROUP_ATTRS(LatencyDispatchStart, LATENCY_DISPATCH_START);
JAX_EP_REGISTER_ATTRS(::jax_ep::ClockAttrs JAX_EP_CLOCK_ATTRIBUTES(JAX_EP_ATTRIBUTE_MEMBER));
#undef JAX_EP_REGISTER_GROUP_ATTRS
#undef JAX_EP_REGISTER_ATTRS
