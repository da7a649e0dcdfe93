// Fails a rank of a group in latency mode, without XLA, and checks its peers. Each must end in
// time, have a record that says why, and give only poison. Every later op must do the same at once.
//
//   decode_failures_test [op=dispatch|combine] [failing=(the last rank)]
//                        [failure=absent|gone|stops|withholds|mismatch|elsewhere|misplaced|
//                                 concurrent|restarts|done|crossed] [calls=1|2 (of an op)]
//                        [word=hello|ids (that it does not send)] [items=0 (before it stops)]
//                        [other=(the failing rank's op, if it is a mismatch)] [timeout_ms=250]
//                        [absent=(a rank that takes no part from the beginning)]
//
// and what decode_test takes for its workload. With failure=elsewhere the rank is at a plan of
// throughput mode. With failure=restarts the rank has two start calls before a done call, with
// failure=done a done call without a start call, and with failure=crossed the done call of the
// other op. The kernels are built with JAX_EP_TEST_STOPS.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/core/ptx.cuh"
#include "cuda/core/test_hooks.cuh"
#include "cuda/plan/plan.h"
#include "decode_case.cuh"
#include "outcome.cuh"
#include "transport/error_text.h"

namespace {

using cuda::Calls;
using cuda::ErrorKind;
using cuda::OpKind;
using cuda::WordKind;

constexpr size_t kGuard = 64;  // elements after each result that nobody may write

OpKind OpNamed(const std::string& name) {
  return name == "combine" ? OpKind::kCombine : OpKind::kDispatch;
}

template <typename Visit>
void VisitResults(OpKind op, const DecodeWorkload& w, Rank& k, Visit&& visit) {
  if (op == OpKind::kCombine) return visit("y", k.y);
  VisitHandle(w, k, visit);
  visit("rows", k.rows);
  visit("row_weights", k.row_weights);
  if (w.packed) {
    visit("packed_scales", k.packed_scales);
  } else if (w.HasRowScales()) {
    visit("row_scales", k.row_scales);
  }
}

class Test {
 public:
  Test(const DecodeWorkload& w, const Options& options, std::vector<Rank>& ranks,
       std::mt19937& generator)
      : w_(w),
        ranks_(ranks),
        timeout_ns_(options.Int("timeout_ms", 250) * uint64_t{1'000'000}),
        in_two_(options.Int("calls", 1) == 2),
        times_(ranks.size()) {
    for (Rank& k : ranks) {
      CHECK_CUDA(cudaSetDevice(k.device));
      FillCombine(w, k, generator);
      const auto guard = [](const char*, auto& buffer) {
        buffer.Resize(buffer.host.size() + kGuard);
      };
      VisitResults(OpKind::kDispatch, w, k, guard);
      VisitResults(OpKind::kCombine, w, k, guard);
      times_[k.group.rank].Resize(2);
      ReadTime<<<1, 1, 0, k.stream>>>(times_[k.group.rank].device);
      CHECK_CUDA(cudaStreamSynchronize(k.stream));
    }
    CHECK_CUDA(cudaStreamCreateWithFlags(&second_stream_, cudaStreamNonBlocking));
    inboxes_ = MakeInboxes(w, ranks);
  }

  void Succeed() {
    for (const OpKind op : {OpKind::kDispatch, OpKind::kCombine}) {
      for (Rank& k : ranks_) {
        if (k.group.rank != w_.absent) Launch(op, k);
      }
      Synchronize();
    }
    for (const Rank& k : ranks_) Expect(k.error->set == 0, k.group.rank, "failed too early");
  }

