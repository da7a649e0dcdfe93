// How handlers of latency mode launch their op.
#pragma once

#include <string>

#include "cuda/decode/dispatch.h"
#include "ffi/cuda/device_call.h"
#include "ffi/cuda/op_tag.h"

namespace jax_ep {

// Completes `params`, which have what the arguments of the op say, and launches the op or one of
// its calls, or says what latency mode expects instead of `rows` and `topk`. `agreed` is what ranks
// must agree on.
template <typename Params, typename Launch>
::xla::ffi::Error LaunchLatency(Checker& check, const GroupAttrs& attrs,
                                ::xla::ffi::AnyBuffer coords, int32_t device, cuda::OpKind op,
                                const ops::AgreedNumbers& agreed, const ops::Geometry& geometry,
                                cuda::Calls calls, Params params, Launch&& launch, const char* name,
                                ::xla::ffi::AnyBuffer rows, ::xla::ffi::AnyBuffer topk,
                                cudaStream_t stream) {
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs, coords, device, op, agreed, group); error.failure()) {
    return error;
  }
  params.group = group.params;
  params.inboxes = group.member->InboxesOn(attrs.channel);
  params.calls = calls;
  params.kind = OpTag(op, agreed, /*ordinal=*/0);
  params.num_blocks =
      group.NumBlocks(attrs, cuda::UsefulDecodeBlocks(geometry.num_ranks, geometry.num_tokens));
  if (const char* expected = cuda::ObstacleOf(params)) {
    check.Fail("mode='latency'", expected, Describe(rows) + " and " + Describe(topk));
    return check.error();
  }
  return ToError(launch(params, stream), name);
}

}  // namespace jax_ep
