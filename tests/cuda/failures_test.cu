// Fails a rank of a group, without XLA, and checks its peers. Each must end in time, have a record
// that says why, and give only poison. Every later op must do the same at once.
//
//   failures_test [op=plan|dispatch|combine|combine_vjp] [plan=pull|push] [failing=(the last rank)]
//                 [failure=absent|gone|stops|withholds|mismatch|concurrent|unreachable|misplaced]
//                 [other=(the failing rank's op, if it is a mismatch, or its second one)]
//                 [other_blocks=0] [other_tag=0] (by which the second op's are greater)
//                 [coords=rank|instance (that are wrong)]
//                 [items=0 (of each warp of combine, before the rank stops)]
//                 [phase=arrival|rows|close (in which its peers are, once it is gone or stops)]
//                 [word=address|total|message|sum|receipt (that they wait for; or any of the
//                 phase)] [routes=all|first (rank)] [timeout_ms=250]
//                 [behind=0|1 (a dispatch is launched behind its plan)]
//
// and what kernels_test takes for its workload. The kernels are built with JAX_EP_TEST_STOPS.

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
#include "failures_case.cuh"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "outcome.cuh"
#include "transport/error_text.h"

namespace {

constexpr size_t kGuard = 64;  // elements after each result that nobody may write

// The host's reaction when it finds that the process of a peer is gone.
__global__ void ReportLost(cuda::ErrorRecord* error, int peer) {
  cuda::ptx::StoreReleaseSystem(&error->lost_peer, 1u + peer);
}

class Test {
 public:
  Test(const Workload& w, const Options& options, int failing, std::vector<Rank>& ranks)
      : w_(w),
        ranks_(ranks),
        timeout_ns_(options.Int("timeout_ms", 250) * uint64_t{1'000'000}),
        plan_(options.Text("plan", "pull") == "push" ? cuda::PlanKernel::kPush
                                                     : cuda::PlanKernel::kPull),
        behind_(options.Int("behind", 0) != 0) {
    ops_ = {OpKind::kDispatch, OpKind::kCombine};
    if (w.HasVjp()) ops_.push_back(OpKind::kCombineVjp);
    coords_.resize(ranks.size());
    for (size_t r = 0; r < ranks.size(); ++r) {
      CHECK_CUDA(cudaSetDevice(ranks[r].device));
      const auto guard = [](const char*, auto& buffer) {
        buffer.Resize(buffer.host.size() + kGuard);
      };
      VisitResults(OpKind::kPlan, w, ranks[r], guard);
      for (const OpKind op : ops_) VisitResults(op, w, ranks[r], guard);
      coords_[r].Resize(2);
      SetCoords(ranks[r], {int32_t(r), 0});
      ranks[r].group.coords = coords_[r].device;
    }
    CHECK_CUDA(cudaSetDevice(ranks[failing].device));
    CHECK_CUDA(cudaStreamCreateWithFlags(&second_stream_, cudaStreamNonBlocking));
    times_.resize(ranks.size() + 1);
    for (size_t i = 0; i < times_.size(); ++i) {
      const bool is_second = i == ranks.size();
      const Rank& k = ranks[is_second ? failing : i];
      const cudaStream_t stream = is_second ? second_stream_ : k.stream;
      CHECK_CUDA(cudaSetDevice(k.device));
      times_[i].Resize(2);
      // Prepares kernels and streams before kernels wait for each other.
      ReadTime<<<1, 1, 0, stream>>>(times_[i].device);
      ReportLost<<<1, 1, 0, stream>>>(k.error, -1);
      CHECK_CUDA(cudaStreamSynchronize(stream));
    }
  }

  // Runs the plan and each op once without failures.
  void Succeed() {
    for (Rank& k : ranks_) {
      CHECK_CUDA(cudaSetDevice(k.device));
      CHECK_CUDA(cuda::LaunchPlan(PlanParamsOf(w_, k), cuda::PlanKernel::kPull, k.stream));
    }
    Synchronize();
    for (const OpKind op : ops_) {
      for (Rank& k : ranks_) Launch(op, k);
      Synchronize();
    }
    for (const Rank& k : ranks_) Expect(k.error->set == 0, k.group.rank, "failed too early");
  }

