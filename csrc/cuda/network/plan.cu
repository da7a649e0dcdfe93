// The plan between hosts, in three kernels:
//
//   choose  cleans this rank's choices, and sorts them by host: into the memory of the counterpart
//           there, where this device reaches it
//   count   sends the others, and tells that they are there; counts the rows for each expert here
//   place   gives every row its place, and lists the rows of each rank: the routes

#include <algorithm>

#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/place.cuh"
#include "cuda/network/plan.h"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kMostShared = 220 << 10;

// Choose -----------------------------------------------------------------------------------------

// Where the choices for a host go first. On the way there is no more to do if this device reaches
// its counterpart's memory: the next kernel tells that they are there.
__device__ int16_t* MessageFor(const NetworkPlanParams& p, int32_t turn, int32_t host) {
  const NetworkParams& network = p.network;
  char* const there = network.counterparts[host].memory;
  if (host == network.host || there == nullptr) {
    return MemoryOf(p, network.node.rank).out(turn, host);
  }
  return PlanMemory(there, network.shape, p.message_bytes).in(turn, network.host);
}

size_t ChooseSharedBytes(const NetworkPlanParams& p) {
  return sizeof(int16_t) * kWarps * 32 * p.top_k;
}

__global__ void __launch_bounds__(kThreads)
    ChooseKernel(const __grid_constant__ NetworkPlanParams p) {
  extern __shared__ __align__(16) char memory[];  // int16_t [kWarps, 32, K]
  const Sizes sizes(p);
  const NetworkShape& shape = p.network.shape;
  const int32_t thread = blockIdx.x * kThreads + threadIdx.x, num_threads = gridDim.x * kThreads;
  const int32_t turn = Turn(p), per_host = sizes.num_local * shape.host_ranks;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int16_t* const of_warp = reinterpret_cast<int16_t*>(memory) + warp * 32 * p.top_k;
  int32_t num_invalid = 0;
  // A warp takes 32 tokens at a time, whose choices are whole vectors.
  const int32_t first = (warp * gridDim.x + blockIdx.x) * 32;
  for (int32_t begin = first; begin < p.num_tokens; begin += num_threads) {
    const int64_t at = int64_t{begin + lane} * p.top_k;
    const bool is_token = begin + lane < p.num_tokens;
    int32_t* const topk = p.topk + at;
    if (is_token) {
      num_invalid += plan::SanitizeToken(p.topk_idx + at, p.top_k, p.num_experts, topk);
    }
    const int32_t bytes = plan::Min(32, p.num_tokens - begin) * p.top_k * sizeof(int16_t);
    for (int32_t host = 0; host < shape.num_hosts; ++host) {
      for (int32_t k = 0; is_token && k < p.top_k; ++k) {
        const int32_t expert = topk[k];
        const bool is_there = expert >= 0 && expert / per_host == host;
        of_warp[lane * p.top_k + k] =
            static_cast<int16_t>(is_there ? expert - host * per_host : plan::kNone);
      }
      __syncwarp();
      int16_t* const message = MessageFor(p, turn, host) + int64_t{begin} * p.top_k;
      for (int32_t offset = lane * 16; offset < bytes; offset += 32 * 16) {
        *reinterpret_cast<uint4*>(reinterpret_cast<char*>(message) + offset) =
            *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(of_warp) + offset);
      }
      __syncwarp();
    }
  }
  if (num_invalid != 0) atomicAdd(&Own(p.network.node).num_invalid, num_invalid);
  for (int64_t i = thread; i < p.capacity; i += num_threads) {
    p.recv_token[i] = p.recv_row[i] = p.recv_src[i] = plan::kNone;
  }
  if (p.layout == Layout::kToken) {
    for (int64_t i = thread; i < int64_t{p.capacity} * p.top_k; i += num_threads) {
      p.expert_idx[i] = plan::kNone;
    }
  }
  for (int32_t l = thread; l < sizes.num_local; l += num_threads) p.counts[l] = 0;
}

// Count ------------------------------------------------------------------------------------------

