// The phases of an op of latency mode that clock stamps tell apart (core/clock_stamps.cuh).
#pragma once

namespace jax_ep::cuda {

enum class DecodePhase : int {
  kLaunched,     // the first instruction
  kBegun,        // the op's epoch is known
  kHelloSent,    // one warp of the first block
  kIdsRead,      // dispatch: this rank's ids have come from memory
  kIdsSent,      // dispatch
  kRowsRead,     // a part of a row is in shared memory; combine: a part of a sum
  kRowsSent,     // and has gone to all ranks that need it
  kIdsThere,     // dispatch: those of all ranks are counted
  kHellosThere,  // one warp of the first block
  kPlanKnown,    // dispatch: the entries of the block's tokens have rows
  kRowsThere,    // a part of a row has come from a peer; combine: of all sums of a token
  kWritten,      // the results, by this warp
  kEnd,          // of the block
  kCount
};

}  // namespace jax_ep::cuda
