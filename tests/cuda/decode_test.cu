// Runs the ops of latency mode for several ranks without XLA, bit by bit against the CPU backend.
//
//   decode_test [steps=3] [masked=0 (of so many ranks one has no tokens)] [routes=all|first|few]
//               [cast=fp8|ue8m0] [dense=0|1] [packed=0 (1: scales come packed)] [weights=1]
//               [expert_capacity=]
//               [fixed_places=0 (1: a masked plan; needs capacity, alignment and expert_capacity)]
//               [epoch=0 (of the op before the first)] [order=steps|ops|flying] [time=0 (ops of a
//               graph)] [calls=1|2|3 (of an op: one, two, or by turns)] [absent=(a rank that takes
//               no part)] [dead=0 (1: it runs no op either; else it runs them all by itself)]
//               [phases=0 (ops of a graph, at most 64)] [replays=20] [json=FILE]
//
// and what kernels_test takes for its workload. Each step is a dispatch, with its plan, and a
// combine. It has inputs and results of its own, and no rank waits on the host between steps. With
// order=ops all combines come after all dispatches. With order=flying each op has two calls: a step
// starts its combine, then the next step its dispatch, on another channel, and each rank finishes
// them in an order of its own. phases= says when each phase of an op passes, in one call and in
// two; it needs JAX_EP_CLOCK_STAMPS, as "build_kernels_test.sh FOLDER stamps" defines it.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/combine.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "decode_case.cuh"
#include "decode_phases.cuh"
#include "graph.cuh"

