// Where the ranks of a group meet to run an op, all in one process.
//
// No rank ever waits: it leaves its arguments and a callback, and the rank that arrives last runs
// the op for everybody and completes everybody. A meeting that stays open past its deadline fails.
//
// Completing a rank runs the rest of its program, up to where it next has to wait, on the thread
// that completes it. Each rank therefore gets a thread of its own: one after the other, their
// programs would lose all parallelism, and a rank that blocks (as XLA's own collectives do, until
// every rank has come) would keep those behind it from coming.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/status.h"
#include "cpu/work.h"

namespace jax_ep::cpu {

// Names one meeting: one execution, of one call in a compiled program, by one of the groups that
// lie side by side in the mesh. A call in a loop meets many times under one key, one after the
// other: no rank can come to the next meeting before all have left the last.
struct MeetingKey {
  int64_t call_id;      // unique in the process (CallState)
  int64_t run_id;       // the same on all devices of one execution
  int32_t group_index;  // which of the side-by-side groups
};

// What one rank brings.
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
// which is used only before this returns, and has the others completed there.
void Arrive(Arrival arrival, MakeWork make_work, const ThreadPool& pool);

// Meetings that wait for ranks.
int64_t NumOpenMeetings();

}  // namespace jax_ep::cpu
