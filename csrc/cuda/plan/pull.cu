// The plan op for shapes that the faster kernel (push.cu) has no room for: every rank reads what it
// needs from its peers' memory.
//
// Each block has a range of the tokens. It cleans their entries and counts them by column, and
// totals go to all peers. Then every rank knows where the rows of each (column, source rank) begin.
// Every block numbers the entries of its range, for every rank, in order. It has a bit mask of
// tokens for each column, so the position of an entry is the number of bits before it.
//
// These are two kernels, because blocks that number entries wait for the counts of all blocks of
// all ranks. In one kernel they could keep the SMs from blocks that have not counted yet. (A
// cooperative launch would start all blocks at once, but is not allowed in the loops of CUDA
// graphs.)

#include <algorithm>

#include "cuda/plan/common.cuh"
#include "cuda/plan/pull_shape.cuh"
#include "cuda/rows/room.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kThreads = 512;
constexpr int kMaxBlocks = 32;

__host__ __device__ int32_t ScratchStride(int32_t num_experts, int32_t num_ranks) {
  return num_experts + num_ranks + 1;
}

// Whether entry k, which is valid, is the token's first on its rank.
__device__ bool IsFirstOnRank(const int32_t* ids /*[K]*/, int32_t k, const PlanParams& p) {
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const int32_t rank = plan::RankOfExpert(ids[k], num_local);
  for (int32_t earlier = 0; earlier < k; ++earlier) {
    const int32_t id = ids[earlier];
    if (id >= 0 && id < p.num_experts && plan::RankOfExpert(id, num_local) == rank) return false;
  }
  return true;
}

struct TokenRange {
  int32_t begin, end;
};

__device__ TokenRange TokensOfBlock(int32_t block, int32_t num_tokens) {
  const int32_t size = (num_tokens + gridDim.x - 1) / gridDim.x;
  const int32_t begin = plan::Min(block * size, num_tokens);
  return {begin, plan::Min(begin + size, num_tokens)};
}

// Cleans this block's entries and counts them; marks all rows unused.
__device__ void CountEntries(const PlanParams& p, int32_t* counts /*[columns]*/, int32_t columns) {
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const TokenRange tokens = TokensOfBlock(blockIdx.x, p.num_tokens);
  // Layout "token" counts pairs by expert too, for the demand.
  int32_t* row = p.scratch + blockIdx.x * ScratchStride(p.num_experts, p.group.num_ranks);
  int32_t* expert_totals = p.layout == Layout::kExpert ? counts : row + p.group.num_ranks;
  for (int32_t c = threadIdx.x; c < columns; c += kThreads) counts[c] = 0;
  if (p.layout == Layout::kToken) {
    for (int32_t e = threadIdx.x; e < p.num_experts; e += kThreads) expert_totals[e] = 0;
  }
  const int32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const int32_t num_threads = gridDim.x * kThreads;
  for (int32_t c = thread; c < p.capacity; c += num_threads) p.recv_src[c] = plan::kNone;
  if (p.layout == Layout::kToken) {
    const int64_t num_pairs = int64_t{p.capacity} * p.top_k;
    for (int64_t i = thread; i < num_pairs; i += num_threads) p.expert_idx[i] = plan::kNone;
  }
  __syncthreads();
  int32_t num_invalid = 0;
  const int32_t num_entries = (tokens.end - tokens.begin) * p.top_k;
  const int32_t first = tokens.begin * p.top_k;
  for (int32_t i = threadIdx.x; i < num_entries; i += kThreads) {
    const int32_t k = i % p.top_k;
    const int32_t* ids = p.topk_idx + first + i - k;
    const bool valid = IsValid(ids, k, p.num_experts);
    num_invalid += !valid && ids[k] != plan::kNone;
    const int32_t clean = valid ? ids[k] : plan::kNone;
    p.topk[first + i] = clean;
    if (p.shared_topk != p.topk) p.shared_topk[first + i] = clean;
    if (!valid) continue;
    atomicAdd(&expert_totals[ids[k]], 1);
    if (p.layout == Layout::kToken && IsFirstOnRank(ids, k, p)) {
      atomicAdd(&counts[plan::RankOfExpert(ids[k], num_local)], 1);
    }
  }
  __syncthreads();
  for (int32_t c = threadIdx.x; c < columns; c += kThreads) row[c] = counts[c];
  if (num_invalid != 0) atomicAdd(&Own(p.group).num_invalid, num_invalid);
  Channel& own = Own(p.group);
  for (int32_t c = threadIdx.x; c < columns; c += kThreads) {
    if (counts[c] != 0) atomicAdd(&own.own_totals[c], counts[c]);
  }
  if (p.layout == Layout::kToken) {
    for (int32_t e = threadIdx.x; e < p.num_experts; e += kThreads) {
      if (expert_totals[e] != 0) atomicAdd(&own.own_totals[columns + e], expert_totals[e]);
    }
  }
}