// Sends this rank's choices to other hosts, one message each, or tells that they are there. By one
// block.
__device__ void SendChoices(const NetworkPlanParams& p, int32_t turn, uint64_t word) {
  const NetworkParams& network = p.network;
  const PlanMemory own = MemoryOf(p, network.node.rank);
  const int64_t count = int64_t{p.num_tokens} * p.top_k;
  ptx::FenceAcquireReleaseSystem();
  __syncwarp();
  for (int32_t i = 0; i < network.shape.num_hosts - 1; ++i) {
    const int32_t host = (network.host + 1 + i) % network.shape.num_hosts;
    const Counterpart& to = network.counterparts[host];
    TestDelay(network.node.rank, word, 3);
    if (to.memory == nullptr) {
      if (threadIdx.x / 32 != static_cast<uint32_t>(i) % kWarps) continue;
      net::PutAndSignal(own.in(turn, network.host), own.out(turn, host), count * sizeof(int16_t),
                        own.arrived(turn, network.host), word, to.pe);
      continue;
    }
    const PlanMemory there(to.memory, network.shape, p.message_bytes);
    if (threadIdx.x == 0) ptx::StoreReleaseSystem(there.arrived(turn, network.host), word);
  }
}

// Tells the ranks of this host which choices have come from this rank's counterparts. By one warp.
__device__ bool ForwardChoices(const NetworkPlanParams& p, int32_t turn, uint64_t word) {
  const NetworkParams& network = p.network;
  const PlanMemory own = MemoryOf(p, network.node.rank);
  bool ok = true;
  for (int32_t host = threadIdx.x % 32; ok && host < network.shape.num_hosts; host += 32) {
    if (host == network.host) continue;
    uint64_t* const arrived = own.arrived(turn, host);
    ok = WaitWord(network, arrived, word, WordKind::kChunkArrived,
                  network.Peer(host, network.node.rank));
    if (!ok) break;
    net::Accept(arrived, word);
    for (int32_t d = 0; d < network.shape.host_ranks; ++d) {
      ptx::StoreReleaseSystem(MemoryOf(p, d).ready(network.node.rank, turn, host), word);
    }
  }
  return __all_sync(~0u, ok);
}

// Shared memory of a block of CountKernel.
struct CountMemory {
  int16_t* room;      // [kWarps, 32, K]
  int32_t* counters;  // [kWarps, columns]
  PeerInputs* inputs;

  __host__ __device__ CountMemory(char* memory, const Sizes& sizes, int32_t top_k)
      : room(reinterpret_cast<int16_t*>(memory)),
        counters(reinterpret_cast<int32_t*>(room + kWarps * 32 * top_k)),
        inputs(reinterpret_cast<PeerInputs*>(counters + (kWarps * sizes.columns + 1) / 2 * 2)) {}
};

size_t CountSharedBytes(const NetworkPlanParams& p) {
  const CountMemory memory(nullptr, Sizes(p), p.top_k);
  return reinterpret_cast<size_t>(memory.inputs + 1);
}

__global__ void __launch_bounds__(kThreads)
    CountKernel(const __grid_constant__ NetworkPlanParams p) {
  extern __shared__ __align__(16) char memory[];
  const NetworkParams& network = p.network;
  const Sizes sizes(p);
  const CountMemory shared(memory, sizes, p.top_k);
  const OpNumbers op = BeginOp(network.node);
  const int32_t turn = Turn(p), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t word = ChunkWord(op.epoch, network.node.tag, 0);
  if (blockIdx.x == 0) {
    Publish(network.node, op, {nullptr, nullptr, nullptr});
    SendChoices(p, turn, word);
  }
  if (!WaitInputs(network.node, op, *shared.inputs)) return;
  bool ok = blockIdx.x > 0 || warp > 0 || ForwardChoices(p, turn, word);
  int32_t* const counters = shared.counters + warp * sizes.columns;
  for (int32_t l = lane; l < sizes.columns; l += 32) counters[l] = 0;
  __syncwarp();
  const Batches batches(p, sizes);
  int32_t arrived = plan::kNone;  // rank whose choices are here
  for (int32_t i = batches.begin; ok && i < batches.end; ++i) {
    const int32_t rank = i / batches.of_rank, host = rank / network.shape.host_ranks;
    const int32_t index = rank % network.shape.host_ranks;
    const bool waits = rank != arrived && host != network.host && kMutation != kWithoutChunk;
    if (waits && lane == 0) {
      ok = WaitWord(network, MemoryOf(p, network.node.rank).ready(index, turn, host), word,
                    WordKind::kChunkReady, network.Peer(host, index));
    }
    ok = __shfl_sync(~0u, ok, 0);
    if (!ok) break;
    arrived = rank;
    const Batch batch(p, sizes, ChoicesOf(p, turn, rank), (i - rank * batches.of_rank) * 32,
                      shared.room + warp * 32 * p.top_k);
    ForBits(batch.here, [&](int32_t k) { atomicAdd(&counters[batch.Local(k)], 1); });
    const uint32_t here = __ballot_sync(~0u, batch.here != 0);
    if (lane == 0) counters[sizes.num_local] += __popc(here);
    __syncwarp();  // the room is free
  }
  __syncthreads();
  const Counts counts{p.scratch, sizes.columns};
  for (int32_t l = threadIdx.x; l < sizes.columns; l += kThreads) {
    int32_t sum = 0;
    for (int32_t w = 0; w < kWarps; ++w) {
      counts.BeforeWarp(blockIdx.x, w)[l] = sum;
      sum += shared.counters[w * sizes.columns + l];
    }
    counts.OfBlock(blockIdx.x)[l] = sum;
  }
}

