// Runs the CUDA kernels without XLA, on all GPUs of this process, bit by bit against the CPU
// backend, and times them. For development and for compute-sanitizer.
//
//   kernels_test [layout=expert|token] [tokens=4096] [hidden=7168] [topk=8] [experts=256]
//                [blocks=24] [more_blocks=0 (of each rank than of the one before)]
//                [ranks=2] [alignment=128] [capacity=0 (what is received, rounded up)] [repeat=20]
//                [plan=auto|push|pull] [dtype=bf16|f32|f16] [fp8=0|1] [timeout=5 (seconds)]
//                [check=1] [sets=1] [weighted=0|1 (combine)] [keeps_unused=0|1] [behind=0|1]
//                [cast_blocks=100] [cast=fp8|ue8m0 dense=1] [at_once=0|1]
//
// With behind=1, the results checked are those of a plan and a dispatch launched behind it; with
// fp8=1 too, of rows that are cast between the two. With cast= and dense=1, each dispatch casts its
// rows, and they come dense.
//
// With at_once=1, the rows and sums checked are those of dispatches and combines that ran at the
// same time, in flight on a channel and a stream each.
//
// With several sets, consecutive launches read equal inputs from different memory. So, as with new
// data, the inputs are not in the L2 cache, and their addresses are not in the TLB.
//
// With more ranks than GPUs, ranks share GPUs, each on a stream of its own.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/combine.h"
#include "cpu/combine_vjp.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/quantize.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"

