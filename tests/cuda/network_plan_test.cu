// The plan of groups that span hosts, on the emulator's network, against the plan of one host, with
// other choices in every step.
//
//   network_plan_test [hosts=2] [ranks=4] [layout=expert|token] [tokens=70] [topk=4] [experts=24]
//                     [blocks=2] [steps=4] [capacity=0 (for any choices)] [alignment=8]
//                     [expert_capacity=0 (unbounded)] [masked=0|1|2] [timeout=60]
//
// masked=1: one rank has no tokens that go anywhere; masked=2: all but one.

#include <cuda_runtime.h>

#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/network/plan.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "network_case.cuh"
#include "network_compare.cuh"
#include "plan/build_plan.h"

namespace {

// Every rank's choices in a step, some of them invalid. Later steps choose experts of fewer ranks.
void Choose(const Workload& w, int step, int masked, std::vector<Rank>& ranks,
            std::mt19937& generator) {
  for (int r = 0; r < w.R; ++r) {
    for (int32_t& expert : ranks[r].topk_idx.host) {
      const uint32_t x = generator();
      expert = static_cast<int32_t>(x / 8 % (w.E - step * 5 % (w.E / 2)));
      if (x % 8 == 0 || (masked == 1 && r == step % w.R) || (masked == 2 && r != step % w.R)) {
        expert = -1;
      } else if (x % 97 == 1) {
        expert = w.E + 1;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv);
  options.given.emplace("tokens", "70");
  SetDefaults(options);
  Workload w(options);
  std::mt19937 generator(options.Int("seed", 1));
  if (w.C == 0) w.C = EnoughCapacity(w);
  std::vector<Rank> ranks = MakeRanks(w, generator);
  Prepare(w, options, ranks, generator);
  const cuda::NetworkShape shape = ShapeOf(w, options);
  const int64_t message_bytes = (w.T * w.K * 2 + 127) / 128 * 128;
  std::vector<NetworkRank> network = MakeNetwork(
      w, options, shape, ranks, cuda::PlanMemory(nullptr, shape, message_bytes).bytes());
  const int steps = options.Int("steps", 4), given = options.Int("expert_capacity", 0);
  const int32_t expert_capacity = given > 0 ? given : std::numeric_limits<int32_t>::max();
  CHECK_CUDA(cuda::LoadNetworkPlan());
  std::vector<Buffer<int32_t>> scratch(w.R);
  for (Buffer<int32_t>& buffer : scratch) buffer.Resize(cuda::NetworkPlanScratchSize(w.L));

  for (int step = 0; step < steps && num_wrong == 0; ++step) {
    Choose(w, step, options.Int("masked", 0), ranks, generator);
    std::vector<plan::RankPlan> plans;
    for (Rank& k : ranks) {
      plans.push_back(PlanArgsOf(w, k, OnHost()).buffers);
      k.topk_idx.ToDevice();
    }
    plan::BuildPlans({w.R, w.T, w.K, w.E, w.C, w.alignment, expert_capacity, w.layout}, plans);
    RoutesOf(w, ranks, network);
    for (int r = 0; r < w.R; ++r) {
      Rank& k = ranks[r];
      NetworkRank& self = network[r];
      for (Buffer<int32_t>* buffer :
           {&k.topk, &k.recv_src, &k.expert_idx, &k.group_sizes, &k.counts, &k.demand,
            &k.num_dropped, &k.num_invalid, &self.recv_start, &self.recv_token, &self.recv_row}) {
        Poison(*buffer);
      }
      cuda::NetworkPlanParams p{};
      p.network = NetworkOf(ranks, network, shape, r, cuda::OpKind::kPlan);
      p.layout = w.layout;
      p.num_tokens = w.T;
      p.top_k = w.K;
      p.num_experts = w.E;
      p.capacity = w.C;
      p.alignment = w.alignment;
      p.expert_capacity = expert_capacity;
      p.message_bytes = message_bytes;
      p.topk_idx = k.topk_idx.device;
      p.topk = k.topk.device;
      p.recv_start = self.recv_start.device;
      p.recv_token = self.recv_token.device;
      p.recv_row = self.recv_row.device;
      p.recv_src = k.recv_src.device;
      p.expert_idx = k.expert_idx.device;
      p.group_sizes = k.group_sizes.device;
      p.counts = k.counts.device;
      p.demand = k.demand.device;
      p.num_dropped = k.num_dropped.device;
      p.num_invalid = k.num_invalid.device;
      p.scratch = scratch[r].device;
      p.num_blocks = w.blocks;
      if (!cuda::FitsNetworkPlan(p)) {
        std::printf("no room for such a plan\n");
        return 2;
      }
      CHECK_CUDA(cuda::LaunchNetworkPlan(p, k.stream));
    }
    Finish("plan", step, ranks);
    for (int r = 0; r < w.R; ++r) {
      const Rank& k = ranks[r];
      const NetworkRank& self = network[r];
      if (w.T > 0) Compare("topk", step, r, k.topk);
      Compare("recv_start", step, r, self.recv_start);
      Compare("recv_token", step, r, self.recv_token);
      Compare("recv_row", step, r, self.recv_row);
      Compare("recv_src", step, r, k.recv_src);
      if (!w.by_expert) Compare("expert_idx", step, r, k.expert_idx);
      Compare("group_sizes", step, r, k.group_sizes);
      Compare("counts", step, r, k.counts);
      Compare("demand", step, r, k.demand);
      Compare("num_dropped", step, r, k.num_dropped);
      Compare("num_invalid", step, r, k.num_invalid);
    }
  }
  std::printf("%d steps: %s\n", steps, num_wrong == 0 ? "all right" : "WRONG");
  return num_wrong == 0 ? 0 : 1;
}
