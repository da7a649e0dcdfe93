// How a rank places its rows, from the choices of all ranks (plan.cu).
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/network/plan.h"

namespace jax_ep::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

__device__ PlanMemory MemoryOf(const NetworkPlanParams& p, int32_t index) {
  return PlanMemory(p.network.memory[index], p.network.shape, p.message_bytes);
}

__device__ int32_t Turn(const NetworkPlanParams& p) {
  return static_cast<int32_t>(*MemoryOf(p, p.network.node.rank).num_plans() % 2);
}

struct Sizes {
  int32_t num_ranks, num_local, columns;  // R; L; and one column more, for tokens
  __host__ __device__ explicit Sizes(const NetworkPlanParams& p)
      : num_ranks(p.network.shape.num_hosts * p.network.shape.host_ranks),
        num_local(p.num_experts / num_ranks),
        columns(num_local + 1) {}
};

// Where this rank reads a rank's choices.
__device__ const int16_t* ChoicesOf(const NetworkPlanParams& p, int32_t turn, int32_t rank) {
  const int32_t host = rank / p.network.shape.host_ranks;
  const PlanMemory memory = MemoryOf(p, rank % p.network.shape.host_ranks);
  return host == p.network.host ? memory.out(turn, host) : memory.in(turn, host);
}

// The local expert of a choice, if it is on this rank.
__device__ int32_t LocalOf(const NetworkPlanParams& p, const Sizes& sizes, const int16_t* choice) {
  const int32_t local = int32_t{*static_cast<const volatile int16_t*>(choice)} -
                        p.network.node.rank * sizes.num_local;
  return local >= 0 && local < sizes.num_local ? local : plan::kNone;
}

// Shared memory of a block of PlaceKernel.
struct PlaceMemory {
  int32_t* before;  // [R, columns]: rows that earlier ranks have for a column
  int32_t* demand;  // [columns]
  int32_t* counts;  // [L], kept
  int32_t* sizes;   // [L], with padding
  int32_t* starts;  // [L], first rows
  int32_t* first;   // [R + 1], first entry of each rank
  // Of each warp:
  int32_t* running;  // [columns], rows of the rank so far
  uint32_t* lanes;   // [L], lanes whose token wants the expert; zero between batches
  int32_t* locals;   // [32, K], experts here that the tokens of a batch want

  __device__ PlaceMemory(char* memory, const Sizes& s, int32_t top_k, int32_t warp) {
    before = reinterpret_cast<int32_t*>(memory);
    demand = before + s.num_ranks * s.columns;
    counts = demand + s.columns;
    sizes = counts + s.num_local;
    starts = sizes + s.num_local;
    first = starts + s.num_local;
    running = first + s.num_ranks + 1 + warp * (s.columns + s.num_local + 32 * top_k);
    lanes = reinterpret_cast<uint32_t*>(running + s.columns);
    locals = running + s.columns + s.num_local;
  }
};

size_t PlaceSharedBytes(const NetworkPlanParams& p) {
  const Sizes s(p);
  return sizeof(int32_t) * (size_t(s.num_ranks) * s.columns + s.columns + 3 * s.num_local +
                            s.num_ranks + 1 + kWarps * (s.columns + s.num_local + 32 * p.top_k));
}

// Lays out this rank's rows, the same in every block.
__device__ void LayOut(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m) {
  for (int32_t l = threadIdx.x; l < sizes.columns; l += kThreads) {
    int32_t sum = 0;
    for (int32_t r = 0; r < sizes.num_ranks; ++r) {
      m.before[r * sizes.columns + l] = sum;
      sum += p.scratch[int64_t{r} * sizes.columns + l];
    }
    m.demand[l] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0 && p.layout == plan::Layout::kExpert) {
    plan::LayOutExperts(m.demand, sizes.num_local, p.expert_capacity, p.alignment, p.capacity,
                        m.counts, m.sizes, m.starts);
  }
  __syncthreads();
  // Entries of each rank, then where they begin.
  for (int32_t r = threadIdx.x; r < sizes.num_ranks; r += kThreads) {
    const int32_t* const wanted = p.scratch + int64_t{r} * sizes.columns;
    const int32_t* const before = m.before + r * sizes.columns;
    int32_t kept = 0;
    if (p.layout == plan::Layout::kToken) {
      kept = max(plan::Min(p.capacity - before[sizes.num_local], wanted[sizes.num_local]), 0);
    }
    for (int32_t l = 0; p.layout == plan::Layout::kExpert && l < sizes.num_local; ++l) {
      kept += max(plan::Min(m.counts[l] - before[l], wanted[l]), 0);
    }
    m.first[r + 1] = kept;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    m.first[0] = 0;
    for (int32_t r = 0; r < sizes.num_ranks; ++r) m.first[r + 1] += m.first[r];
  }
  __syncthreads();
}