namespace {

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

// Checks the casts to and from float8, which handlers launch beside a dispatch between hosts, on
// one rank's tokens.
template <typename T>
void CheckQuantize(const Workload& w, const Rank& k, ops::Quantization quantization) {
  Buffer<char> values, dense;
  Buffer<float> scales;
  const size_t row = size_t(w.H) * sizeof(T);
  values.Resize(size_t(w.T) * w.H);
  dense.Resize(w.T * row);
  scales.Resize(size_t(w.T) * w.H / 128);
  const cuda::QuantizeParams there{w.type,       quantization == ops::Quantization::kFp8Ue8m0,
                                   w.T,          w.H,
                                   k.x.device,   values.device,
                                   scales.device};
  CHECK_CUDA(cuda::LaunchQuantize(there, k.stream));
  CHECK_CUDA(cudaStreamSynchronize(k.stream));
  for (int t = 0; t < w.T; ++t) {
    CHECK_CUDA(cudaMemcpy(dense.device + (t + 1) * row - w.H, values.device + size_t(t) * w.H, w.H,
                          cudaMemcpyDeviceToDevice));
    const T* x = reinterpret_cast<const T*>(k.x.host.data() + t * row);
    cpu::QuantizeRow(x, w.H, quantization,
                     reinterpret_cast<cpu::Float8E4M3FN*>(values.host.data()) + size_t(t) * w.H,
                     scales.host.data() + size_t(t) * w.H / 128);
    cpu::RoundTripRow(x, w.H, quantization, reinterpret_cast<T*>(dense.host.data() + t * row));
  }
  CHECK_CUDA(cuda::LaunchDequantize({w.type, w.T, w.H, scales.device, dense.device}, k.stream));
  CHECK_CUDA(cudaStreamSynchronize(k.stream));
  Compare("quantized values", 0, values);
  Compare("quantized scales", 0, scales);
  Compare("dequantized rows", 0, dense);
}

void CheckQuantize(const Workload& w, const Rank& k) {
  CHECK_CUDA(cudaSetDevice(k.device));
  for (const auto quantization : {ops::Quantization::kFp8, ops::Quantization::kFp8Ue8m0}) {
    if (w.dtype == "f32") {
      CheckQuantize<float>(w, k, quantization);
    } else if (w.dtype == "f16") {
      CheckQuantize<cpu::Float16>(w, k, quantization);
    } else {
      CheckQuantize<cpu::BFloat16>(w, k, quantization);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Workload w(options);
  if (w.Casts() != w.dense) {
    std::fprintf(stderr, "cast= and dense=1 go together here\n");
    return 2;
  }
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks = MakeRanks(w, generator);
  if (w.C == 0) w.C = NeededCapacity(w, ranks);
  const int R = w.R, T = w.T, K = w.K, E = w.E, H = w.H, C = w.C;
  const int width = w.width, repeat = options.Int("repeat", 20);
  const bool fp8 = w.fp8, by_expert = w.by_expert;
  std::printf("R=%d T=%d K=%d E=%d H=%d C=%d %s %s%s blocks=%d\n", R, T, K, E, H, C,
              by_expert ? "expert" : "token", w.dtype.c_str(), fp8 ? " fp8" : "", w.blocks);
  Prepare(w, options, ranks, generator);

  const std::string plan = options.Text("plan", "auto");
  const auto run_plan = [&](int r, int /*launch*/) {
    const cuda::PlanParams p = PlanParamsOf(w, ranks[r]);
    CHECK_CUDA(cuda::LaunchPlan(p,
                                plan == "pull"   ? cuda::PlanKernel::kPull
                                : plan == "push" ? cuda::PlanKernel::kPush
                                                 : cuda::ChoosePlanKernel(p),
                                ranks[r].stream));
  };
  // Else rows would be right from the launch before.
  const auto forget_cast = [&](const Buffer<char>& values, int r, int launch) {
    if (repeat > 1) return;
    CHECK_CUDA(cudaMemsetAsync(values.Of(launch), 0xAB, values.host.size(), ranks[r].stream));
  };
  const auto run_dispatch = [&](int r, int launch) {
    if (w.Casts()) forget_cast(ranks[r].cast_values, r, launch);
    LaunchDispatchOf(w, ranks[r], launch);
  };
  const auto run_combine = [&](int r, int launch) {
    CHECK_CUDA(cuda::LaunchCombine(CombineParamsOf(w, ranks[r], launch), ranks[r].stream));
  };
  const auto run_combine_vjp = [&](int r, int launch) {
    CHECK_CUDA(cuda::LaunchCombineVjp(CombineVjpParamsOf(w, ranks[r], launch), ranks[r].stream));
  };

  // Runs `run` for all ranks at once, until their streams are done.
  const auto on_all = [&](auto&& run) {
    std::vector<std::thread> threads;
    for (int r = 0; r < R; ++r) {
      threads.emplace_back([&, r] {
        CHECK_CUDA(cudaSetDevice(ranks[r].device));
        run(r);
        CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
        CHECK_CUDA(cudaStreamSynchronize(ranks[r].second_stream));
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  const auto stop_if_failed = [&] {
    bool failed = false;
    for (const Rank& rank : ranks) {
      const cuda::ErrorRecord& error = *rank.error;
      if (error.set == 0) continue;
      failed = true;
      std::printf("FAILED: kind %u rank %u peer %u op %u word %u expected %llx seen %llx\n",
                  error.kind, error.rank, error.peer, error.op, error.word,
                  (unsigned long long)error.expected, (unsigned long long)error.seen);
    }
    if (failed) std::exit(1);
  };

  // Times `launch` on all ranks at once: the slower rank's time per op over `repeat` ops.
  const auto time = [&](const char* name, auto&& launch, double wire_bytes) {
    // Graphs keep the host's launches out of the times. All graphs are made before one begins,
    // because making one may wait for the GPU, where the kernels of ranks wait for each other.
    std::vector<cudaGraphExec_t> graphs(R);
    for (int r = 0; r < R; ++r) {
      cudaGraph_t graph;
      CHECK_CUDA(cudaSetDevice(ranks[r].device));
      CHECK_CUDA(cudaStreamBeginCapture(ranks[r].stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < repeat; ++i) launch(r, i);
      CHECK_CUDA(cudaStreamEndCapture(ranks[r].stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&graphs[r], graph, 0));
      CHECK_CUDA(cudaGraphUpload(graphs[r], ranks[r].stream));
      CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    }
    on_all([&](int r) { launch(r, 0); });
    std::vector<float> ms(R);
    on_all([&](int r) {
      CHECK_CUDA(cudaEventRecord(ranks[r].begin, ranks[r].stream));
      CHECK_CUDA(cudaGraphLaunch(graphs[r], ranks[r].stream));
      CHECK_CUDA(cudaEventRecord(ranks[r].end, ranks[r].stream));
    });
    for (int r = 0; r < R; ++r) {
      CHECK_CUDA(cudaEventElapsedTime(&ms[r], ranks[r].begin, ranks[r].end));
    }
    const double us = *std::max_element(ms.begin(), ms.end()) * 1e3 / repeat;
    std::printf("  %-12s %8.1f us", name, us);
    if (wire_bytes > 0) std::printf("  %6.1f GB/s", wire_bytes / us * 1e-3);
    std::printf("\n");
    stop_if_failed();
  };
  // Dense rows that the cast makes into those that are dispatched.
  const bool behind = options.Int("behind", 0) != 0;
  std::vector<Buffer<char>> dense(R);
  for (int r = 0; r < R && behind && fp8; ++r) {
    Rank& k = ranks[r];
    CHECK_CUDA(cudaSetDevice(k.device));
    dense[r].Resize(size_t(T) * H * sizeof(cpu::BFloat16));
    auto* elements = reinterpret_cast<uint16_t*>(dense[r].host.data());
    for (size_t i = 0; i < size_t(T) * H; ++i) {  // either sign, exponents of about 1
      elements[i] = static_cast<uint16_t>((generator() & 0x81ff) | 0x3e00);
    }
    dense[r].ToDevice();
    for (int t = 0; t < T; ++t) {
      cpu::QuantizeRow(reinterpret_cast<const cpu::BFloat16*>(elements) + size_t(t) * H, H,
                       ops::Quantization::kFp8,
                       reinterpret_cast<cpu::Float8E4M3FN*>(k.x.host.data()) + size_t(t) * H,
                       k.scales.host.data() + size_t(t) * H / 128);
    }
  }
  const double rows_over_link = double(T) * (R - 1);
  const bool has_vjp = w.HasVjp();
  for (Rank& rank : ranks) {
    CHECK_CUDA(cudaSetDevice(rank.device));
    w.Poison(rank.rows);
    w.Poison(rank.d_rows);
  }
  time("plan", run_plan, 0);
  const int wire_row = fp8 || w.Casts() ? H + H / 32 : H * width;
  time("dispatch", run_dispatch, rows_over_link * wire_row);
  if (behind) {
    for (Rank& rank : ranks) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      w.Poison(rank.rows);
      FillDevice(rank.dest_row.device, 0xAB, rank.dest_row.host.size() * 4);
      FillDevice(rank.recv_rows.device, 0xAB, rank.recv_rows.host.size() * 4);
    }
    time("apart", [&](int r, int launch) { run_plan(r, launch), run_dispatch(r, launch); }, 0);
    time(
        "both",
        [&](int r, int launch) {
          Rank& k = ranks[r];
          if (fp8 || w.Casts()) forget_cast(fp8 ? k.x : k.cast_values, r, launch);
          LaunchPlanAndDispatch(w, k, launch, dense[r].device);
        },
        rows_over_link * wire_row);
  }
  if (has_vjp) {
    time("combine_vjp", run_combine_vjp, rows_over_link * H * width);
  } else {  // combine takes its rows from d_rows
    for (Rank& rank : ranks) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      if (fp8) {
        FillDevice(rank.d_rows.device, 0, rank.d_rows.host.size());
      } else {
        CHECK_CUDA(cudaMemcpy(rank.d_rows.device, rank.rows.device, rank.rows.host.size(),
                              cudaMemcpyDeviceToDevice));
      }
      FillDevice(rank.d_weights.device, 0, rank.d_weights.host.size() * 4);
    }
  }
  for (Rank& rank : ranks) {
    CHECK_CUDA(cudaSetDevice(rank.device));
    rank.d_rows.MakeCopies(w.sets);
  }
  time("combine", run_combine, rows_over_link * H * width);
  if (options.Int("at_once", 0) != 0) {
    for (Rank& rank : ranks) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      w.Poison(rank.rows);
      w.Poison(rank.y);
    }
    on_all([&](int r) {
      for (int launch = 0; launch < repeat; ++launch) {
        cuda::CombineParams combine = CombineParamsOf(w, ranks[r], launch);
        combine.group.channel = 1;
        for (int p = 0; p < R; ++p) ++combine.group.peers[p];
        CHECK_CUDA(cuda::LaunchCombine(combine, ranks[r].second_stream));
        run_dispatch(r, launch);
      }
    });
    stop_if_failed();
  }
  if (options.Int("check", 1) == 0) return 0;

  // Runs the same op on the CPU.
  const auto run_on_cpu = [&](auto args_of, auto work_of) {
    using Args = decltype(args_of(ranks[0]));
    std::vector<Args> args;
    for (const Rank& k : ranks) args.push_back(args_of(k));
    std::vector<const Args*> pointers;
    for (const Args& of_rank : args) pointers.push_back(&of_rank);
    cpu::RowWork work = work_of(pointers);
    work.run(0, work.num_rows);
  };
  run_on_cpu([&](const Rank& k) { return PlanArgsOf(w, k, OnHost()); }, cpu::PlanWork);
  run_on_cpu([&](const Rank& k) { return DispatchArgsOf(w, k, OnHost()); }, cpu::DispatchWork);
  if (has_vjp) {
    run_on_cpu([&](const Rank& k) { return CombineVjpArgsOf(w, k, OnHost()); },
               cpu::CombineVjpWork);
  } else if (!fp8) {
    for (Rank& k : ranks) k.d_rows.host = k.rows.host;
  }
  run_on_cpu([&](const Rank& k) { return CombineArgsOf(w, k, OnHost()); }, cpu::CombineWork);

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
  if (!fp8 && H % 128 == 0) CheckQuantize(w, ranks[0]);
  std::printf(num_wrong == 0 ? "  all right\n" : "  %d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
