// The kernels of groups that span hosts, bit by bit against the CPU backend, with other routes in
// every step. On the emulator, over its network; on GPUs, which have no network here, by memory
// that all ranks reach.
//
//   network_test [hosts=2] [ranks=4] [layout=expert|token] [tokens=40] [hidden=264] [topk=4]
//                [experts=24] [blocks=2] [steps=3] [chunk_kib=4] [capacity=0 (what is received)]
//                [lanes=BLOCKS] [dtype=bf16|f32|f16] [fp8=0|1] [weighted=0|1] [alignment=8]
//                [masked=0|1|2] [op=all|dispatch|combine|combine_vjp] [timeout=60] [direct=0|1|2]
//                [time=0]
//
// masked=1: one rank has no tokens that go anywhere; masked=2: all but one. direct: which hosts
// reach each other's memory (IsDirect); 1, all, on GPUs. With time=N, N launches of each op are
// timed, and no result is looked at. The shape of the benchmarks, for two hosts of a rank each, is
//
//   network_test direct=1 time=40 ranks=2 tokens=4096 hidden=7168 topk=8 experts=256 alignment=128
//                lanes=64 chunk_kib=256 blocks=48 layout=expert

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/combine.h"
#include "cpu/combine_vjp.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "network.h"
#include "network_case.cuh"
#include "network_compare.cuh"
#include "network_traffic.h"

namespace {

// Whether rows of rank `r` for a host go by the network.
bool Crosses(const Workload& w, const Options& options, int hosts, int r, int host) {
  const int own = r / (w.R / hosts);
  return host != own && !IsDirect(options, own, host);
}

// The right result of combine on this topology: sums in float32, rounded on each rank, on each host
// and at home. Written to the host's side of `y`.
template <typename T>
void SumsOf(const Workload& w, int hosts, std::vector<Rank>& ranks) {
  const int n = w.R / hosts;
  const auto rows_of = [&](Buffer<char>& buffer) {
    return reinterpret_cast<T*>(buffer.host.data());
  };
  for (int s = 0; s < w.R; ++s) {
    for (int t = 0; t < w.T; ++t) {
      for (int i = 0; i < w.H; ++i) {
        float at_home = 0;
        for (int host = 0; host < hosts; ++host) {
          float on_host = 0;
          for (int r = host * n; r < (host + 1) * n; ++r) {
            float on_rank = 0;
            for (int m = 0; m < w.M; ++m) {
              const int32_t row = ranks[r].recv_rows.host[(size_t(s) * w.T + t) * w.M + m];
              if (row < 0) continue;
              float value = cpu::ToFloat(rows_of(ranks[r].d_rows)[size_t(row) * w.H + i]);
              if (w.weighted) value *= ranks[r].row_weights.host[row];
              on_rank += value;
            }
            on_host += cpu::ToFloat(cpu::FromFloat<T>(on_rank));
          }
          at_home += cpu::ToFloat(cpu::FromFloat<T>(on_host));
        }
        rows_of(ranks[s].y)[size_t(t) * w.H + i] = cpu::FromFloat<T>(at_home);
      }
    }
  }
}

void SumsOf(const Workload& w, int hosts, std::vector<Rank>& ranks) {
  if (w.dtype == "f32") return SumsOf<float>(w, hosts, ranks);
  if (w.dtype == "f16") return SumsOf<cpu::Float16>(w, hosts, ranks);
  SumsOf<cpu::BFloat16>(w, hosts, ranks);
}

// Runs the ops of one step after the other, and compares each with the CPU backend.
class Test {
 public:
  Test(const Workload& w, const Options& options, const cuda::NetworkShape& shape,
       std::vector<Rank>& ranks)
      : w_(w),
        options_(options),
        shape_(shape),
        ranks_(ranks),
        network_(MakeNetwork(w, options, shape, ranks)) {}

  void Plan() {
    PlanOnCpu(w_, ranks_, network_);
    for (Rank& rank : ranks_) {  // what dispatch gives, in case it does not run
      rank.rows.ToDevice();
      rank.row_weights.ToDevice();
    }
  }

