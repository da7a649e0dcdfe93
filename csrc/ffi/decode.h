// What all platforms decode and check alike: each target's call becomes the argument struct of its
// op, which names every buffer with its shape.
#pragma once

#include <cstdint>

#include "ffi/checker.h"
#include "ffi/signatures.h"
#include "ops/combine.h"
#include "ops/combine_vjp.h"
#include "ops/dispatch.h"
#include "ops/plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// The place of one rank: operand coords, s32[2].
struct Coords {
  int32_t rank;         // within its group
  int32_t group_index;  // among the groups that lie side by side in the mesh
};

void CheckGroup(Checker& check, const GroupAttrs& attrs);
Coords CheckCoords(Checker& check, const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords);

// Check a call, but for its group and coords, which come before, and fill the arguments of its op;
// nothing in them counts if a check failed.
void Decode(Checker& check, const PlanAttrs& attrs, const PlanBuffers& buffers,
            ops::PlanArgs& args);
void Decode(Checker& check, const DispatchAttrs& attrs, const DispatchBuffers& buffers,
            ops::DispatchArgs& args);
void Decode(Checker& check, const CombineAttrs& attrs, const CombineBuffers& buffers,
            ops::CombineArgs& args);
void Decode(Checker& check, const CombineVjpAttrs& attrs, const CombineVjpBuffers& buffers,
            ops::CombineVjpArgs& args);

// A dispatch of latency mode: its plan and its rows. The handle of `args` is not made yet.
void Decode(Checker& check, const PlanDispatchAttrs& attrs, const PlanDispatchBuffers& buffers,
            ops::PlanArgs& plan_args, ops::DispatchArgs& args);
void Decode(Checker& check, const LatencyDispatchAttrs& attrs,
            const LatencyDispatchBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args);
void Decode(Checker& check, const CombineAttrs& attrs, const LatencyCombineBuffers& buffers,
            ops::CombineArgs& args);

// The two calls of such ops. Start calls have no results, so pointers to them are null.
void Decode(Checker& check, const LatencyDispatchStartAttrs& attrs,
            const LatencyDispatchStartBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args);
void Decode(Checker& check, const LatencyDispatchAttrs& attrs,
            const LatencyDispatchDoneBuffers& buffers, ops::PlanArgs& plan_args,
            ops::DispatchArgs& args);
void Decode(Checker& check, const CombineAttrs& attrs, const LatencyCombineStartBuffers& buffers,
            ops::CombineArgs& args);
void Decode(Checker& check, const CombineAttrs& attrs, const LatencyCombineDoneBuffers& buffers,
            ops::CombineArgs& args);

// The same of a group that spans hosts.
void Decode(Checker& check, const PlanAttrs& attrs, const NetworkPlanBuffers& buffers,
            ops::NetworkPlanArgs& args);
void Decode(Checker& check, const DispatchAttrs& attrs, const NetworkDispatchBuffers& buffers,
            ops::DispatchArgs& args);
void Decode(Checker& check, const CombineAttrs& attrs, const NetworkCombineBuffers& buffers,
            ops::CombineArgs& args);
void Decode(Checker& check, const CombineVjpAttrs& attrs, const NetworkCombineVjpBuffers& buffers,
            ops::CombineVjpArgs& args);

}  // namespace jax_ep
