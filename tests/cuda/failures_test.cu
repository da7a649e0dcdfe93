// Fails a rank of a group, without XLA, and checks what its peers make of it: each ends in time and
// has a record that says why, and all of its results are poison; so does every later op, at once.
//
//   failures_test [op=dispatch|combine|combine_vjp] [failure=absent|gone|mismatch|stops]
//                 [failing=(the last rank)] [other=(op of the failing rank, if it is a mismatch)]
//                 [items=0 (of each warp of combine, before the rank stops)] [phase=rows|close (in
//                 which its peers are then)] [routes=all|first (rank)] [timeout_ms=250]
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

#include "cuda/ptx.cuh"
#include "kernels_case.cuh"

namespace {

using cuda::ErrorKind;
using cuda::OpKind;
using cuda::Phase;

constexpr size_t kGuard = 64;  // elements after each result, which nothing may write
constexpr int kUntouched = 0xAB;
int num_wrong = 0;

void Expect(bool holds, int rank, const char* what) {
  if (holds) return;
  std::printf("WRONG on rank %d: %s\n", rank, what);
  ++num_wrong;
}

OpKind OpNamed(const std::string& name) {
  return name == "dispatch"      ? OpKind::kDispatch
         : name == "combine_vjp" ? OpKind::kCombineVjp
                                 : OpKind::kCombine;
}

__global__ void ReadTime(uint64_t* time) { *time = cuda::ptx::GlobalTimer(); }

// Calls `visit` with the name and the buffer of each result of an op.
template <typename Visit>
void VisitResults(OpKind op, Rank& k, Visit&& visit) {
  if (op == OpKind::kDispatch) {
    visit("rows", k.rows);
    visit("row_weights", k.row_weights);
  } else if (op == OpKind::kCombine) {
    visit("y", k.y);
    visit("home", k.home);
  } else {
    visit("d_rows", k.d_rows);
    visit("d_weights", k.d_weights);
  }
}

class Test {
 public:
  Test(const Workload& w, const Options& options, std::vector<Rank>& ranks)
      : w_(w), ranks_(ranks), timeout_ns_(options.Int("timeout_ms", 250) * uint64_t{1'000'000}) {
    ops_ = {OpKind::kDispatch, OpKind::kCombine};
    if (w.HasVjp()) ops_.push_back(OpKind::kCombineVjp);
    times_.resize(ranks.size());
    for (size_t r = 0; r < ranks.size(); ++r) {
      CHECK_CUDA(cudaSetDevice(ranks[r].device));
      times_[r].Resize(2);
      for (const OpKind op : ops_) {
        VisitResults(op, ranks[r],
                     [](const char*, auto& buffer) { buffer.Resize(buffer.host.size() + kGuard); });
      }
      // It is loaded before kernels wait for each other.
      ReadTime<<<1, 1, 0, ranks[r].stream>>>(times_[r].device);
      CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    }
  }

  // The plan, and each op once, as they should be.
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

  void Fail(const Options& options) {
    const OpKind op = OpNamed(options.Text("op", "combine"));
    const std::string failure = options.Text("failure", "absent");
    const bool gone = failure == "gone", mismatch = failure == "mismatch",
               stops = failure == "stops";
    const int failing = options.Int("failing", w_.R - 1);
    Rank& failing_rank = ranks_[failing];
    for (Rank& k : ranks_) {
      // What ought not to pass takes much longer.
      k.group.arrival_timeout_ns = (failure == "absent" ? 1 : 20) * timeout_ns_;
      k.group.op_timeout_ns = (stops ? 1 : 20) * timeout_ns_;
      if (gone) k.error->lost_peer = 1 + failing;
      Clear(op, k);
    }
    const OpKind other = OpNamed(options.Text("other", options.Text("op", "combine").c_str()));
    if (mismatch) {
      Clear(other, failing_rank);
      ++failing_rank.group.tag;
    }
    if (stops) failing_rank.group.tag |= (1 + options.Int("items", 0)) << 16;
    for (Rank& k : ranks_) {
      if (k.group.rank != failing) {
        Launch(op, k);
      } else if (stops || mismatch) {
        Launch(other, k);
      }
    }
    Synchronize();
    const ErrorKind kind = mismatch ? ErrorKind::kMismatch
                           : gone   ? ErrorKind::kPeerLost
                                    : ErrorKind::kTimeout;
    const Phase phase = !stops                                      ? Phase::kArrival
                        : options.Text("phase", "close") == "close" ? Phase::kClose
                                                                    : Phase::kRows;
    bool noticed = false;  // by someone who told the others
    for (Rank& k : ranks_) {
      if (k.group.rank == failing && !mismatch) continue;
      CheckFailed(k.group.rank == failing ? other : op, k, 3 * timeout_ns_);
      const cuda::ErrorRecord& error = *k.error;
      if (error.kind == static_cast<uint32_t>(ErrorKind::kAborted)) continue;
      noticed = true;
      Expect(error.kind == static_cast<uint32_t>(kind), k.group.rank, "kind");
      Expect(error.phase == static_cast<uint32_t>(phase), k.group.rank, "phase");
      // Peers that wait for the failing one may be waited for.
      const bool any_peer = phase == Phase::kRows || k.group.rank == failing;
      Expect(any_peer ? error.peer != error.rank : error.peer == uint32_t(failing), k.group.rank,
             "peer");
      if (kind == ErrorKind::kTimeout)
        Expect(error.waited_ns >= timeout_ns_, k.group.rank, "waited less than the deadline");
    }
    Expect(noticed, failing, "nobody noticed");

    // All go on, but one that stopped.
    if (mismatch) --failing_rank.group.tag;
    for (const OpKind later : ops_) {
      const auto takes_part = [&](const Rank& k) { return !stops || k.group.rank != failing; };
      for (Rank& k : ranks_) {
        Clear(later, k);
        if (takes_part(k)) Launch(later, k);
      }
      Synchronize();
      for (Rank& k : ranks_) {
        if (!takes_part(k)) continue;
        CheckFailed(later, k, timeout_ns_);
        Expect(k.error->kind == static_cast<uint32_t>(ErrorKind::kAborted), k.group.rank,
               "a later op was not aborted");
      }
    }
  }

