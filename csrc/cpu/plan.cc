#include "cpu/plan.h"

#include <tuple>
#include <utility>

namespace jax_ep::cpu {
namespace {

auto Fields(const plan::PlanShape& shape) {
  return std::tie(shape.num_ranks, shape.num_tokens, shape.top_k, shape.num_experts, shape.capacity,
                  shape.alignment, shape.expert_capacity, shape.layout);
}

}  // namespace

RowWork PlanWork(std::vector<const PlanArgs*> ranks) {
  for (size_t rank = 1; rank < ranks.size(); ++rank) {
    if (Fields(ranks[rank]->shape) != Fields(ranks[0]->shape)) return RanksDisagree("plan", rank);
  }
  RowWork work;
  work.num_rows = 1;  // a plan is made in one piece, and is small beside the rows it routes
  work.run = [ranks = std::move(ranks)](int64_t, int64_t) {
    std::vector<plan::RankPlan> buffers;
    for (const PlanArgs* args : ranks) buffers.push_back(args->buffers);
    plan::BuildPlans(ranks[0]->shape, buffers);
    return Status();
  };
  return work;
}

}  // namespace jax_ep::cpu