  void Fail(const Options& options) {
    const std::string what = options.Text("failure", "absent");
    const OpKind op = OpNamed(options.Text("op", "dispatch"));
    const OpKind other = OpNamed(options.Text("other", options.Text("op", "dispatch").c_str()));
    const int failing = options.Int("failing", w_.R - 1);
    const bool ids = options.Text("word", "hello") == "ids";
    const bool unpaired = what == "restarts" || what == "done" || what == "crossed";
    const bool itself = what == "mismatch" || what == "elsewhere" || what == "misplaced" ||
                        what == "concurrent" || unpaired;
    Rank& culprit = ranks_[failing];
    for (Rank& k : ranks_) {
      k.group.arrival_timeout_ns = k.group.op_timeout_ns = (itself ? 20 : 1) * timeout_ns_;
      if (what == "gone") {
        k.group.arrival_timeout_ns = k.group.op_timeout_ns = 20 * timeout_ns_;
        k.error->lost_peer = 1 + failing;
      }
      Clear(op, k);
    }
    if (what == "stops") culprit.group.tag |= (1 + options.Int("items", 0)) << 16;
    if (what == "withholds") {
      const WordKind word = ids ? WordKind::kIds : WordKind::kHello;
      culprit.group.tag |= (cuda::kWithholds + static_cast<uint32_t>(word)) << 16;
    }
    if (what == "mismatch" && op == other) culprit.group.tag += 2;
    Buffer<int32_t> coords;
    if (what == "misplaced") {
      coords.Resize(2);
      coords.host = {(failing + 1) % w_.R, 0};
      coords.ToDevice();
      culprit.group.coords = coords.device;
    }
    // A peer that comes only afterwards keeps two ops at once from ending.
    const int late = what == "concurrent" ? (failing + 1) % w_.R : -1;
    for (Rank& k : ranks_) {
      if (k.group.rank == late || k.group.rank == w_.absent) continue;
      if (k.group.rank != failing) {
        Launch(op, k);
      } else if (what == "elsewhere") {
        CHECK_CUDA(cuda::LaunchPlan(PlanParamsOf(w_, k), cuda::PlanKernel::kPull, k.stream));
      } else if (what == "concurrent") {
        Launch(op, k);
        Rank second = k;
        second.stream = second_stream_;
        second.group.tag += 4;
        Launch(op, second);
      } else if (what == "stops" && in_two_) {
        LaunchCall(op, k, Calls::kStart);
      } else if (unpaired) {
        if (what != "done") LaunchCall(op, k, Calls::kStart);
        if (what == "restarts") LaunchCall(op, k, Calls::kStart);
        ReadTime<<<1, 1, 0, k.stream>>>(times_[failing].device);
        LaunchCall(op, k, Calls::kDone, what == "crossed");
        ReadTime<<<1, 1, 0, k.stream>>>(times_[failing].device + 1);
      } else if (what != "absent" && what != "gone") {
        Launch(other, k);
      }
    }
    Synchronize();
    if (late >= 0) Launch(op, ranks_[late]);
    Synchronize();
    // A rank that stops waits too, and may be the first to give up.
    const ErrorKind own = what == "stops" ? ErrorKind::kTimeout : ErrorKind::kMismatch;
    bool noticed = culprit.error->kind == static_cast<uint32_t>(own);
    if (unpaired) {
      noticed = culprit.error->kind == static_cast<uint32_t>(ErrorKind::kUnpaired);
      Expect(transport::ErrorText(*culprit.error).find("did not alternate") != std::string::npos,
             failing, "text");
    }
    for (Rank& k : ranks_) {
      const int r = k.group.rank;
      if (r == w_.absent) continue;
      if (r == failing && (!itself || what == "elsewhere" || other != op)) continue;
      // The rank may have sent all that its peers wait for; then only their next ops fail.
      if (unpaired && r != failing && k.error->set == 0) continue;
      CheckFailed(op, k, 3 * timeout_ns_);
      const auto kind = static_cast<ErrorKind>(k.error->kind);
      const auto word = static_cast<WordKind>(k.error->word);
      if (kind == ErrorKind::kAborted) continue;
      if (unpaired) {
        Expect(r == failing, r, "kind");
        continue;
      }
      noticed = true;
      const ErrorKind expected = what == "gone"         ? ErrorKind::kPeerLost
                                 : what == "misplaced"  ? ErrorKind::kMisplaced
                                 : what == "concurrent" ? ErrorKind::kConcurrent
                                 : itself               ? ErrorKind::kMismatch
                                                        : ErrorKind::kTimeout;
      const bool is_hello = kind == ErrorKind::kMismatch && what == "concurrent";
      Expect(kind == expected || is_hello, r, "kind");
      if (what == "misplaced" || what == "concurrent") continue;
      Expect(r == failing || k.error->peer == uint32_t(failing), r, "peer");
      Expect(what == "elsewhere"   ? word == WordKind::kArrivalFlag
             : what == "mismatch"  ? word == WordKind::kHello
             : what == "withholds" ? word == (ids ? WordKind::kIds : WordKind::kHello)
                                   : word == WordKind::kHello || word == WordKind::kIds ||
                                         word == WordKind::kRowWords || word == WordKind::kSumWords,
             r, "word");
      const std::string text = transport::ErrorText(*k.error);
      std::printf("  %s\n", text.c_str());
      Expect(what == "elsewhere" || text.find("expected") != std::string::npos, r, "text");
      Expect(what == "elsewhere" || text.find("latency mode's") != std::string::npos, r, "text");
    }
    Expect(noticed, failing, "nobody noticed");
    // Peers go on, and all ops end at once.
    culprit.group.tag = ranks_[(failing + 1) % w_.R].group.tag;
    for (const OpKind later : {OpKind::kDispatch, OpKind::kCombine}) {
      for (Rank& k : ranks_) {
        if (k.group.rank == failing || k.group.rank == w_.absent) continue;
        Clear(later, k);
        Launch(later, k);
      }
      Synchronize();
      for (Rank& k : ranks_) {
        if (k.group.rank == failing || k.group.rank == w_.absent) continue;
        CheckFailed(later, k, timeout_ns_);
        Expect(k.error->kind == static_cast<uint32_t>(ErrorKind::kAborted), k.group.rank,
               "a later op was not aborted");
      }
    }
    if (what != "absent") return;
    // It was only slow, and comes to the op that its peers have given up.
    Clear(op, culprit);
    Launch(op, culprit);
    Synchronize();
    CheckFailed(op, culprit, timeout_ns_);
    Expect(culprit.error->kind == static_cast<uint32_t>(ErrorKind::kAborted), failing,
           "the late op was not aborted");
  }

