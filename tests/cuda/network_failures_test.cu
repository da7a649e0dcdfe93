// Fails a rank, or a host, of a group that spans hosts, on the emulator, and checks all others.
// Each must end in time, have a record that says why, and give only poison. Every later op must do
// the same.
//
//   network_failures_test [op=dispatch|combine|combine_vjp] [failure=absent|stops|mismatch]
//                         [failing=(the last rank, or its host, if it is a mismatch)]
//                         [items=0 (chunks that each warp does before its rank stops)]
//                         [other=(op of the failing host, if it is a mismatch)]
//                         [hosts=2] [timeout_ms=1000]
//
// and what network_test takes for its workload. If the rank stops after it has sent all that other
// hosts need (items=1000), they may end that op well. Then only the next op fails there, and if the
// rank is alone on its host, nobody notices earlier.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/core/ptx.cuh"
#include "failures_case.cuh"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "network_case.cuh"
#include "outcome.cuh"

namespace {

class Test {
 public:
  Test(const Workload& w, const Options& options, const cuda::NetworkShape& shape,
       uint64_t timeout_ns, std::vector<Rank>& ranks)
      : w_(w),
        shape_(shape),
        timeout_ns_(timeout_ns),
        ranks_(ranks),
        network_(MakeNetwork(w, options, shape, ranks)),
        times_(ranks.size()) {
    PlanOnCpu(w, ranks, network_);
    for (Buffer<uint64_t>& times : times_) times.Resize(2);
    ops_ = {OpKind::kDispatch, OpKind::kCombine};
    if (w.by_expert) ops_.push_back(OpKind::kCombineVjp);
  }

  void Succeed() {
    for (const OpKind op : ops_) {
      for (Rank& k : ranks_) Launch(op, k);
      Synchronize();
    }
    for (const Rank& k : ranks_) Expect(k.error->set == 0, k.group.rank, "failed too early");
  }

  // Rank `failing` is absent, or stops after `items`.
  void FailRank(OpKind op, int failing, bool stops, int items) {
    for (Rank& k : ranks_) {
      k.group.arrival_timeout_ns = k.group.op_timeout_ns = timeout_ns_;
      Clear(op, k);
    }
    if (stops) ranks_[failing].group.tag |= (1 + items) << 16;
    for (Rank& k : ranks_) {
      if (stops || k.group.rank != failing) Launch(op, k);
    }
    Synchronize();
    bool noticed = false;
    for (Rank& k : ranks_) {
      if (k.group.rank == failing) continue;
      const bool is_elsewhere = k.group.rank / shape_.host_ranks != failing / shape_.host_ranks;
      if (items >= w_.T && is_elsewhere && k.error->set == 0) continue;
      CheckFailed(op, k, 3 * timeout_ns_);
      if (Is(k, ErrorKind::kAborted)) continue;
      noticed = true;
      Expect(Is(k, ErrorKind::kTimeout), k.group.rank, "kind");
      Expect(k.error->waited_ns >= timeout_ns_, k.group.rank, "waited less than the deadline");
    }
    Expect(noticed || (items >= w_.T && shape_.host_ranks == 1), failing, "nobody noticed");
    CheckLater(stops ? failing : -1, noticed);
  }

  // All ranks of `host` run another op.
  void FailHost(OpKind op, OpKind other, int host) {
    const auto is_other = [&](const Rank& k) { return k.group.rank / shape_.host_ranks == host; };
    const auto op_of = [&](const Rank& k) { return is_other(k) ? other : op; };
    for (Rank& k : ranks_) {
      k.group.arrival_timeout_ns = k.group.op_timeout_ns = 20 * timeout_ns_;
      Clear(op_of(k), k);
      if (is_other(k)) ++k.group.tag;
    }
    for (Rank& k : ranks_) Launch(op_of(k), k);
    Synchronize();
    bool noticed = false;
    for (Rank& k : ranks_) {
      CheckFailed(op_of(k), k, 3 * timeout_ns_);
      if (Is(k, ErrorKind::kAborted)) continue;
      noticed = true;
      Expect(Is(k, ErrorKind::kMismatch), k.group.rank, "kind");
      const int of_host = static_cast<int>(k.error->peer) / shape_.host_ranks;
      Expect((of_host == host) != is_other(k), k.group.rank, "peer");
    }
    Expect(noticed, host * shape_.host_ranks, "nobody noticed");
    for (Rank& k : ranks_) {
      if (is_other(k)) --k.group.tag;
    }
    CheckLater(-1, true);
  }