// The last block: gives this rank's totals to all ranks. The stores are relaxed, because each word
// has its whole message. All ranks have closed the op that read the totals before.
__device__ void SendTotals(const PlanParams& p, uint64_t epoch, int32_t num_totals) {
  Channel& own = Own(p.group);
  TestDelay(p.group.rank, epoch, 3);
  for (int32_t c = threadIdx.x; c < num_totals; c += kThreads) {
    const int32_t total = __ldcg(&own.own_totals[c]);
    own.own_totals[c] = 0;
    for (int r = 0; r < p.group.num_ranks; ++r) {
      if (TestWithholds(p.group, r, WordKind::kTotal)) continue;
      ptx::StoreRelaxedSystem(&p.group.peers[r]->totals[p.group.rank][c], PackCount(total, epoch));
    }
  }
  if (threadIdx.x == 0) {
    *p.num_invalid = __ldcg(&own.num_invalid);
    own.num_invalid = 0;
  }
}

// Entries of the first `num_ranks` ranks for column c; after WaitInputs.
__device__ int32_t TotalOf(const PlanParams& p, uint64_t epoch, int32_t c, int32_t num_ranks) {
  int32_t total = 0;
#pragma unroll 8
  for (int r = 0; r < num_ranks; ++r) {
    uint64_t word = ptx::LoadRelaxedSystem(&Own(p.group).totals[r][c]);
    // The total was sent together with the flag that was waited for. After a failure it may never
    // arrive.
    for (Deadline deadline;
         kMutation != kWithoutPlanTotals && (word & 0xffffffff) != (epoch & 0xffffffff);) {
      if (!deadline.Continue(p.group, WordKind::kTotal, r, epoch, word)) break;
      word = ptx::LoadRelaxedSystem(&Own(p.group).totals[r][c]);
    }
    total += static_cast<int32_t>(word >> 32);
  }
  return total;
}

// Where the rows of every column begin on its rank, and how many are kept. One warp does a rank,
// whose groups follow each other: see plan::RoomShare.
__device__ void LayOutColumns(const PlanParams& p, uint64_t epoch, const PullMemory& shared) {
  if (p.layout == Layout::kToken) {
    for (int32_t r = threadIdx.x; r < p.group.num_ranks; r += kThreads) {
      shared.starts[r] = 0;
      shared.counts[r] = p.capacity;
    }
    return;
  }
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const int32_t lane = threadIdx.x % 32;
  for (int32_t r = threadIdx.x / 32; r < p.group.num_ranks; r += kThreads / 32) {
    int32_t* const counts = shared.counts + r * num_local;  // first what they want
    for (int32_t l = lane; l < num_local; l += 32) {
      const int32_t demand = TotalOf(p, epoch, r * num_local + l, p.group.num_ranks);
      if (r == p.group.rank && blockIdx.x == 0) p.demand[l] = demand;
      counts[l] = plan::Min(demand, p.expert_capacity);
    }
    __syncwarp();
    const auto size_of = [counts, alignment = p.alignment, capacity = p.capacity](int32_t l) {
      return plan::GroupSize(counts[l], alignment, capacity);
    };
    const plan::RoomShare share = ShareRoom(num_local, p.alignment, p.capacity, size_of);
    int32_t before = 0;
    for (int32_t first = 0; first < num_local; first += 32) {
      const int32_t l = first + lane;
      const int32_t count = l < num_local ? plan::Min(counts[l], share.LimitOf(l, p.alignment)) : 0;
      const int32_t size = plan::RoundUp(count, p.alignment), sum = InclusiveWarpSum(size);
      if (l < num_local) {
        counts[l] = count;
        shared.starts[r * num_local + l] = before + sum - size;
        if (r == p.group.rank && blockIdx.x == 0) {
          p.counts[l] = count;
          p.group_sizes[l] = size;
        }
      }
      before += __shfl_sync(~0u, sum, 31);
    }
  }
}

// Rows of each slot that lie before this block's tokens.
__device__ void CountBefore(const PlanParams& p, uint64_t epoch, const PeerInputs& inputs,
                            const PullMemory& shared) {
  const int32_t stride = ScratchStride(p.num_experts, p.group.num_ranks);
  for (int32_t slot = threadIdx.x; slot < NumSlots(p); slot += kThreads) {
    const auto [source, column] = ColumnOfSlot(p, slot);
    const int32_t* block_totals =
        source == p.group.rank ? p.scratch : inputs.Of<int32_t>(source, 1);
    int32_t counts[kMaxBlocks];  // all loads are in flight at once
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b) {
      counts[b] = b < blockIdx.x ? __ldcg(&block_totals[b * stride + column]) : 0;
    }
    int32_t before = TotalOf(p, epoch, column, source);
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b) before += counts[b];
    shared.before[slot] = before;
  }
}