namespace {

using cuda::Calls;

int num_wrong = 0;

template <typename T>
void Compare(const char* what, int step, int rank, const Buffer<T>& buffer, size_t count) {
  const std::vector<T> got = buffer.FromDevice();
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(&got[i], &buffer.host[i], sizeof(T)) != 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return;
  std::printf("WRONG %s of rank %d in step %d: %zu of %zu, first at %zu\n", what, rank, step, wrong,
              count, first);
  ++num_wrong;
}

template <typename T>
void Compare(const char* what, int step, int rank, const Buffer<T>& buffer) {
  Compare(what, step, rank, buffer, buffer.host.size());
}

template <typename ArgsOf, typename WorkOf>
void RunOnCpu(std::vector<Rank>& ranks, ArgsOf args_of, WorkOf work_of) {
  using Args = decltype(args_of(ranks[0]));
  std::vector<Args> args;
  for (const Rank& k : ranks) args.push_back(args_of(k));
  std::vector<const Args*> pointers;
  for (const Args& of_rank : args) pointers.push_back(&of_rank);
  cpu::RowWork work = work_of(pointers);
  work.run(0, work.num_rows);
}

void Check(const DecodeWorkload& w, int step, int dead, std::vector<Rank>& ranks) {
  RunOnCpu(ranks, [&](const Rank& k) { return DecodePlanArgs(w, k, true); }, cpu::PlanWork);
  RunOnCpu(ranks, [&](const Rank& k) { return DecodeDispatchArgs(w, k, true); }, cpu::DispatchWork);
  RunOnCpu(ranks, [&](const Rank& k) { return DecodeCombineArgs(w, k, true); }, cpu::CombineWork);
  for (size_t r = 0; r < ranks.size(); ++r) {
    Rank& k = ranks[r];
    if (int(r) == dead) continue;
    CHECK_CUDA(cudaSetDevice(k.device));
    const auto compare = [&](const char* what, const auto& buffer) {
      Compare(what, step, static_cast<int>(r), buffer);
    };
    VisitHandle(w, k, compare);
    Compare("rows", step, static_cast<int>(r), k.rows, w.RowBytes());
    if (w.packed) {
      PackScales(w, k);
      compare("packed_scales", k.packed_scales);
    } else if (w.HasRowScales()) {
      compare("row_scales", k.row_scales);
    }
    if (w.has_weights) compare("row_weights", k.row_weights);
    compare("y", k.y);
  }
}

// The time of an op, by a graph of `count` of them on every rank.
template <typename Launch>
void Time(const char* name, std::vector<Rank>& ranks, int count, Launch&& launch) {
  Graphs graphs(ranks, count, launch);
  graphs.Run();
  std::printf("  %-12s %8.2f us\n", name, graphs.Run() / count);
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that wait for each other
  const Options options(argc, argv);
  DecodeWorkload w(options);
  std::mt19937 generator(options.Int("seed", 1));
  const int num_steps = options.Int("steps", 3);
  std::vector<std::vector<Rank>> steps(num_steps);
  const int given_capacity = w.C;
  for (std::vector<Rank>& ranks : steps) {
    ranks = MakeRanks(w, generator);
    ChangeRoutes(w, options, ranks);
    if (given_capacity == 0) w.C = std::max({w.C, w.alignment, NeededCapacity(w, ranks)});
  }
  Prepare(w, options, steps[0], generator);
  for (std::vector<Rank>& ranks : steps) {
    for (int r = 0; r < w.R; ++r) {
      if (&ranks != &steps[0]) {
        CHECK_CUDA(cudaSetDevice(ranks[r].device));
        ranks[r].stream = steps[0][r].stream;
        ranks[r].group = steps[0][r].group;
        FillRank(w, ranks[r], generator);
      }
      FillCombine(w, ranks[r], generator);
      CHECK_CUDA(cudaSetDevice(ranks[r].device));
      w.Poison(ranks[r].rows);
    }
  }
  const cuda::DecodeInboxes inboxes = MakeInboxes(w, steps[0]);
  const cuda::DecodeInboxes other_inboxes = MakeInboxes(w, steps[0]);  // of another channel
  if (const char* obstacle = cuda::ObstacleOf(DecodeDispatchOf(w, steps[0][0], inboxes))) {
    std::printf("expected %s\n", obstacle);
    return 2;
  }
  const uint64_t epoch = std::strtoull(options.Text("epoch", "0").c_str(), nullptr, 0);
  const std::vector<uint64_t> epochs(cuda::kMaxDecodeBlocks, epoch);
  for (const Rank& k : steps[0]) {
    CHECK_CUDA(cudaSetDevice(k.device));
    for (const cuda::DecodeInboxes& of_channel : {inboxes, other_inboxes}) {
      CHECK_CUDA(cudaMemcpy(of_channel.of[k.group.rank]->epochs, epochs.data(), epochs.size() * 8,
                            cudaMemcpyHostToDevice));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  std::printf("R=%d T=%d K=%d E=%d H=%d C=%d %s %s blocks=%d\n", w.R, w.T, w.K, w.E, w.H, w.C,
              w.by_expert ? "expert" : "token", w.dtype.c_str(), w.blocks);
  const std::string order = options.Text("order", "steps");
  const int num_calls = options.Int("calls", 1);
  const int dead = options.Int("dead", 0) != 0 ? w.absent : -1;
  const auto dispatch_call = [&](const Rank& k, Calls calls) {
    CHECK_CUDA(cuda::LaunchDecodeDispatch(DecodeDispatchOf(w, k, inboxes, calls), k.stream));
  };
  const auto combine_call = [&](const Rank& k, Calls calls) {
    const cuda::DecodeInboxes& of_channel = order == "flying" ? other_inboxes : inboxes;
    CHECK_CUDA(cuda::LaunchDecodeCombine(DecodeCombineOf(w, k, of_channel, calls), k.stream));
  };
  const auto whole = [&](const Rank& k, bool in_two, const auto& call) {
    if (!in_two) return call(k, Calls::kOne);
    call(k, Calls::kStart);
    call(k, Calls::kDone);
  };
  std::vector<std::thread> threads;
  for (int r = 0; r < w.R; ++r) {
    if (r == dead) continue;
    threads.emplace_back([&, r] {
      CHECK_CUDA(cudaSetDevice(steps[0][r].device));
      if (order == "flying") {
        std::mt19937 own(options.Int("seed", 1) + r);
        dispatch_call(steps[0][r], Calls::kStart);
        dispatch_call(steps[0][r], Calls::kDone);
        for (int step = 0; step < num_steps; ++step) {
          combine_call(steps[step][r], Calls::kStart);
          const bool is_last = step + 1 == num_steps, combine_first = own() % 2 == 0;
          if (!is_last) dispatch_call(steps[step + 1][r], Calls::kStart);
          if (combine_first) combine_call(steps[step][r], Calls::kDone);
          if (!is_last) dispatch_call(steps[step + 1][r], Calls::kDone);
          if (!combine_first) combine_call(steps[step][r], Calls::kDone);
        }
      } else {
        const bool apart = order == "ops";
        for (int step = 0; step < num_steps; ++step) {
          const bool in_two = num_calls == 2 || (num_calls == 3 && step % 2 == 0);
          whole(steps[step][r], in_two, dispatch_call);
          if (!apart) whole(steps[step][r], in_two != (num_calls == 3), combine_call);
        }
        for (const std::vector<Rank>& ranks : steps) {
          if (apart) whole(ranks[r], num_calls > 1, combine_call);
        }
      }
      CHECK_CUDA(cudaStreamSynchronize(steps[0][r].stream));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Rank& k : steps[0]) {
    const cuda::ErrorRecord& error = *k.error;
    if (error.set == 0) continue;
    std::printf("WRONG: rank %u failed: kind %u peer %u op %u word %u expected %llx seen %llx\n",
                error.rank, error.kind, error.peer, error.op, error.word,
                (unsigned long long)error.expected, (unsigned long long)error.seen);
    ++num_wrong;
  }
  for (int step = 0; step < num_steps; ++step) Check(w, step, dead, steps[step]);
  if (const int count = options.Int("time", 0)) {
    for (const bool in_two : {false, true}) {
      std::printf("  in %s\n", in_two ? "two calls" : "one call");
      Time("dispatch", steps[0], count, [&](const Rank& k) { whole(k, in_two, dispatch_call); });
      Time("combine", steps[0], count, [&](const Rank& k) { whole(k, in_two, combine_call); });
    }
  }
  if (const int count = options.Int("phases", 0)) {
#ifdef JAX_EP_CLOCK_STAMPS
    const std::string path = options.Text("json", "");
    FILE* const json = path.empty() ? nullptr : std::fopen(path.c_str(), "w");
    if (count > cuda::kStampedOps || (json == nullptr && !path.empty())) {
      std::printf("expected at most %d ops, and a file that can be written\n", cuda::kStampedOps);
      return 2;
    }
    PhaseMeter meter(w, steps[0], count, options.Int("replays", 20), json);
    for (const bool in_two : {false, true}) {
      num_wrong += meter.Measure("dispatch", in_two, dispatch_call);
      num_wrong += meter.Measure("combine", in_two, combine_call);
    }
    if (json != nullptr) {
      std::fprintf(json, "]\n");
      std::fclose(json);
    }
#else
    std::printf("expected a build with JAX_EP_CLOCK_STAMPS for phases=%d\n", count);
    return 2;
#endif
  }
  std::printf(num_wrong == 0 ? "  all right\n" : "  %d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
