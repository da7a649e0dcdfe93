// The way of a call of a group that spans hosts from its handler to a launch.
#pragma once

#include "cuda/network/params.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

// What such a call needs to know of its group.
struct NetworkGroup {
  DeviceGroup node;
  cuda::NetworkParams params;
  int64_t message_bytes = 0;  // of a plan's choices for one host
};

// PrepareGroup for it.
::xla::ffi::Error PrepareNetworkGroup(const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords,
                                      int32_t device, cuda::OpKind op,
                                      const ops::AgreedNumbers& agreed, NetworkGroup& group);

}  // namespace jax_ep
