// Runs the CUDA kernels without XLA, on all GPUs of this process, bit by bit against the CPU
// backend, and times them. For development and for compute-sanitizer.
//
//   kernels_test [layout=expert|token] [tokens=4096] [hidden=7168] [topk=8] [experts=256]
//   [blocks=24]
//                [ranks=2] [alignment=128] [capacity=0 (what is received, rounded up)] [repeat=20]
//                [plan=auto|push|pull] [dtype=bf16|f32|f16] [fp8=0|1] [timeout=5 (seconds)]
//                [check=1]
//
// With more ranks than GPUs, ranks share GPUs, each on a stream of its own.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/combine.h"
#include "cpu/combine_vjp.h"
#include "cpu/dispatch.h"
#include "cuda/combine.h"
#include "cuda/combine_vjp.h"
#include "cuda/dispatch.h"
#include "cuda/plan.h"
#include "cuda/quantize.h"
#include "plan/build_plan.h"

#define CHECK_CUDA(call)                                                                          \
  do {                                                                                            \
    const cudaError_t check_error = (call);                                                       \
    if (check_error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(check_error)); \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (false)

namespace {

using namespace jax_ep;  // NOLINT: a test program
using plan::Layout;

struct Options {
  std::map<std::string, std::string> given;
  int Int(const char* name, int fallback) const {
    const auto it = given.find(name);
    return it == given.end() ? fallback : std::atoi(it->second.c_str());
  }
  std::string Text(const char* name, const char* fallback) const {
    const auto it = given.find(name);
    return it == given.end() ? fallback : it->second;
  }
};

// The same memory on the host and on a GPU.
template <typename T>
struct Buffer {
  std::vector<T> host;
  T* device = nullptr;
  void Resize(size_t count, bool poison = true) {
    host.assign(std::max<size_t>(count, 1), T{});
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&device), host.size() * sizeof(T)));
    if (poison) CHECK_CUDA(cudaMemset(device, 0xAB, host.size() * sizeof(T)));
  }
  void ToDevice() {
    CHECK_CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> FromDevice() const {
    std::vector<T> out(host.size());
    CHECK_CUDA(cudaMemcpy(out.data(), device, out.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

struct Rank {
  int device;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  cuda::Workspace* workspace;
  cuda::ErrorRecord* error;
  Buffer<int32_t> topk_idx, topk, dest_row, recv_rows, recv_src, expert_idx, group_sizes, counts,
      demand, num_dropped, num_invalid, scratch;
  Buffer<char> x, rows, y, dy, d_rows;
  Buffer<float> scales, weights, row_scales, row_weights, home, d_weights;
  cuda::GroupParams group;
};

int num_wrong = 0;

template <typename T>
void Compare(const char* what, int rank, const Buffer<T>& buffer) {
  const std::vector<T> got = buffer.FromDevice();
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &buffer.host[i], sizeof(T)) != 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return;
  std::printf("WRONG %s of rank %d: %zu of %zu, first at %zu\n", what, rank, wrong, got.size(),
              first);
  ++num_wrong;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    options.given[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  const Layout layout =
      options.Text("layout", "token") == "expert" ? Layout::kExpert : Layout::kToken;
  const int R = options.Int("ranks", 2), T = options.Int("tokens", 4096),
            K = options.Int("topk", 8);
  const int E = options.Int("experts", 256), H = options.Int("hidden", 7168), L = E / R;
  const int alignment = options.Int("alignment", 128), repeat = options.Int("repeat", 20);
  const int blocks = options.Int("blocks", 24);
  const std::string dtype = options.Text("dtype", "bf16");
  const bool fp8 = options.Int("fp8", 0) != 0;
  const bool by_expert = layout == Layout::kExpert;
  const cuda::RowType type = dtype == "f32"   ? cuda::RowType::kFloat32
                             : dtype == "f16" ? cuda::RowType::kFloat16
                                              : cuda::RowType::kBFloat16;
  const cpu::DType cpu_type = dtype == "f32"   ? cpu::DType::kFloat32
                              : dtype == "f16" ? cpu::DType::kFloat16
                                               : cpu::DType::kBFloat16;
  const int width = cuda::ByteWidth(type);
  const int M = plan::RowsPerSource(layout, K, L);
  int num_devices = 0;
  CHECK_CUDA(cudaGetDeviceCount(&num_devices));

  // Routes and data.
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks(R);
  for (int r = 0; r < R; ++r) {
    Rank& rank = ranks[r];
    rank.device = r % num_devices;
    CHECK_CUDA(cudaSetDevice(rank.device));
    CHECK_CUDA(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
    rank.topk_idx.Resize(size_t(T) * K);
    std::vector<int> experts(E);
    std::iota(experts.begin(), experts.end(), 0);
    for (int t = 0; t < T; ++t) {
      for (int k = 0; k < K; ++k) {
        std::swap(experts[k], experts[k + generator() % (E - k)]);
        rank.topk_idx.host[size_t(t) * K + k] = experts[k];
      }
      if (t % 17 == 3) rank.topk_idx.host[size_t(t) * K] = -1;
      if (t % 19 == 5 && K > 1) rank.topk_idx.host[size_t(t) * K + 1] = experts[0];
      if (t % 23 == 7) rank.topk_idx.host[size_t(t) * K] = E + 3;
    }
    rank.topk_idx.ToDevice();
  }
  int C = options.Int("capacity", 0);
  if (C == 0) {
    std::vector<int> needed(R, 0);
    for (int d = 0; d < R; ++d) {
      std::vector<int> demand(L, 0);
      for (int s = 0; s < R; ++s) {
        for (int t = 0; t < T; ++t) {
          std::vector<int32_t> clean(K);
          plan::SanitizeToken(&ranks[s].topk_idx.host[size_t(t) * K], K, E, clean.data());
          bool any = false;
          for (int k = 0; k < K; ++k) {
            if (clean[k] < 0 || clean[k] / L != d) continue;
            any = true;
            ++demand[clean[k] % L];
          }
          needed[d] += !by_expert && any;
        }
      }
      if (by_expert) {
        for (int l = 0; l < L; ++l) needed[d] += plan::RoundUp(demand[l], alignment);
      }
    }
    C = *std::max_element(needed.begin(), needed.end());
  }
  std::printf("R=%d T=%d K=%d E=%d H=%d C=%d %s %s%s blocks=%d\n", R, T, K, E, H, C,
              by_expert ? "expert" : "token", dtype.c_str(), fp8 ? " fp8" : "", blocks);

  for (int r = 0; r < R; ++r) {
    Rank& rank = ranks[r];
    CHECK_CUDA(cudaSetDevice(rank.device));
    for (int peer = 0; peer < num_devices; ++peer) {
      if (peer != rank.device && cudaDeviceEnablePeerAccess(peer, 0) != cudaSuccess)
        cudaGetLastError();
    }
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&rank.workspace), sizeof(cuda::Workspace)));
    CHECK_CUDA(cudaMemset(rank.workspace, 0, sizeof(cuda::Workspace)));
    CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&rank.error), sizeof(cuda::ErrorRecord),
                             cudaHostAllocPortable | cudaHostAllocMapped));
    std::memset(rank.error, 0, sizeof(cuda::ErrorRecord));
    // What a stream's first launch sets up must not wait for kernels that wait for this rank.
    CHECK_CUDA(cudaMemsetAsync(rank.workspace, 0, sizeof(cuda::Workspace), rank.stream));
    CHECK_CUDA(cudaEventCreate(&rank.begin));
    CHECK_CUDA(cudaEventCreate(&rank.end));
    CHECK_CUDA(cudaEventRecord(rank.begin, rank.stream));
    CHECK_CUDA(cudaEventRecord(rank.end, rank.stream));
    CHECK_CUDA(cudaStreamSynchronize(rank.stream));
    CHECK_CUDA(cuda::LoadPlan());
    CHECK_CUDA(cuda::LoadDispatch());
    CHECK_CUDA(cuda::LoadCombine());
    CHECK_CUDA(cuda::LoadCombineVjp());
    CHECK_CUDA(cuda::LoadQuantize());
    const size_t row = size_t(H) * width;
    rank.topk.Resize(size_t(T) * K);
    rank.dest_row.Resize(size_t(T) * K);
    rank.recv_rows.Resize(size_t(R) * T * M);
    rank.recv_src.Resize(C);
    rank.expert_idx.Resize(by_expert ? 0 : size_t(C) * K, false);
    for (Buffer<int32_t>* counts : {&rank.group_sizes, &rank.counts, &rank.demand})
      counts->Resize(L);
    rank.num_dropped.Resize(1);
    rank.num_invalid.Resize(1);
    rank.scratch.Resize(size_t{32} * (E + R + 1));  // for either kernel
    rank.x.Resize(T * (fp8 ? size_t(H) : row));
    rank.rows.Resize(C * (fp8 ? size_t(H) : row));
    rank.scales.Resize(fp8 ? size_t(T) * H / 128 : 0);
    rank.row_scales.Resize(fp8 ? size_t(C) * H / 128 : 0, false);
    rank.weights.Resize(size_t(T) * K);
    rank.row_weights.Resize(by_expert ? size_t(C) : size_t(C) * K);
    rank.y.Resize(T * row);
    rank.home.Resize(size_t(T) * K);
    rank.dy.Resize(T * row);
    rank.d_rows.Resize(C * row);
    rank.d_weights.Resize(C);
    const auto fill = [&](Buffer<char>& buffer, bool bytes) {
      if (bytes) {
        for (char& byte : buffer.host) byte = static_cast<char>(generator());
      } else if (width == 4) {
        auto* values = reinterpret_cast<float*>(buffer.host.data());
        for (size_t i = 0; i < buffer.host.size() / 4; ++i)
          values[i] = float(generator()) / 4e9f - 0.5f;
      } else {  // 16-bit floats of moderate size
        auto* values = reinterpret_cast<uint16_t*>(buffer.host.data());
        const uint16_t exponent = dtype == "bf16" ? 0x3F00 : 0x3800;
        for (size_t i = 0; i < buffer.host.size() / 2; ++i) {
          values[i] = exponent | (generator() & 0x80FF);
        }
      }
      buffer.ToDevice();
    };
    fill(rank.x, fp8);
    fill(rank.dy, false);
    for (float& weight : rank.weights.host) weight = float(generator()) / 4e9f;
    rank.weights.ToDevice();
    for (float& scale : rank.scales.host) scale = float(generator()) / 4e9f;
    rank.scales.ToDevice();
  }
  for (int r = 0; r < R; ++r) {
    cuda::GroupParams& group = ranks[r].group;
    group = {};
    for (int p = 0; p < R; ++p) group.peers[p] = ranks[p].workspace;
    group.error = ranks[r].error;
    group.rank = r;
    group.num_ranks = R;
    group.arrival_timeout_ns = group.op_timeout_ns =
        options.Int("timeout", 5) * uint64_t{1'000'000'000};
    group.tag = 7;
    // All addresses are good everywhere, as transport/peers.cc says.
    std::vector<cuda::Region> regions(size_t(R) * cuda::kMaxRegions);
    for (size_t i = 0; i < regions.size(); ++i) {
      constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
      regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
    }
    CHECK_CUDA(cudaMemcpy(ranks[r].workspace->regions, regions.data(),
                          regions.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice));
  }

  const auto run_plan = [&](int r) {
    Rank& k = ranks[r];
    cuda::PlanParams p{k.group,
                       layout,
                       T,
                       K,
                       E,
                       C,
                       alignment,
                       std::numeric_limits<int32_t>::max(),
                       k.topk_idx.device,
                       k.topk.device,
                       k.topk.device,
                       k.dest_row.device,
                       k.recv_rows.device,
                       k.recv_src.device,
                       k.expert_idx.device,
                       k.group_sizes.device,
                       k.counts.device,
                       k.demand.device,
                       k.num_dropped.device,
                       k.num_invalid.device,
                       k.scratch.device};
    p.group.op = cuda::OpKind::kPlan;
    const std::string kernel = options.Text("plan", "auto");
    CHECK_CUDA(cuda::LaunchPlan(p,
                                kernel == "pull"   ? cuda::PlanKernel::kPull
                                : kernel == "push" ? cuda::PlanKernel::kPush
                                                   : cuda::ChoosePlanKernel(p),
                                k.stream));
  };
  const auto run_dispatch = [&](int r) {
    Rank& k = ranks[r];
    cuda::DispatchParams p{k.group,
                           layout,
                           T,
                           K,
                           C,
                           M,
                           fp8 ? H : H * width,
                           fp8 ? H : H * width,
                           fp8 ? H / 128 : 0,
                           k.x.device,
                           fp8 ? k.scales.device : nullptr,
                           k.weights.device,
                           k.recv_rows.device,
                           k.recv_src.device,
                           k.expert_idx.device,
                           k.rows.device,
                           fp8 ? k.row_scales.device : nullptr,
                           k.row_weights.device,
                           blocks};
    p.group.op = cuda::OpKind::kDispatch;
    CHECK_CUDA(cuda::LaunchDispatch(p, k.stream));
  };
  const auto run_combine = [&](int r) {
    Rank& k = ranks[r];
    cuda::CombineParams p{k.group,
                          layout,
                          type,
                          T,
                          K,
                          E,
                          C,
                          M,
                          H,
                          k.d_rows.device,
                          nullptr,
                          by_expert ? k.d_weights.device : k.row_weights.device,
                          k.topk.device,
                          k.dest_row.device,
                          k.recv_rows.device,
                          k.y.device,
                          k.home.device,
                          blocks};
    p.group.op = cuda::OpKind::kCombine;
    CHECK_CUDA(cuda::LaunchCombine(p, k.stream));
  };
  const auto run_combine_vjp = [&](int r) {
    Rank& k = ranks[r];
    cuda::CombineVjpParams p{k.group,
                             type,
                             T,
                             M,
                             C,
                             H,
                             k.dy.device,
                             k.rows.device,
                             k.row_weights.device,
                             k.recv_rows.device,
                             k.recv_src.device,
                             k.d_rows.device,
                             k.d_weights.device,
                             blocks};
    p.group.op = cuda::OpKind::kCombineVjp;
    CHECK_CUDA(cuda::LaunchCombineVjp(p, k.stream));
  };

  // Times `launch` on all ranks at once: the slower rank's time per op over `repeat` ops.
  const auto time = [&](const char* name, auto&& launch, double wire_bytes) {
    std::vector<float> ms(R);
    std::vector<std::thread> threads;
    for (int r = 0; r < R; ++r) {
      threads.emplace_back([&, r] {
        CHECK_CUDA(cudaSetDevice(ranks[r].device));
        const cudaEvent_t begin = ranks[r].begin, end = ranks[r].end;
        launch(r);
        // As a graph, so that the host's launches are not what is timed.
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        CHECK_CUDA(cudaStreamBeginCapture(ranks[r].stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < repeat; ++i) launch(r);
        CHECK_CUDA(cudaStreamEndCapture(ranks[r].stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
        CHECK_CUDA(cudaGraphUpload(executable, ranks[r].stream));
        CHECK_CUDA(cudaEventRecord(begin, ranks[r].stream));
        CHECK_CUDA(cudaGraphLaunch(executable, ranks[r].stream));
        CHECK_CUDA(cudaEventRecord(end, ranks[r].stream));
        CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
        CHECK_CUDA(cudaEventElapsedTime(&ms[r], begin, end));
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double us = *std::max_element(ms.begin(), ms.end()) * 1e3 / repeat;
    std::printf("  %-12s %8.1f us", name, us);
    if (wire_bytes > 0) std::printf("  %6.1f GB/s", wire_bytes / us * 1e-3);
    std::printf("\n");
    for (Rank& rank : ranks) {
      if (rank.error->set == 0) continue;
      std::printf("FAILED: kind %u rank %u peer %u op %u phase %u expected %llx seen %llx\n",
                  rank.error->kind, rank.error->rank, rank.error->peer, rank.error->op,
                  rank.error->phase, (unsigned long long)rank.error->expected,
                  (unsigned long long)rank.error->seen);
      std::exit(1);
    }
  };
  const double rows_over_link = double(T) * (R - 1);
  const bool has_vjp = by_expert && !fp8;
  time("plan", run_plan, 0);
  time("dispatch", run_dispatch, rows_over_link * (fp8 ? H + H / 32 : H * width));
  if (has_vjp) {
    time("combine_vjp", run_combine_vjp, rows_over_link * H * width);
  } else {  // combine takes its rows from d_rows
    for (Rank& rank : ranks) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      if (fp8) {
        CHECK_CUDA(cudaMemset(rank.d_rows.device, 0, rank.d_rows.host.size()));
      } else {
        CHECK_CUDA(cudaMemcpy(rank.d_rows.device, rank.rows.device, rank.rows.host.size(),
                              cudaMemcpyDeviceToDevice));
      }
      CHECK_CUDA(cudaMemset(rank.d_weights.device, 0, rank.d_weights.host.size() * 4));
    }
  }
  time("combine", run_combine, rows_over_link * H * width);
  if (options.Int("check", 1) == 0) return 0;

  // The same on the CPU.
  plan::PlanShape shape{R, T, K, E, C, alignment, std::numeric_limits<int32_t>::max(), layout};
  std::vector<plan::RankPlan> plans;
  for (Rank& k : ranks) {
    plans.push_back({k.topk_idx.host.data(), k.topk.host.data(), k.dest_row.host.data(),
                     k.recv_rows.host.data(), k.recv_src.host.data(), k.expert_idx.host.data(),
                     k.group_sizes.host.data(), k.counts.host.data(), k.demand.host.data(),
                     k.num_dropped.host.data(), k.num_invalid.host.data()});
  }
  plan::BuildPlans(shape, plans);
  const auto run_on_cpu = [](cpu::RowWork work) { return work.run(0, work.num_rows); };
  const auto handle_of = [](Rank& k) {
    return cpu::Handle{k.topk.host.data(), k.dest_row.host.data(), k.recv_rows.host.data(),
                       k.recv_src.host.data(), k.expert_idx.host.data()};
  };
  const cpu::Geometry geometry{R, E, T,      K,
                               C, H, layout, fp8 ? cpu::DType::kFloat8E4M3FN : cpu_type};
  std::vector<cpu::DispatchArgs> dispatch_args(R);
  std::vector<const cpu::DispatchArgs*> dispatch_pointers;
  for (int r = 0; r < R; ++r) {
    Rank& k = ranks[r];
    dispatch_args[r] = {geometry,
                        cpu::Quantization::kNone,
                        false,
                        k.x.host.data(),
                        fp8 ? k.scales.host.data() : nullptr,
                        k.weights.host.data(),
                        handle_of(k),
                        k.rows.host.data(),
                        fp8 ? k.row_scales.host.data() : nullptr,
                        k.row_weights.host.data()};
    dispatch_pointers.push_back(&dispatch_args[r]);
  }
  run_on_cpu(cpu::DispatchWork(dispatch_pointers));
  if (has_vjp) {
    std::vector<cpu::CombineVjpArgs> args(R);
    std::vector<const cpu::CombineVjpArgs*> pointers;
    for (int r = 0; r < R; ++r) {
      Rank& k = ranks[r];
      args[r] = {
          geometry,     k.dy.host.data(),     k.rows.host.data(),     k.row_weights.host.data(),
          handle_of(k), k.d_rows.host.data(), k.d_weights.host.data()};
      pointers.push_back(&args[r]);
    }
    run_on_cpu(cpu::CombineVjpWork(pointers));
  } else if (!fp8) {
    for (Rank& k : ranks) k.d_rows.host = k.rows.host;
  }
  std::vector<cpu::CombineArgs> combine_args(R);
  std::vector<const cpu::CombineArgs*> combine_pointers;
  cpu::Geometry combine_geometry = geometry;
  combine_geometry.dtype = cpu_type;
  for (int r = 0; r < R; ++r) {
    Rank& k = ranks[r];
    combine_args[r] = {
        combine_geometry,  k.d_rows.host.data(),
        nullptr,           by_expert ? k.d_weights.host.data() : k.row_weights.host.data(),
        handle_of(k),      k.y.host.data(),
        k.home.host.data()};
    combine_pointers.push_back(&combine_args[r]);
  }
  run_on_cpu(cpu::CombineWork(combine_pointers));

  for (int r = 0; r < R; ++r) {
    const Rank& k = ranks[r];
    CHECK_CUDA(cudaSetDevice(k.device));
    Compare("topk", r, k.topk);
    Compare("dest_row", r, k.dest_row);
    Compare("recv_rows", r, k.recv_rows);
    Compare("recv_src", r, k.recv_src);
    if (!by_expert) Compare("expert_idx", r, k.expert_idx);
    Compare("group_sizes", r, k.group_sizes);
    Compare("counts", r, k.counts);
    Compare("demand", r, k.demand);
    Compare("num_dropped", r, k.num_dropped);
    Compare("num_invalid", r, k.num_invalid);
    Compare("rows", r, k.rows);
    if (fp8) Compare("row_scales", r, k.row_scales);
    Compare("row_weights", r, k.row_weights);
    if (has_vjp) {
      Compare("d_rows", r, k.d_rows);
      Compare("d_weights", r, k.d_weights);
    }
    Compare("y", r, k.y);
    Compare("home", r, k.home);
  }
  std::printf(num_wrong == 0 ? "  all right\n" : "  %d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
