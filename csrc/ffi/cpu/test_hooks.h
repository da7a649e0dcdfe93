// What tests can see and disturb: counts of executed calls, and random delays before the ranks
// meet.
#pragma once

#include <array>
#include <cstdint>

#include "ffi/targets.h"

namespace jax_ep {

// Called by every handler when it starts: counts the call and sleeps if a delay is set.
void OnCall(Target target);

// Executions (one per rank and call) of each target since the last reset.
std::array<int64_t, kNumTargets> CallCounts();
void ResetCallCounts();

// Every handler sleeps a random time in [0, max_us] microseconds before it joins its group; 0 turns
// the delays off.
void SetTestDelay(int64_t max_us);

}  // namespace jax_ep