// Numbers this block's range of the tokens of all ranks: the rows of their entries on this rank
// and, for this rank's own tokens, on every rank. If a peer has failed, ids and counts that are
// read from it may have any value, and this rank may not know of the failure yet. Then rows are
// wrong, but within the bounds.
__device__ void NumberEntries(const PlanParams& p, const PeerInputs& inputs,
                              const PullMemory& shared) {
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const int32_t num_rows = plan::RowsPerSource(p.layout, p.top_k, num_local);
  const int32_t tile_size = TileSize(p);
  const int32_t words = tile_size / 32;
  const TokenRange tokens = TokensOfBlock(blockIdx.x, p.num_tokens);
  for (int32_t tile = tokens.begin; tile < tokens.end; tile += tile_size) {
    const int32_t num_tokens = plan::Min(tile_size, tokens.end - tile);
    const int32_t per_source = num_tokens * p.top_k;
    const int32_t num_entries = per_source * p.group.num_ranks;
    // The slot of an entry, or -1.
    const auto slot_of = [&](int32_t source, int32_t expert) {
      if (static_cast<uint32_t>(expert) >= static_cast<uint32_t>(p.num_experts)) return plan::kNone;
      const int32_t column =
          p.layout == Layout::kExpert ? expert : plan::RankOfExpert(expert, num_local);
      const Columns columns = ColumnsOf(p, source);
      const int32_t nth = column - columns.first;
      return nth >= 0 && nth < columns.count ? columns.first_slot + nth : plan::kNone;
    };
    for (int32_t i = threadIdx.x; i < NumSlots(p) * words; i += kThreads) shared.masks[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < num_entries; i += kThreads) {
      const int32_t source = i / per_source;
      const int32_t* topk = source == p.group.rank ? p.topk : inputs.Of<int32_t>(source, 0);
      shared.entries[i] = __ldcg(&topk[tile * p.top_k + i % per_source]);
    }
    for (int32_t i = threadIdx.x; i < num_entries; i += kThreads) {
      const int32_t slot = slot_of(i / per_source, shared.entries[i]);
      const int32_t t = i % per_source / p.top_k;
      if (slot >= 0) atomicOr(&shared.masks[slot * words + t / 32], 1u << (t % 32));
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_entries; i += kThreads) {
      const int32_t source = i / per_source;
      const int32_t expert = shared.entries[i];
      const int32_t slot = slot_of(source, expert);
      const int32_t t = i % per_source / p.top_k;
      const int32_t k = i % p.top_k;
      int32_t row = plan::kNone;
      bool is_here = false;
      if (slot >= 0) {
        const uint32_t* mask = shared.masks + slot * words;
        int32_t position = shared.before[slot];
        for (int32_t w = 0; w < t / 32; ++w) position += __popc(mask[w]);
        position += __popc(mask[t / 32] & ((1u << (t % 32)) - 1));
        const int32_t rank = plan::RankOfExpert(expert, num_local);
        const int32_t column = p.layout == Layout::kExpert ? expert : rank;
        if (position >= 0) {
          row = plan::ExpertRow(shared.starts[column], shared.counts[column], position);
        }
        is_here = rank == p.group.rank && row != plan::kNone;
      }
      if (source == p.group.rank) p.dest_row[tile * p.top_k + i % per_source] = row;
      shared.entries[i] = is_here ? row : plan::kNone;
      if (!is_here) continue;
      p.recv_src[row] = plan::EncodeSource(p.layout, {source, tile + t, k}, p.num_tokens, p.top_k);
      if (p.layout == Layout::kToken) {
        const int32_t local = plan::LocalExpert(expert, num_local);
        p.expert_idx[int64_t{row} * p.top_k + k] = local;
        atomicAdd(&shared.kept[local], 1);
      }
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_tokens * p.group.num_ranks; i += kThreads) {
      const int32_t source = i / num_tokens;
      const int32_t t = i % num_tokens;
      int32_t* out = p.recv_rows + (int64_t{source} * p.num_tokens + tile + t) * num_rows;
      const int32_t* rows = shared.entries + i * p.top_k;
      int32_t last_row = plan::kNone;
      for (int32_t m = 0; m < num_rows; ++m) {
        int32_t next = INT32_MAX;
        for (int32_t k = 0; k < p.top_k; ++k) {
          if (rows[k] > last_row && rows[k] < next) next = rows[k];
        }
        last_row = next;
        out[m] = next == INT32_MAX ? plan::kNone : next;
      }
    }
    for (int32_t slot = threadIdx.x; slot < NumSlots(p); slot += kThreads) {
      for (int32_t w = 0; w < words; ++w) {
        shared.before[slot] += __popc(shared.masks[slot * words + w]);
      }
    }
    __syncthreads();
  }
}

