// How a rank of kernels_case.cuh fails in failures_test, by its options, and the results of an op.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/core/workspace.h"
#include "kernels_case.cuh"

namespace {

using cuda::ErrorKind;
using cuda::OpKind;
using cuda::Phase;
using cuda::WordKind;

// The word that ranks wait for in this phase; kNone: a sum or a receipt.
inline WordKind WordNamed(const std::string& name, Phase phase) {
  return name == "address"        ? WordKind::kAddress
         : name == "total"        ? WordKind::kTotal
         : name == "message"      ? WordKind::kMessage
         : name == "sum"          ? WordKind::kSum
         : name == "receipt"      ? WordKind::kSumRead
         : phase == Phase::kRows  ? WordKind::kNone
         : phase == Phase::kClose ? WordKind::kCloseFlag
                                  : WordKind::kArrivalFlag;
}

inline OpKind OpNamed(const std::string& name) {
  return name == "plan"          ? OpKind::kPlan
         : name == "dispatch"    ? OpKind::kDispatch
         : name == "combine_vjp" ? OpKind::kCombineVjp
                                 : OpKind::kCombine;
}

// What the failing rank does, and the failures that its peers must report.
struct Failure {
  OpKind op, other;
  int failing;
  bool stops, gone, withholds, mismatch, concurrent, unreachable, misplaced;
  Phase phase;
  WordKind word;  // see WordNamed
  ErrorKind kind;
  int items, other_blocks, other_tag;
  int32_t coords[2];

  Failure(const Options& options, int num_ranks) {
    const std::string what = options.Text("failure", "absent");
    gone = what == "gone", mismatch = what == "mismatch", concurrent = what == "concurrent";
    withholds = what == "withholds";
    unreachable = what == "unreachable", misplaced = what == "misplaced";
    op = OpNamed(options.Text("op", "combine"));
    other = OpNamed(options.Text("other", options.Text("op", "combine").c_str()));
    failing = options.Int("failing", num_ranks - 1);
    const std::string where = options.Text("phase", what == "stops" ? "close" : "arrival");
    phase = where == "close" ? Phase::kClose : where == "rows" ? Phase::kRows : Phase::kArrival;
    word = WordNamed(options.Text("word", ""), phase);
    if (word != WordKind::kNone) phase = PhaseOf(word);
    stops = phase != Phase::kArrival && !withholds;
    kind = mismatch      ? ErrorKind::kMismatch
           : gone        ? ErrorKind::kPeerLost
           : concurrent  ? ErrorKind::kConcurrent
           : unreachable ? ErrorKind::kUnreachable
           : misplaced   ? ErrorKind::kMisplaced
                         : ErrorKind::kTimeout;
    items = options.Int("items", 0);
    other_blocks = options.Int("other_blocks", 0);
    other_tag = options.Int("other_tag", 0);
    const bool wrong_rank = options.Text("coords", "rank") == "rank";
    coords[0] = wrong_rank ? (failing + 1) % num_ranks : failing;
    coords[1] = wrong_rank ? 0 : 1;
  }
  bool Awaits(uint32_t kind) const {
    const auto found = static_cast<WordKind>(kind);
    return word != WordKind::kNone ? found == word
                                   : found == WordKind::kSum || found == WordKind::kSumRead;
  }
  // Whether it arrives and fails itself; else its peers must notice.
  bool FailsItself() const { return mismatch || concurrent || unreachable || misplaced; }
};

// Calls `visit` with the name and the buffer of each result of an op.
template <typename Visit>
void VisitResults(OpKind op, const Workload& w, Rank& k, Visit&& visit) {
  if (op == OpKind::kPlan) {
    visit("dest_row", k.dest_row);
    visit("recv_rows", k.recv_rows);
    visit("group_sizes", k.group_sizes);
    visit("counts", k.counts);
    visit("demand", k.demand);
    visit("num_dropped", k.num_dropped);
    visit("num_invalid", k.num_invalid);
  } else if (op == OpKind::kDispatch) {
    visit("rows", k.rows);
    visit("row_weights", k.row_weights);
    if (w.fp8) visit("row_scales", k.row_scales);
  } else if (op == OpKind::kCombine) {
    visit("y", k.y);
    visit("home", k.home);
  } else {
    visit("d_rows", k.d_rows);
    visit("d_weights", k.d_weights);
  }
}

}  // namespace