  void Fail(const Failure& f) {
    Rank& failing = ranks_[f.failing];
    const bool times_out = f.kind == ErrorKind::kTimeout;
    for (Rank& k : ranks_) {
      // Waits that must not time out have much longer.
      const bool arrives = f.phase != Phase::kArrival;
      k.group.arrival_timeout_ns = (times_out && !arrives ? 1 : 20) * timeout_ns_;
      k.group.op_timeout_ns = (times_out && arrives ? 1 : 20) * timeout_ns_;
      if (f.gone && !f.stops) k.error->lost_peer = 1 + f.failing;
      Clear(f.op, k);
    }
    Clear(f.other, failing);
    if (f.mismatch) ++failing.group.tag;
    if (f.stops) failing.group.tag |= (1 + f.items) << 16;
    if (f.withholds) failing.group.tag |= (cuda::kWithholds + static_cast<uint32_t>(f.word)) << 16;
    if (f.misplaced) SetCoords(failing, {f.coords[0], f.coords[1]});
    if (f.unreachable) SetRegions(failing, false);
    if (f.concurrent) {
      LaunchTwice(f);
    } else {
      for (Rank& k : ranks_) {
        if (k.group.rank != f.failing) {
          Launch(f.op, k);
        } else if (f.stops || f.withholds || f.FailsItself()) {
          Launch(f.other, k);
        }
      }
    }
    if (f.gone && f.stops) {
      CHECK_CUDA(cudaSetDevice(failing.device));
      for (Rank& k : ranks_) ReportLost<<<1, 1, 0, failing.stream>>>(k.error, f.failing);
    }
    Synchronize();
    CheckRecords(f);

    // All ranks go on, except one that stopped.
    if (f.mismatch) --failing.group.tag;
    if (f.withholds) failing.group.tag &= 0xffff;
    SetCoords(failing, {f.failing, 0});
    SetRegions(failing, true);
    for (const OpKind later : ops_) {
      const auto takes_part = [&](const Rank& k) { return !f.stops || k.group.rank != f.failing; };
      for (Rank& k : ranks_) {
        Clear(later, k);
        if (takes_part(k)) Launch(later, k);
      }
      Synchronize();
      for (Rank& k : ranks_) {
        if (!takes_part(k)) continue;
        CheckFailed(later, k, timeout_ns_);
        // After two ops with different numbers of blocks, a rank may not know that they have ended.
        if (f.other_blocks != 0 && k.group.rank == f.failing) continue;
        // A rank that was absent counts fewer epochs than its peers, which may be two ahead.
        const bool is_behind = behind_ && k.group.rank == f.failing &&
                               k.error->kind == static_cast<uint32_t>(ErrorKind::kMismatch);
        Expect(is_behind || k.error->kind == static_cast<uint32_t>(ErrorKind::kAborted),
               k.group.rank, "a later op was not aborted");
      }
    }
  }

 private:
  void Launch(OpKind op, Rank& k) { Launch(op, k, w_, times_[k.group.rank].device); }

  void Launch(OpKind op, Rank& k, const Workload& w, uint64_t* times) {
    CHECK_CUDA(cudaSetDevice(k.device));
    ReadTime<<<1, 1, 0, k.stream>>>(times);
    if (behind_ && op == OpKind::kDispatch) {
      LaunchPlanAndDispatch(w, k, 0, nullptr);
      ReadTime<<<1, 1, 0, k.stream>>>(times + 1);
      return;
    }
    if (op == OpKind::kDispatch) {
      LaunchDispatchOf(w, k, 0);
    } else {
      CHECK_CUDA(op == OpKind::kPlan ? cuda::LaunchPlan(PlanParamsOf(w, k), plan_, k.stream)
                 : op == OpKind::kCombine
                     ? cuda::LaunchCombine(CombineParamsOf(w, k, 0), k.stream)
                     : cuda::LaunchCombineVjp(CombineVjpParamsOf(w, k, 0), k.stream));
    }
    ReadTime<<<1, 1, 0, k.stream>>>(times + 1);
  }

  // The failing rank's two ops at once. A peer that comes only afterwards keeps both from ending.
  void LaunchTwice(const Failure& f) {
    const int last = (f.failing + 1) % w_.R;
    Rank& failing = ranks_[f.failing];
    for (Rank& k : ranks_) {
      if (k.group.rank != last) Launch(f.op, k);
    }
    Rank second = failing;
    second.group.tag += f.other_tag;
    Workload w = w_;
    w.blocks += f.other_blocks;
    second.stream = second_stream_;
    Launch(f.other, second, w, times_.back().device);
    CHECK_CUDA(cudaStreamSynchronize(second.stream));
    Synchronize();  // all end, although one has not come
    Launch(f.op, ranks_[last]);
  }

