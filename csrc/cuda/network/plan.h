// The plan op of a group that spans hosts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/network/params.h"
#include "ops/plan.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Memory of the plans, behind the rest of a rank's network memory. Every rank tells its counterpart
// on each host which experts there its tokens want: *choices*, which the ranks of the host read at
// the counterpart, so nothing is as large as all ranks' choices.
//
// There is room for two plans, because a rank sends choices for plan n to a host only after it has
// received that host's choices for plan n - 1. The host has sent those after all its ranks had read
// the choices for plan n - 2.
class PlanMemory {
 public:
  // `message_bytes`, a multiple of 128: of the choices for one host.
  JAX_EP_HOST_DEVICE PlanMemory(char* base, const NetworkShape& shape, int64_t message_bytes)
      : base_(base + shape.bytes()), shape_(shape), message_bytes_(message_bytes) {}

  // Of all of it.
  JAX_EP_HOST_DEVICE int64_t bytes() const {
    return word_bytes() + 4 * shape_.num_hosts * message_bytes_;
  }

  // By this rank only: how many plans there have been.
  JAX_EP_HOST_DEVICE uint64_t* num_plans() const { return Word(0); }
  // By the counterpart on that host: its choices are here.
  JAX_EP_HOST_DEVICE uint64_t* arrived(int32_t turn, int32_t host) const {
    return Word(1 + turn * shape_.num_hosts + host);
  }
  // By rank `index` of this host: those of its counterpart are there.
  JAX_EP_HOST_DEVICE uint64_t* ready(int32_t index, int32_t turn, int32_t host) const {
    return Word(1 + ((1 + index) * 2 + turn) * shape_.num_hosts + host);
  }
  // [T, K], local to the host that they are for: of the ranks with this index on each host ...
  JAX_EP_HOST_DEVICE int16_t* in(int32_t turn, int32_t host) const { return Choices(turn, host); }
  // ... and of this rank for each host.
  JAX_EP_HOST_DEVICE int16_t* out(int32_t turn, int32_t host) const {
    return Choices(2 + turn, host);
  }

 private:
  JAX_EP_HOST_DEVICE int64_t word_bytes() const {
    return (1 + int64_t{2} * (1 + shape_.host_ranks) * shape_.num_hosts + 127) / 128 * 1024;
  }
  JAX_EP_HOST_DEVICE uint64_t* Word(int64_t number) const {
    return reinterpret_cast<uint64_t*>(base_) + number;
  }
  JAX_EP_HOST_DEVICE int16_t* Choices(int64_t part, int32_t host) const {
    return reinterpret_cast<int16_t*>(base_ + word_bytes() +
                                      (part * shape_.num_hosts + host) * message_bytes_);
  }

  char* base_;
  NetworkShape shape_;
  int64_t message_bytes_;
};

constexpr int kNetworkPlanBlocks = 64;  // at most
constexpr int kNetworkPlanWarps = 16;   // of a block

// Symbols as in plan/routing.h.
struct NetworkPlanParams {
  NetworkParams network;
  plan::Layout layout;
  int32_t num_tokens;       // T
  int32_t top_k;            // K
  int32_t num_experts;      // E
  int32_t capacity;         // C
  int32_t alignment;        // A
  int32_t expert_capacity;  // rows an expert keeps at most
  int64_t message_bytes;    // of PlanMemory
  const int32_t* topk_idx;  // [T, K]
  int32_t* topk;            // [T, K]
  int32_t* recv_start;      // [R + 1]
  int32_t* recv_token;      // [C], -1 past the last entry
  int32_t* recv_row;        // [C], -1 past the last entry
  int32_t* recv_src;        // [C]
  int32_t* expert_idx;      // [C, K] in layout "token", else unused
  int32_t* group_sizes;     // [L]
  int32_t* counts;          // [L]
  int32_t* demand;          // [L]
  int32_t* num_dropped;     // [1]
  int32_t* num_invalid;     // [1]
  int32_t* scratch;         // [kNetworkPlanBlocks, kNetworkPlanWarps + 1, L + 1], for counts
  int32_t num_blocks;
};

// What the arguments of the op say; the network with its messages, scratch memory and the number of
// blocks are left.
inline NetworkPlanParams NetworkParamsOf(const ops::NetworkPlanArgs& args) {
  NetworkPlanParams params{};
  params.layout = args.shape.layout;
  params.num_tokens = args.shape.num_tokens;
  params.top_k = args.shape.top_k;
  params.num_experts = args.shape.num_experts;
  params.capacity = args.shape.capacity;
  params.alignment = args.shape.alignment;
  params.expert_capacity = args.shape.expert_capacity;
  params.topk_idx = args.topk_idx;
  params.topk = args.topk;
  params.recv_start = args.recv_start;
  params.recv_token = args.recv_token;
  params.recv_row = args.recv_row;
  params.recv_src = args.recv_src;
  params.expert_idx = args.expert_idx;
  params.group_sizes = args.group_sizes;
  params.counts = args.counts;
  params.demand = args.demand;
  params.num_dropped = args.num_dropped;
  params.num_invalid = args.num_invalid;
  return params;
}

// Number of int32 in NetworkPlanParams::scratch.
inline int64_t NetworkPlanScratchSize(int64_t num_local_experts) {
  return int64_t{kNetworkPlanBlocks} * (kNetworkPlanWarps + 1) * (num_local_experts + 1);
}

// Three kernels, of which the first waits for nobody. On failure counts are -1, and there are no
// rows.
cudaError_t LaunchNetworkPlan(const NetworkPlanParams& params, cudaStream_t stream);

cudaError_t LoadNetworkPlan();

// Whether messages have room for the choices, and shared memory for the counts.
bool FitsNetworkPlan(const NetworkPlanParams& params);

}  // namespace jax_ep::cuda