// The rows of one rank, in order. By one warp.
__device__ void PlaceRows(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m,
                          const int16_t* choices, int32_t rank) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t earlier = (1u << lane) - 1;
  for (int32_t l = lane; l < sizes.columns; l += 32) {
    m.running[l] = m.before[rank * sizes.columns + l];
  }
  for (int32_t l = lane; l < sizes.num_local; l += 32) m.lanes[l] = 0;
  __syncwarp();
  int32_t entry = m.first[rank];
  for (int32_t begin = 0; begin < p.num_tokens; begin += 32) {
    const int32_t token = begin + lane;
    const int32_t num_tokens = plan::Min(32, p.num_tokens - begin);
    for (int32_t i = lane; i < num_tokens * p.top_k; i += 32) {
      m.locals[i] = LocalOf(p, sizes, choices + int64_t{begin} * p.top_k + i);
    }
    __syncwarp();
    const int32_t* const wanted = m.locals + lane * p.top_k;
    const int32_t num_choices = lane < num_tokens ? p.top_k : 0;
    // Which lanes want which expert.
    bool is_here = false;
    for (int32_t k = 0; k < num_choices; ++k) {
      const int32_t local = wanted[k];
      if (local == plan::kNone) continue;
      is_here = true;
      if (p.layout == plan::Layout::kExpert) atomicOr(&m.lanes[local], 1u << lane);
    }
    const uint32_t here = __ballot_sync(~0u, is_here);
    if (here == 0) continue;
    const int32_t position = m.running[sizes.num_local] + __popc(here & earlier);
    const auto row_of = [&](int32_t local) {
      if (p.layout == plan::Layout::kToken) return plan::TokenRow(p.capacity, position);
      return plan::ExpertRow(m.starts[local], m.counts[local],
                             m.running[local] + __popc(m.lanes[local] & earlier));
    };
    // How many entries this lane's token has, and where they begin.
    int32_t count = 0;
    for (int32_t k = 0; k < num_choices; ++k) {
      const int32_t local = wanted[k];
      if (local == plan::kNone || row_of(local) == plan::kNone) continue;
      count = p.layout == plan::Layout::kToken ? 1 : count + 1;
    }
    int32_t up_to = count;
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, up_to, offset);
      if (lane >= offset) up_to += other;
    }
    const int32_t first = entry + up_to - count;
    for (int32_t k = 0; count > 0 && k < num_choices; ++k) {
      const int32_t local = wanted[k];
      const int32_t row = local == plan::kNone ? plan::kNone : row_of(local);
      if (row == plan::kNone) continue;
      int32_t at = first;
      if (p.layout == plan::Layout::kToken) {
        p.expert_idx[int64_t{row} * p.top_k + k] = local;
        atomicAdd(&p.counts[local], 1);
      } else {  // after those of the token's experts with lower numbers
        for (int32_t j = 0; j < num_choices; ++j) {
          const int32_t other = wanted[j];
          at += other != plan::kNone && other < local && row_of(other) != plan::kNone;
        }
      }
      p.recv_token[at] = token;
      p.recv_row[at] = row;
      const int32_t of_source = p.layout == plan::Layout::kToken ? 0 : k;
      p.recv_src[row] =
          plan::EncodeSource(p.layout, {rank, token, of_source}, p.num_tokens, p.top_k);
    }
    entry += __shfl_sync(~0u, up_to, 31);
    __syncwarp();
    // The lowest lane that wants an expert counts for all.
    for (int32_t k = 0; p.layout == plan::Layout::kExpert && k < num_choices; ++k) {
      const int32_t local = wanted[k];
      if (local == plan::kNone) continue;
      const uint32_t wanting = m.lanes[local];
      if (wanting == 0 || (wanting & earlier) != 0) continue;
      m.running[local] += __popc(wanting);
      m.lanes[local] = 0;
    }
    if (lane == 0) m.running[sizes.num_local] += __popc(here);
    __syncwarp();
  }
}

}  // namespace
}  // namespace jax_ep::cuda