  void SetCoords(const Rank& k, std::vector<int32_t> coords) {
    CHECK_CUDA(cudaSetDevice(k.device));
    Buffer<int32_t>& buffer = coords_[k.group.rank];
    buffer.host = std::move(coords);
    buffer.ToDevice();
    CHECK_CUDA(cudaDeviceSynchronize());  // the stream does not wait for it
  }

  // The regions of its own memory: the whole address space, or nothing.
  void SetRegions(const Rank& k, bool any) {
    std::vector<cuda::Region> regions(cuda::kMaxRegions);
    constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
    for (size_t i = 0; any && i < regions.size(); ++i) regions[i] = {i * kSize, kSize};
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cudaMemcpy(k.channel->regions[k.group.rank], regions.data(),
                          regions.size() * sizeof(regions[0]), cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  void Synchronize() {
    for (Rank& k : ranks_) {
      CHECK_CUDA(cudaSetDevice(k.device));
      CHECK_CUDA(cudaStreamSynchronize(k.stream));
    }
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
    CHECK_CUDA(cudaDeviceSynchronize());  // the stream does not wait for it
  }

  // Checks the results and records of all ranks.
  void CheckRecords(const Failure& f) {
    bool noticed = false;  // by a rank that told the others
    for (Rank& k : ranks_) {
      const int r = k.group.rank;
      const bool fails = r == f.failing;
      const cuda::ErrorRecord& error = *k.error;
      if (fails && !f.FailsItself()) {
        // Where it only leaves something out, it may wait as well, for a peer that waits for that.
        noticed |= (f.stops || f.withholds) && error.set != 0 &&
                   error.kind == static_cast<uint32_t>(f.kind);
        continue;
      }
      if (fails && f.concurrent) {  // either op may have come first
        CheckResults(f.op, k);
        CheckTimes(times_.back().FromDevice(), k, 3 * timeout_ns_);
        CheckFailed(static_cast<OpKind>(error.op), k, 3 * timeout_ns_);
        CheckResults(f.other, k);
      } else {
        CheckFailed(fails ? f.other : f.op, k, 3 * timeout_ns_);
      }
      const bool aborted = error.kind == static_cast<uint32_t>(ErrorKind::kAborted);
      // Others can notice the failure themselves or be told of it, unless only the rank itself can
      // notice.
      const bool is_own = f.FailsItself() && !f.mismatch;
      if (is_own ? !fails : aborted) {
        const bool sees_tag = f.other_tag != 0 && error.peer == uint32_t(f.failing) &&
                              error.kind == static_cast<uint32_t>(ErrorKind::kMismatch);
        Expect(aborted || sees_tag, r, "was not told");
        continue;
      }
      noticed = true;
      Expect(error.kind == static_cast<uint32_t>(f.kind), r, "kind");
      if (is_own) {
        Expect(error.peer == uint32_t(f.misplaced ? f.coords[0] : r), r, "peer");
      } else if (f.kind == ErrorKind::kTimeout && f.phase == Phase::kRows && !f.withholds) {
        // Ranks may also wait for peers that wait for the failing rank.
        Expect(error.peer != error.rank, r, "peer");
      } else {
        Expect(fails ? error.peer != error.rank : error.peer == uint32_t(f.failing), r, "peer");
      }
      if (f.kind == ErrorKind::kTimeout)
        Expect(error.waited_ns >= timeout_ns_, r, "waited less than the deadline");
      if (is_own) {
        // With two ops at once, either may find the other's flag.
        const auto word = static_cast<WordKind>(error.word);
        Expect(word == WordKind::kNone || (f.concurrent && (word == WordKind::kArrivalFlag ||
                                                            word == WordKind::kCloseFlag)),
               r, "a word");
      } else {
        const bool of_plan =
            behind_ && static_cast<WordKind>(error.word) == WordKind::kMessage;  // or the dispatch
        Expect(of_plan || f.Awaits(error.word), r, "word");
        CheckText(k);
      }
      if (f.misplaced)
        Expect(error.expected == 0 && error.seen == uint64_t(f.coords[1]), r, "instance");
      if (f.unreachable)
        Expect(error.expected != 0 && error.seen < cuda::kMaxAddresses, r, "address");
    }
    Expect(noticed, f.failing, "nobody noticed");
  }

  // The text for users about the words that were expected and seen. All earlier ops were right.
  void CheckText(const Rank& k) {
    const cuda::ErrorRecord& error = *k.error;
    const std::string text = transport::ErrorText(error);
    std::printf("  %s\n", text.c_str());
    size_t number = ops_.size() + 2;  // after the plan, and each of the others
    if (behind_) ++number;  // the dispatch before had a plan of its own, and so has this one
    const bool is_flag = error.word == static_cast<uint32_t>(WordKind::kArrivalFlag) ||
                         error.word == static_cast<uint32_t>(WordKind::kCloseFlag);
    if (behind_ && is_flag && error.expected >> cuda::kTagBits == number + 1) ++number;
    const std::string epoch = "epoch " + std::to_string(number);
    const std::string of_ring = epoch + ", token " + std::to_string(uint32_t(error.expected)) + ",";
    const auto says = [&](const std::string& expected) {
      Expect(text.find("; expected " + expected) != std::string::npos, k.group.rank, "text");
    };
    switch (static_cast<WordKind>(error.word)) {
      case WordKind::kAddress:
        return says("the address of publication " + std::to_string(number) +
                    " modulo 65536, saw that of publication " + std::to_string(number - 1) +
                    " modulo 65536.");
      case WordKind::kTotal:
        return says("the total of " + epoch + ", saw that of epoch 1.");
      case WordKind::kMessage:
        return says("the message of " + epoch + ", saw none.");
      case WordKind::kSum:
        Expect(uint32_t(error.expected) < uint32_t(w_.T), k.group.rank, "token");
        return says("the sum of " + of_ring);
      case WordKind::kSumRead:
        Expect(uint32_t(error.expected) < uint32_t(w_.T), k.group.rank, "token");
        return says("the receipt for the sum of " + of_ring);
      default:
        return says(epoch + " tag " + std::to_string(k.group.tag & 0xffff) + ",");
    }
  }

  void CheckFailed(OpKind op, Rank& k, uint64_t limit_ns) {
    const int r = k.group.rank;
    const cuda::ErrorRecord& error = *k.error;
    const std::vector<uint64_t> times = times_[r].FromDevice();
    std::printf("rank %d: kind %u op %u word %u peer %u, after %.1f ms\n", r, error.kind, error.op,
                error.word, error.peer, (times[1] - times[0]) * 1e-6);
    Expect(error.set == 1, r, "no record");
    Expect(error.rank == uint32_t(r), r, "rank of the record");
    const bool is_plan = behind_ && OpKind(error.op) == OpKind::kPlan;
    Expect(is_plan || error.op == static_cast<uint32_t>(op), r, "op of the record");
    CheckTimes(times, k, limit_ns);
    CheckResults(op, k);
  }

  void CheckTimes(const std::vector<uint64_t>& times, const Rank& k, uint64_t limit_ns) {
    Expect(EndedAfter(times_, times) < limit_ns, k.group.rank, "ended late");
  }

  void CheckResults(OpKind op, Rank& k) {
    const int r = k.group.rank;
    VisitResults(op, w_, k, [&](const char* name, const auto& buffer) {
      ExpectPoison(r, name, buffer, kGuard);
    });
  }

  const Workload& w_;
  std::vector<Rank>& ranks_;
  uint64_t timeout_ns_;
  cuda::PlanKernel plan_;  // of a plan that fails
  bool behind_;
  std::vector<OpKind> ops_;
  std::vector<Buffer<uint64_t>> times_;  // before and after the last op, and a rank's second one
  std::vector<Buffer<int32_t>> coords_;
  cudaStream_t second_stream_;  // of the failing rank
};

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that wait for each other
  const Options options(argc, argv);
  Workload w(options);
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks = MakeRanks(w, generator);
  if (options.Text("routes", "all") == "first") {
    for (Rank& k : ranks) {
      for (int32_t& expert : k.topk_idx.host) expert %= w.L;
      CHECK_CUDA(cudaSetDevice(k.device));
      k.topk_idx.ToDevice();
    }
  }
  if (w.C == 0) w.C = NeededCapacity(w, ranks);
  Prepare(w, options, ranks, generator);
  const Failure failure(options, w.R);
  Test test(w, options, failure.failing, ranks);
  test.Succeed();
  test.Fail(failure);
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
