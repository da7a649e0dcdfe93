// How handlers of latency mode launch their op.
#pragma once

#include <string>

#include "cuda/decode/dispatch.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

// Completes `params`, which have what the arguments of the op say, and launches the op, or says
// what latency mode expects instead of `rows` and `topk`.
template <typename Params, typename Launch>
::xla::ffi::Error LaunchLatency(Checker& check, const DeviceGroup& group, const GroupAttrs& attrs,
                                const ops::Geometry& geometry, Params params, Launch&& launch,
                                const char* op, ::xla::ffi::AnyBuffer rows,
                                ::xla::ffi::AnyBuffer topk, cudaStream_t stream) {
  params.group = group.params;
  params.inboxes = group.member->inboxes;
  params.num_blocks =
      group.NumBlocks(attrs, cuda::UsefulDecodeBlocks(geometry.num_ranks, geometry.num_tokens));
  if (const char* expected = cuda::ObstacleOf(params)) {
    check.Fail("mode='latency'", expected, Describe(rows) + " and " + Describe(topk));
    return check.error();
  }
  return ToError(launch(params, stream), op);
}

}  // namespace jax_ep