 private:
  void Launch(OpKind op, const Rank& k) {
    CHECK_CUDA(cudaSetDevice(k.device));
    uint64_t* times = times_[k.group.rank].device;
    ReadTime<<<1, 1, 0, k.stream>>>(times);
    if (in_two_) LaunchCall(op, k, Calls::kStart);
    LaunchCall(op, k, in_two_ ? Calls::kDone : Calls::kOne);
    ReadTime<<<1, 1, 0, k.stream>>>(times + 1);
  }

  // `as_other`: as a call of the other op.
  void LaunchCall(OpKind op, const Rank& k, Calls calls, bool as_other = false) {
    CHECK_CUDA(cudaSetDevice(k.device));
    if (op == OpKind::kCombine) {
      cuda::DecodeCombineParams params = DecodeCombineOf(w_, k, inboxes_, calls);
      params.kind += as_other;
      CHECK_CUDA(cuda::LaunchDecodeCombine(params, k.stream));
    } else {
      cuda::DecodeDispatchParams params = DecodeDispatchOf(w_, k, inboxes_, calls);
      params.kind += as_other;
      CHECK_CUDA(cuda::LaunchDecodeDispatch(params, k.stream));
    }
  }

  void Synchronize() {
    for (Rank& k : ranks_) {
      CHECK_CUDA(cudaSetDevice(k.device));
      CHECK_CUDA(cudaStreamSynchronize(k.stream));
    }
    CHECK_CUDA(cudaStreamSynchronize(second_stream_));
  }

  // Resets records and results.
  void Clear(OpKind op, Rank& k) {
    CHECK_CUDA(cudaSetDevice(k.device));
    const uint32_t lost_peer = k.error->lost_peer;
    std::memset(k.error, 0, sizeof(*k.error));
    k.error->lost_peer = lost_peer;
    VisitResults(op, w_, k, [](const char*, auto& buffer) {
      FillDevice(buffer.device, kUntouched, buffer.host.size() * sizeof(buffer.host[0]));
    });
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  void CheckFailed(OpKind op, Rank& k, uint64_t limit_ns) {
    const int r = k.group.rank;
    const cuda::ErrorRecord& error = *k.error;
    const std::vector<uint64_t> times = times_[r].FromDevice();
    std::printf("rank %d: kind %u op %u word %u peer %u, after %.1f ms\n", r, error.kind, error.op,
                error.word, error.peer, (times[1] - times[0]) * 1e-6);
    Expect(error.set == 1, r, "no record");
    Expect(error.rank == uint32_t(r), r, "rank of the record");
    Expect(error.op == static_cast<uint32_t>(op), r, "op of the record");
    Expect(EndedAfter(times_, times) < limit_ns, r, "ended late");
    VisitResults(op, w_, k, [&](const char* name, const auto& buffer) {
      ExpectPoison(r, name, buffer, kGuard);
    });
  }

  const DecodeWorkload& w_;
  std::vector<Rank>& ranks_;
  uint64_t timeout_ns_;
  bool in_two_;
  std::vector<Buffer<uint64_t>> times_;  // before and after the last op
  cudaStream_t second_stream_;           // of the failing rank
  cuda::DecodeInboxes inboxes_;
};

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that wait for each other
  const Options options(argc, argv);
  DecodeWorkload w(options);
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks = MakeRanks(w, generator);
  ChangeRoutes(w, options, ranks);
  if (w.C == 0) w.C = std::max(w.alignment, NeededCapacity(w, ranks));
  Prepare(w, options, ranks, generator);
  Test test(w, options, ranks, generator);
  test.Succeed();
  test.Fail(options);
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
