// Where the ranks of a group meet to run an op, all in one process.
//
// No rank waits. Each leaves its arguments and a callback, and the rank that arrives last runs the
// op for all ranks and completes them. A meeting that stays open past its deadline fails.
//
// Completing a rank runs the rest of its program, up to the next point where it has to wait, on the
// thread that completes it. So each rank is completed on a thread of its own. On one thread, the
// programs would lose all parallelism. And a rank that blocks there (as XLA's own collectives do
// until every rank has arrived) would keep the ranks behind it from arriving.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/status.h"
#include "cpu/work.h"

namespace jax_ep::cpu {

// Names one meeting: one execution of one call in a compiled program, by one of the groups that lie
// side by side in the mesh. A call in a loop meets many times under one key, one meeting after the
// other, because no rank can come to the next meeting before all have left the last one.
struct MeetingKey {
  int64_t call_id;      // unique in the process (CallState)
  int64_t run_id;       // the same on all devices of one execution
  int32_t group_index;  // which of the side-by-side groups
};

// The part of one rank in a meeting.
struct Arrival {
  MeetingKey key;
  const char* op;    // "plan", "dispatch", ...: static storage
  int64_t group_id;  // for messages
  int32_t rank;      // in [0, num_ranks)
  int32_t num_ranks;
  int64_t timeout_ms;                       // from the first arrival
  std::shared_ptr<const void> args;         // of the op's own type; kept until `done` was called
  std::function<void(const Status&)> done;  // called once, on any thread
};

// Makes the op's work from the args of all ranks, in rank order.
using MakeWork = RowWork (*)(const std::vector<std::shared_ptr<const void>>& args);

// Joins the meeting `arrival.key`. The last rank to arrive runs the work with the help of `pool`,
// and completes the others there. `pool` is used only before this returns.
void Arrive(Arrival arrival, MakeWork make_work, const ThreadPool& pool);

// The number of meetings that wait for ranks.
int64_t NumOpenMeetings();

}  // namespace jax_ep::cpu
