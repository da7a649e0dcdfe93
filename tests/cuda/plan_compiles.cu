// Shows that nvcc compiles the device half of csrc/plan/. It is never run. Compile with
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -c tests/cuda/plan_compiles.cu

#include <cstdint>

#include "plan/routing.h"

namespace jax_ep::plan {

// Every function that a device may call, in one kernel: one thread a source token, all arrays as in
// plan/build_plan.h, positions already known.
__global__ void PlanKernel(Layout layout, int32_t num_ranks, int32_t num_tokens, int32_t top_k,
                           int32_t num_experts, int32_t capacity, int32_t alignment,
                           int32_t expert_capacity, const int32_t* topk_idx, int32_t* topk,
                           const int32_t* positions, const int32_t* demand, int32_t* counts,
                           int32_t* group_sizes, int32_t* starts, int32_t* dest_row,
                           int32_t* recv_src, int32_t* num_invalid) {
  const int32_t num_local_experts = num_experts / num_ranks;
  const int32_t token = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (token == 0) {
    const RoomShare share{capacity, 0};  // as if all rows fit
    int32_t start = 0;
    for (int32_t local = 0; local < num_local_experts; ++local) {
      const int32_t wanted = Min(demand[local], expert_capacity);
      counts[local] = Min(wanted, share.LimitOf(local, alignment));
      group_sizes[local] = GroupSize(counts[local], alignment, capacity);
      starts[local] = start;
      start = AddSizes(start, group_sizes[local], capacity);
    }
  }
  if (token >= num_tokens) return;
  const int32_t first_entry = token * top_k;
  atomicAdd(num_invalid,
            SanitizeToken(topk_idx + first_entry, top_k, num_experts, topk + first_entry));
  for (int32_t k = 0; k < top_k; ++k) {
    const int32_t expert = topk[first_entry + k];
    if (expert == kNone) continue;
    const int32_t rank = RankOfExpert(expert, num_local_experts);
    const int32_t local = LocalExpert(expert, num_local_experts);
    const int32_t position = positions[first_entry + k];
    const int32_t row = layout == Layout::kExpert
                            ? ExpertRow(starts[local], counts[local], position)
                            : TokenRow(capacity, position);
    dest_row[first_entry + k] = row;
    if (row == kNone || FirstOnSameRank(topk + first_entry, k, num_local_experts) != k) continue;
    const int32_t encoded = EncodeSource(layout, Source{rank, token, k}, num_tokens, top_k);
    const Source decoded = DecodeSource(layout, encoded, num_tokens, top_k);
    if (encoded < NumSources(layout, num_ranks, num_tokens, top_k) && decoded.token == token) {
      recv_src[row * RowsPerSource(layout, top_k, num_local_experts)] = encoded;
    }
  }
}

}  // namespace jax_ep::plan