 private:
  void Launch(OpKind op, Rank& k) {
    CHECK_CUDA(cudaSetDevice(k.device));
    uint64_t* times = times_[k.group.rank].device;
    ReadTime<<<1, 1, 0, k.stream>>>(times);
    CHECK_CUDA(op == OpKind::kDispatch ? cuda::LaunchDispatch(DispatchParamsOf(w_, k, 0), k.stream)
               : op == OpKind::kCombine
                   ? cuda::LaunchCombine(CombineParamsOf(w_, k, 0), k.stream)
                   : cuda::LaunchCombineVjp(CombineVjpParamsOf(w_, k, 0), k.stream));
    ReadTime<<<1, 1, 0, k.stream>>>(times + 1);
  }

  void Synchronize() {
    for (Rank& k : ranks_) {
      CHECK_CUDA(cudaSetDevice(k.device));
      CHECK_CUDA(cudaStreamSynchronize(k.stream));
    }
  }

  // Nothing is reported, and nothing of the results is written.
  void Clear(OpKind op, Rank& k) {
    CHECK_CUDA(cudaSetDevice(k.device));
    const uint32_t lost_peer = k.error->lost_peer;
    std::memset(k.error, 0, sizeof(*k.error));
    k.error->lost_peer = lost_peer;
    VisitResults(op, k, [](const char*, auto& buffer) {
      CHECK_CUDA(
          cudaMemset(buffer.device, kUntouched, buffer.host.size() * sizeof(buffer.host[0])));
    });
    CHECK_CUDA(cudaDeviceSynchronize());  // the stream does not wait for it
  }

  void CheckFailed(OpKind op, Rank& k, uint64_t limit_ns) {
    const int r = k.group.rank;
    const cuda::ErrorRecord& error = *k.error;
    const std::vector<uint64_t> times = times_[r].FromDevice();
    std::printf("rank %d: kind %u op %u phase %u peer %u, after %.1f ms\n", r, error.kind, error.op,
                error.phase, error.peer, (times[1] - times[0]) * 1e-6);
    Expect(error.set == 1, r, "no record");
    Expect(error.rank == uint32_t(r), r, "rank of the record");
    Expect(error.op == static_cast<uint32_t>(op), r, "op of the record");
    Expect(times[1] - times[0] < limit_ns, r, "ended late");
    VisitResults(op, k, [&](const char* name, const auto& buffer) {
      const auto got = buffer.FromDevice();
      const auto* bytes = reinterpret_cast<const unsigned char*>(got.data());
      const auto* end = bytes + (got.size() - kGuard) * sizeof(got[0]);
      const auto* guard_end = bytes + got.size() * sizeof(got[0]);
      const auto is = [](int value) { return [=](int byte) { return byte == value; }; };
      Expect(std::all_of(bytes, end, is(0xff)), r, (std::string(name) + ": no poison").c_str());
      Expect(std::all_of(end, guard_end, is(kUntouched)), r,
             (std::string(name) + ": written past the end").c_str());
    });
  }

  const Workload& w_;
  std::vector<Rank>& ranks_;
  uint64_t timeout_ns_;
  std::vector<OpKind> ops_;
  std::vector<Buffer<uint64_t>> times_;  // before and after the last op
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
  Test test(w, options, ranks);
  test.Succeed();
  test.Fail(options);
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