// Place ------------------------------------------------------------------------------------------

// The counts, by the last block.
__device__ void WriteCounts(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m) {
  for (int32_t l = threadIdx.x; l < sizes.num_local; l += kThreads) {
    const bool by_expert = p.layout == Layout::kExpert;
    p.demand[l] = m.demand[l];
    if (by_expert) p.counts[l] = m.counts[l];
    p.group_sizes[l] = by_expert ? m.sizes[l] : __ldcg(&p.counts[l]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t num_dropped = 0;
  for (int32_t l = 0; l < sizes.num_local; ++l) num_dropped += m.demand[l] - __ldcg(&p.counts[l]);
  *p.num_dropped = num_dropped;
  *p.num_invalid = Own(p.network.node).num_invalid;
  Own(p.network.node).num_invalid = 0;
  *MemoryOf(p, p.network.node.rank).num_plans() += 1;
}

// The result of a failed plan: no rows, and impossible counts.
__device__ void Poison(const NetworkPlanParams& p, const Sizes& sizes) {
  for (int32_t i = threadIdx.x; i < p.capacity; i += kThreads) {
    p.recv_token[i] = p.recv_row[i] = plan::kNone;
  }
  for (int32_t r = threadIdx.x; r <= sizes.num_ranks; r += kThreads) p.recv_start[r] = 0;
  for (int32_t l = threadIdx.x; l < sizes.num_local; l += kThreads) {
    p.counts[l] = p.group_sizes[l] = p.demand[l] = -1;
  }
  if (threadIdx.x == 0) *p.num_dropped = *p.num_invalid = -1;
}

__global__ void __launch_bounds__(kThreads)
    PlaceKernel(const __grid_constant__ NetworkPlanParams p) {
  extern __shared__ __align__(16) char memory[];
  const NetworkParams& network = p.network;
  const Sizes sizes(p);
  const int32_t warp = threadIdx.x / 32;
  const PlaceMemory shared(memory, sizes, p.top_k, warp);
  const OpNumbers op = NumbersOfOp(network.node);
  const int32_t turn = Turn(p);
  // After a failure the counts may have any value.
  const bool ok = __syncthreads_and(ptx::LoadAcquireSystem(&Own(network.node).failed) == 0u);
  if (ok) {
    LayOut(p, sizes, {p.scratch, sizes.columns}, shared);
    PlaceRows(p, sizes, shared, turn);
  }
  EndOp(
      network.node, op.epoch,
      [&] {
        if (ok) WriteCounts(p, sizes, shared);
      },
      [&] {
        if (threadIdx.x == 0) TellHosts(network);
        Poison(p, sizes);
      });
}

}  // namespace

cudaError_t LoadNetworkPlan() {
  cudaFuncAttributes attributes;  // asking for them loads the kernel
  for (const auto kernel : {ChooseKernel, CountKernel, PlaceKernel}) {
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool FitsNetworkPlan(const NetworkPlanParams& params) {
  return int64_t{params.num_tokens} * params.top_k * static_cast<int64_t>(sizeof(int16_t)) <=
             params.message_bytes &&
         PlaceSharedBytes(params) <= kMostShared && CountSharedBytes(params) <= kMostShared;
}

cudaError_t LaunchNetworkPlan(const NetworkPlanParams& params, cudaStream_t stream) {
  const int32_t num_blocks = plan::Min(params.num_blocks, kNetworkPlanBlocks);
  ChooseKernel<<<num_blocks, kThreads, ChooseSharedBytes(params), stream>>>(params);
  CountKernel<<<num_blocks, kThreads, CountSharedBytes(params), stream>>>(params);
  PlaceKernel<<<num_blocks, kThreads, PlaceSharedBytes(params), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