 private:
  static bool Is(const Rank& k, ErrorKind kind) {
    return k.error->kind == static_cast<uint32_t>(kind);
  }

  void Launch(OpKind op, Rank& k) {
    const int r = k.group.rank;
    const cuda::NetworkParams group = NetworkOf(ranks_, network_, shape_, r, op);
    ReadTime<<<1, 1, 0, k.stream>>>(times_[r].device);
    if (op == OpKind::kDispatch) {
      const auto p = NetworkDispatchParamsOf(w_, k, network_[r], group);
      CHECK_CUDA(cuda::LaunchNetworkDispatch(p, k.stream));
    } else if (op == OpKind::kCombine) {
      const auto p = NetworkCombineParamsOf(w_, k, network_[r], group);
      CHECK_CUDA(cuda::LaunchNetworkCombine(p, k.stream));
    } else {
      const auto p = NetworkCombineVjpParamsOf(w_, k, network_[r], group);
      CHECK_CUDA(cuda::LaunchNetworkCombineVjp(p, k.stream));
    }
    ReadTime<<<1, 1, 0, k.stream>>>(times_[r].device + 1);
  }

  void Synchronize() {
    for (Rank& k : ranks_) CHECK_CUDA(cudaStreamSynchronize(k.stream));
  }

  // Resets records and results.
  void Clear(OpKind op, Rank& k) {
    std::memset(k.error, 0, sizeof(*k.error));
    VisitResults(op, w_, k, [](const char*, auto& buffer) {
      FillDevice(buffer.device, kUntouched, buffer.host.size() * sizeof(buffer.host[0]));
    });
  }

  // All ranks except `stopped` go on. If nobody has noticed the failure yet, somebody does in the
  // next op.
  void CheckLater(int stopped, bool noticed) {
    for (const OpKind op : ops_) {
      for (Rank& k : ranks_) {
        Clear(op, k);
        if (k.group.rank != stopped) Launch(op, k);
      }
      Synchronize();
      for (Rank& k : ranks_) {
        if (k.group.rank == stopped) continue;
        CheckFailed(op, k, noticed ? timeout_ns_ : 3 * timeout_ns_);
        Expect(!noticed || Is(k, ErrorKind::kAborted), k.group.rank, "a later op was not aborted");
      }
      noticed = true;
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
    Expect(error.peer < uint32_t(w_.R), r, "peer of the record");
    Expect(error.op == static_cast<uint32_t>(op), r, "op of the record");
    if (error.word == static_cast<uint32_t>(cuda::WordKind::kChunkReady) &&
        !Is(k, ErrorKind::kAborted)) {
      const int of_host = static_cast<int>(error.peer) / shape_.host_ranks;
      Expect(of_host != r / shape_.host_ranks, r,
             "the record does not name the sender of the chunk");
    }
    Expect(EndedAfter(times_, times) < limit_ns, r, "ended late");
    VisitResults(op, w_, k,
                 [&](const char* name, const auto& buffer) { ExpectPoison(r, name, buffer); });
  }

  const Workload& w_;
  cuda::NetworkShape shape_;
  uint64_t timeout_ns_;
  std::vector<Rank>& ranks_;
  std::vector<NetworkRank> network_;
  std::vector<Buffer<uint64_t>> times_;  // before and after the last op
  std::vector<OpKind> ops_;
};

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv);
  SetDefaults(options);
  Workload w(options);
  if (w.C == 0) w.C = EnoughCapacity(w);
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks = MakeRanks(w, generator);
  Prepare(w, options, ranks, generator);
  const int hosts = options.Int("hosts", 2), failing = options.Int("failing", w.R - 1);
  const cuda::NetworkShape shape = ShapeOf(w, options);
  Test test(w, options, shape, options.Int("timeout_ms", 1000) * uint64_t{1'000'000}, ranks);
  test.Succeed();
  const std::string op = options.Text("op", "dispatch"), how = options.Text("failure", "absent");
  if (how == "mismatch") {
    const OpKind other = OpNamed(options.Text("other", op.c_str()));
    test.FailHost(OpNamed(op), other, failing / (w.R / hosts));
  } else {
    test.FailRank(OpNamed(op), failing, how == "stops", options.Int("items", 0));
  }
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