  // Prints what an op takes on the slowest rank, as the mean of `count` launches.
  void Time(const char* op, int count) {
    const auto launch = [&](int r) {
      CHECK_CUDA(cudaSetDevice(ranks_[r].device));
      if (op == std::string("dispatch")) return LaunchDispatch(r);
      op == std::string("combine") ? LaunchCombine(r) : LaunchCombineVjp(r);
    };
    // One rank after the other, because a launch may wait for room in the queue of its stream.
    const auto launch_all = [&] {
      for (int r = 0; r < w_.R; ++r) launch(r);
    };
    const auto record = [&](cudaEvent_t Rank::* event) {
      for (Rank& rank : ranks_) {
        CHECK_CUDA(cudaSetDevice(rank.device));
        CHECK_CUDA(cudaEventRecord(rank.*event, rank.stream));
      }
    };
    launch_all();
    record(&Rank::begin);
    for (int i = 0; i < count; ++i) launch_all();
    record(&Rank::end);
    Finish(op, 0, ranks_);
    float slowest = 0;
    for (const Rank& rank : ranks_) {
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, rank.begin, rank.end));
      slowest = std::max(slowest, ms);
    }
    std::printf("  %-12s %8.1f us\n", op, slowest * 1000 / count);
  }

  void Dispatch(int step) {
    const auto& w = w_;
    Carry(traffic::DispatchRowBytes(w.H * (w.fp8 ? 1 : w.width), w.fp8 ? w.H / 128 : 0, w.K),
          shape_.num_hosts - 1);
    for (Rank& rank : ranks_) {
      w.Poison(rank.rows);
      Poison(rank.row_scales);
      Poison(rank.row_weights);
    }
    for (int r = 0; r < w.R; ++r) LaunchDispatch(r);
    Finish("dispatch", step, ranks_);
    for (int r = 0; r < w.R; ++r) {
      Compare("rows", step, r, ranks_[r].rows);
      if (w.fp8) Compare("row_scales", step, r, ranks_[r].row_scales);
      Compare("row_weights", step, r, ranks_[r].row_weights);
    }
  }

  void Combine(int step, std::mt19937& generator) {
    const auto& w = w_;
    for (Rank& rank : ranks_) {
      FillRows(w, rank, generator);
      Poison(rank.y);
      Poison(rank.home);
    }
    RunOnCpu(
        ranks_, [&](const Rank& k) { return CombineArgsOf(w, k, OnHost()); }, cpu::CombineWork);
    SumsOf(w, shape_.num_hosts, ranks_);
    const int row_bytes = traffic::CombineRowBytes(w.H * w.width, w.K);
    Carry(row_bytes, shape_.num_hosts - (shape_.host_ranks > 1 ? 0 : 1));
    expected_bytes_ -= NumDropped() * row_bytes;
    for (int r = 0; r < w.R; ++r) LaunchCombine(r);
    Finish("combine", step, ranks_);
    for (int r = 0; r < w.R && w.T > 0; ++r) {
      Compare("y", step, r, ranks_[r].y);
      Compare("home", step, r, ranks_[r].home);
    }
  }

  void CombineVjp(int step) {
    const auto& w = w_;
    RunOnCpu(
        ranks_, [&](const Rank& k) { return CombineVjpArgsOf(w, k, OnHost()); },
        cpu::CombineVjpWork);
    Carry(traffic::DispatchRowBytes(w.H * w.width, 0, 0), shape_.num_hosts - 1);
    for (Rank& rank : ranks_) {
      w.Poison(rank.d_rows);
      Poison(rank.d_weights);
    }
    for (int r = 0; r < w.R; ++r) LaunchCombineVjp(r);
    Finish("combine_vjp", step, ranks_);
    for (int r = 0; r < w.R; ++r) {
      Compare("d_rows", step, r, ranks_[r].d_rows);
      Compare("d_weights", step, r, ranks_[r].d_weights);
    }
  }

  // Bytes that the network should have carried in all steps.
  size_t expected_bytes() const { return expected_bytes_; }

 private:
  void LaunchDispatch(int r) {
    const auto p = NetworkDispatchParamsOf(w_, ranks_[r], network_[r],
                                           GroupOfRank(r, cuda::OpKind::kDispatch));
    if (!cuda::FitsNetworkDispatch(p)) {
      std::printf("a chunk has no room for a row\n");
      std::exit(2);
    }
    CHECK_CUDA(cuda::LaunchNetworkDispatch(p, ranks_[r].stream));
  }
  void LaunchCombine(int r) {
    const auto p =
        NetworkCombineParamsOf(w_, ranks_[r], network_[r], GroupOfRank(r, cuda::OpKind::kCombine));
    CHECK_CUDA(cuda::LaunchNetworkCombine(p, ranks_[r].stream));
  }
  void LaunchCombineVjp(int r) {
    const auto p = NetworkCombineVjpParamsOf(w_, ranks_[r], network_[r],
                                             GroupOfRank(r, cuda::OpKind::kCombineVjp));
    CHECK_CUDA(cuda::LaunchNetworkCombineVjp(p, ranks_[r].stream));
  }

  cuda::NetworkParams GroupOfRank(int r, cuda::OpKind op) const {
    return NetworkOf(ranks_, network_, shape_, r, op);
  }

  // Counts the bytes of an op whose rows have `row_bytes` in a chunk, and whose blocks serve ways
  // to so many hosts.
  void Carry(int row_bytes, int num_hosts) {
    const int num_lanes = cuda::Ways(shape_, num_hosts, w_.blocks).num_lanes;
    for (int r = 0; r < w_.R; ++r) {
      for (int h = 0; h < shape_.num_hosts; ++h) {
        if (!Crosses(w_, options_, shape_.num_hosts, r, h)) continue;
        const int64_t rows =
            traffic::Crossings(ranks_[r].topk.host.data(), w_.T, w_.K, w_.E / shape_.num_hosts, h);
        expected_bytes_ += traffic::OfRows(shape_, num_lanes, w_.T, row_bytes, rows).put_bytes;
      }
    }
  }

  // Rows that do not come home, because another host has dropped all rows of a token.
  size_t NumDropped() const {
    const int hosts = shape_.num_hosts;
    size_t dropped = 0;
    for (int r = 0; r < w_.R; ++r) {
      for (int i = 0; i < w_.T * hosts; ++i) {
        const int host = i % hosts, token = i / hosts;
        bool goes = false, comes = false;
        for (int k = 0; k < w_.K; ++k) {
          const int32_t expert = ranks_[r].topk.host[size_t(token) * w_.K + k];
          if (expert < 0 || expert / (w_.E / hosts) != host) continue;
          if (!Crosses(w_, options_, hosts, r, host)) continue;
          goes = true;
          comes = comes || ranks_[r].dest_row.host[size_t(token) * w_.K + k] >= 0;
        }
        dropped += goes && !comes;
      }
    }
    return dropped;
  }

  const Workload& w_;
  const Options& options_;
  cuda::NetworkShape shape_;
  std::vector<Rank>& ranks_;
  std::vector<NetworkRank> network_;
  size_t expected_bytes_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv);
  SetDefaults(options);
  Workload w(options);
  const int hosts = options.Int("hosts", 2), steps = options.Int("steps", 3);
  const int masked = options.Int("masked", 0);
  std::mt19937 generator(options.Int("seed", 1));
  const int timed = options.Int("time", 0);
  std::vector<Rank> ranks = MakeRanks(w, generator);
  if (w.C == 0) w.C = timed > 0 ? NeededCapacity(w, ranks) : EnoughCapacity(w);
  Prepare(w, options, ranks, generator);
  const cuda::NetworkShape shape = ShapeOf(w, options);
  Test test(w, options, shape, ranks);
  std::printf(
      "hosts=%d R=%d T=%d K=%d E=%d H=%d C=%d %s %s%s blocks=%d, %lld KiB of network memory\n",
      hosts, w.R, w.T, w.K, w.E, w.H, w.C, w.by_expert ? "expert" : "token", w.dtype.c_str(),
      w.fp8 ? " fp8" : "", w.blocks, static_cast<long long>(shape.bytes() >> 10));

  const auto runs = [&w, op = options.Text("op", "all")](const std::string& name) {
    if (op != "all" && op != name) return false;
    return name == "dispatch" || (!w.fp8 && (name == "combine" || w.by_expert));
  };
  if (timed > 0) {
    test.Plan();
    for (const char* op : {"dispatch", "combine", "combine_vjp"}) {
      if (runs(op)) test.Time(op, timed);
    }
    return num_wrong == 0 ? 0 : 1;
  }
  for (int step = 0; step < steps && num_wrong == 0; ++step) {
    for (int r = 0; r < w.R; ++r) {
      for (int32_t& expert : ranks[r].topk_idx.host) {
        const uint32_t x = generator();
        // Later steps choose experts of fewer ranks.
        expert = static_cast<int32_t>(x / 8 % (w.E - step * 5 % (w.E / 2)));
        if (x % 8 == 0 || (masked == 1 && r == step % w.R) || (masked == 2 && r != step % w.R)) {
          expert = -1;
        }
      }
    }
    test.Plan();
    if (runs("dispatch")) test.Dispatch(step);
    if (runs("combine") && num_wrong == 0) test.Combine(step, generator);
    if (runs("combine_vjp") && num_wrong == 0) test.CombineVjp(step);
  }
  const size_t expected_bytes = test.expected_bytes();
  if (num_wrong == 0 && emulator::BytesCarried() != expected_bytes) {
    std::printf("WRONG: the network carried %llu bytes, not %zu\n",
                static_cast<unsigned long long>(emulator::BytesCarried()), expected_bytes);
    ++num_wrong;
  }
  std::printf("%d steps, %zu bytes over the network: %s\n", steps, expected_bytes,
              num_wrong == 0 ? "all right" : "WRONG");
  return num_wrong == 0 ? 0 : 1;
}