// Once all ranks have arrived: the rows of this block's entries.
__device__ void Number(const PlanParams& p, uint64_t epoch, const PeerInputs& inputs,
                       const PullMemory& shared, int32_t columns) {
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  for (int32_t l = threadIdx.x; l < num_local; l += kThreads) shared.kept[l] = 0;
  CountBefore(p, epoch, inputs, shared);
  LayOutColumns(p, epoch, shared);
  __syncthreads();
  NumberEntries(p, inputs, shared);
  if (p.layout == Layout::kToken) {
    int32_t* row = p.scratch + blockIdx.x * ScratchStride(p.num_experts, p.group.num_ranks);
    int32_t* kept = row + p.group.num_ranks;  // no peer reads this part
    for (int32_t l = threadIdx.x; l < num_local; l += kThreads) {
      kept[l] = shared.kept[l];
      if (blockIdx.x != 0) continue;
      p.demand[l] = TotalOf(p, epoch, columns + p.group.rank * num_local + l, p.group.num_ranks);
    }
  }
}

// The op's first kernel.
__global__ void __launch_bounds__(kThreads) CountKernel(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) int32_t counts[];
  const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  const int32_t num_totals = p.layout == Layout::kExpert ? columns : columns + p.num_experts;
  const OpNumbers op = BeginOp(p.group);
  CountEntries(p, counts, columns);
  bool failed;  // not marked in this count
  if (IsLastBlock(&Own(p.group).blocks_arrived, failed)) {
    Publish(p.group, op, {p.shared_topk, p.scratch, nullptr});
    SendTotals(p, op.epoch, num_totals);
  }
}

// The second one.
__global__ void __launch_bounds__(kThreads, 1) NumberKernel(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) int32_t memory[];
  const PullMemory shared(p, memory);
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  const OpNumbers op = NumbersOfOp(p.group);
  __shared__ PeerInputs inputs;
  const bool ok = WaitInputs(p.group, op, inputs);
  if (ok) Number(p, op.epoch, inputs, shared, columns);
  const auto finish = [&] {
    // The counts of the whole rank. From now on peers may overwrite what they sent.
    const int32_t stride = ScratchStride(p.num_experts, p.group.num_ranks);
    if (p.layout == Layout::kToken) {
      for (int32_t l = threadIdx.x; l < num_local; l += kThreads) {
        int32_t count = 0;
        for (int32_t b = 0; b < gridDim.x; ++b) {
          count += __ldcg(&p.scratch[b * stride + p.group.num_ranks + l]);
        }
        p.counts[l] = p.group_sizes[l] = count;
      }
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    int32_t dropped = 0;
    for (int32_t l = threadIdx.x; l < num_local; l += 32) {
      dropped += __ldcg(&p.demand[l]) - __ldcg(&p.counts[l]);
    }
    for (int offset = 16; offset > 0; offset /= 2)
      dropped += __shfl_down_sync(~0u, dropped, offset);
    if (threadIdx.x == 0) *p.num_dropped = dropped;
  };
  const auto poison = [&] { Poison(p, threadIdx.x, kThreads); };
  EndOp(p.group, op.epoch, finish, poison);
}

int NumBlocks(const PlanParams& p) {
  const int most = p.max_blocks > 0 ? std::min(p.max_blocks, kMaxBlocks) : kMaxBlocks;
  return std::clamp((p.num_tokens + kMaxTile - 1) / kMaxTile, 1, most);
}

}  // namespace

int64_t PullPlanScratchSize(int32_t num_experts, int32_t num_ranks) {
  return int64_t{kMaxBlocks} * ScratchStride(num_experts, num_ranks);
}

bool FitsPullPlan(const PlanParams& params) { return SharedBytes(params) <= kMaxPullBytes; }

cudaError_t LoadPullPlan() {
  cudaFuncAttributes attributes;  // asking for them loads the kernel
  const cudaError_t error = cudaFuncGetAttributes(&attributes, CountKernel);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(NumberKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kMaxPullBytes);
}

cudaError_t LaunchPullPlan(const PlanParams& params, cudaStream_t stream) {
  const int num_blocks = NumBlocks(params);
  const int32_t columns = NumColumns(params.layout, params.num_experts, params.group.num_ranks);
  CountKernel<<<num_blocks, kThreads, columns * sizeof(int32_t), stream>>>(params);
  NumberKernel<<<num_blocks, kThreads, SharedBytes(params), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
