#include "cpu/plan.h"

#include <utility>

namespace jax_ep::cpu {

RowWork PlanWork(std::vector<const ops::PlanArgs*> ranks) {
  if (const int64_t other = FindDisagreement(ranks); other != 0) {
    return RanksDisagree("plan", other);
  }
  RowWork work;
  work.num_rows = 1;  // a plan is made in one piece, as it is small compared with the rows
  work.run = [ranks = std::move(ranks)](int64_t, int64_t) {
    std::vector<plan::RankPlan> buffers;
    for (const ops::PlanArgs* args : ranks) buffers.push_back(args->buffers);
    plan::BuildPlans(ranks[0]->shape, buffers);
    return Status();
  };
  return work;
}

}  // namespace jax_ep::cpu
