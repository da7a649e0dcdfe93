// The dispatch op: every rank reads the rows that it needs, each once over the link, and writes
// each row to all of its places.
//
// In a block, *movers* are warps that copy rows by bulk copies through a ring of stages in shared
// memory: while some loads are in flight, finished ones are stored. In between they clear unused
// rows. They spread this over the whole op, because the links would be idle while they cleared all
// rows at once. The other warps are *helpers*, which bring weights and scales. Where rows of float8
// become dense, the movers are those of dense_mover.cuh.

#include <algorithm>

#include "cuda/core/behind_plan.cuh"
#include "cuda/core/launch.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/node/await_cast.cuh"
#include "cuda/node/dense_mover.cuh"
#include "cuda/node/dispatch.h"
#include "cuda/node/stages.cuh"
#include "cuda/plan/plan.h"
#include "cuda/rows/clear.cuh"
#include "cuda/rows/sources.cuh"
#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

// Loads ahead of the stores, where a row is stored once and where it may be stored many times.
constexpr int kFewStores = 3;
constexpr int kManyStores = 2;
// How many items before the current one may have stores that still read their stages. More would
// only lengthen the queue when the work ends, for which other SMs wait.
constexpr int kStoring = 1;
static_assert(kManyStores + kStoring <= kStages && kFewStores + kStoring <= kStages);
constexpr int kMaxMovers = 8;
// Each takes kDenseLoads of the kMaxMovers * kStages barriers.
constexpr int kMaxDenseMovers = kMaxMovers * std::min(kStages, kDenseLoads) / kDenseLoads;
constexpr int kHelpers = 4;              // warps
constexpr int kStagesBytes = 200 << 10;  // of shared memory, for the stages of all movers

__host__ __device__ int32_t NumMovers(const DispatchParams& p) {
  return plan::Min(kStagesBytes / (kStages * StageBytes(p)), kMaxMovers);
}

__host__ __device__ int32_t NumDenseMovers(const DispatchParams& p) {
  return plan::Min(kStagesBytes / DenseRoom(p).bytes, kMaxDenseMovers);
}

// Shared memory of a block.
constexpr int kBarriersAt = kZeroBytes;
constexpr int kInputsAt = kBarriersAt + kMaxMovers * kStages * static_cast<int>(sizeof(uint64_t));
constexpr int kSeenAt = kInputsAt + static_cast<int>(sizeof(PeerInputs));
constexpr int kSeenWords = (1 + kMaxMovers + kHelpers) * kMaxRanks;
constexpr int kStagesAt = kSeenAt + kSeenWords * static_cast<int>(sizeof(uint32_t));
static_assert(kStagesAt % 128 == 0, "bulk copies want aligned stages");

struct DispatchMemory {
  char* zeros;         // [kZeroBytes]
  uint64_t* barriers;  // [kMaxMovers, kStages], or [kMaxDenseMovers, kDenseLoads]
  PeerInputs* inputs;  // x, scales, weights
  uint32_t* seen;      // [1 + warps, kMaxRanks], of chunks that are cast (WaitCast)
  char* stages;        // [movers, kStages, StageBytes()], or [movers, DenseRoom.bytes]
  __device__ explicit DispatchMemory(char* memory)
      : zeros(memory),
        barriers(reinterpret_cast<uint64_t*>(memory + kBarriersAt)),
        inputs(reinterpret_cast<PeerInputs*>(memory + kInputsAt)),
        seen(reinterpret_cast<uint32_t*>(memory + kSeenAt)),
        stages(memory + kStagesAt) {}
};

size_t SharedBytes(const DispatchParams& p) {
  if (p.dense) return kStagesAt + static_cast<size_t>(NumDenseMovers(p)) * DenseRoom(p).bytes;
  return kStagesAt + static_cast<size_t>(kStages) * NumMovers(p) * StageBytes(p);
}

// Starts to load a mover's first rows while the plan runs, and returns their number. Only the plan
// tells whether this rank has rows of their sources, but with as many experts for each token as
// there are ranks, most have some. Else a row is loaded in vain, over a link that is idle.
template <int kAhead>
__device__ int32_t LoadEarly(const DispatchParams& p, OpNumbers op, const PeerInputs& inputs,
                             int32_t warp, int32_t num_warps, const Stages& stages) {
  if (ChunksOf(p.row_bytes).count != 1) return 0;
  const SourceQueue<DispatchParams> sources(p, warp, num_warps, false);
  const auto batch = sources.BatchOf(warp);
  const int32_t count = plan::Min(kAhead, max(batch.size, 0));
  for (int s = 0; s < count && threadIdx.x % 32 == 0; ++s) {
    const int32_t source = NthSource(p, batch.first + s);
    stages.Load<false>(p, op, nullptr, inputs, s, source, 0, p.row_bytes);
  }
  __syncwarp();
  return count;
}

// One mover. Loads run up to kAhead items ahead of the stores. The other stages hold items whose
// stores still read them. LoadEarly has begun the first `num_early` items.
template <int kAhead, bool kCast>
__device__ void MoveRows(const DispatchParams& p, OpNumbers op, uint32_t* seen,
                         const PeerInputs& inputs, int32_t warp, int32_t num_warps,
                         const char* zeros, const Stages& stages, int32_t num_early) {
  const int32_t lane = threadIdx.x % 32;
  const Chunks chunks = ChunksOf(p.row_bytes);
  RowClearer<DispatchParams> clearer(p, zeros, warp, num_warps);
  SourceQueue<DispatchParams> sources(p, warp, num_warps, true, num_early);
  typename SourceQueue<DispatchParams>::Entry source{};
  int32_t load_chunk = chunks.count;
  int32_t row_of_stage[kStages];
  int32_t offset_of_stage[kStages];
  bool more = true;
  // Starts the next load into `stage`; sets `more` to false when there is none.
  const auto load = [&](int stage, int32_t& row, int32_t& offset) {
    if (!more) return;
    if (load_chunk == chunks.count) {
      source = sources.Next();
      load_chunk = 0;
      more = source.source != plan::kNone;
      if (!more) return;
    }
    row = source.row;
    offset = load_chunk * chunks.bytes;
    ++load_chunk;
    if (lane == 0) {
      const int32_t bytes = plan::Min(chunks.bytes, p.row_bytes - offset);
      stages.Load<kCast>(p, op, seen, inputs, stage, source.source, offset, bytes);
    }
  };
  int32_t num_loaded = 0;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < num_early) {
      row_of_stage[s] = RowOfLane(p, NthSource(p, sources.BatchOf(warp).first + s));
      offset_of_stage[s] = 0;
      ++num_loaded;
      continue;
    }
    load(s, row_of_stage[s], offset_of_stage[s]);
    num_loaded += more;
  }
  for (int32_t item = 0; item < num_loaded;) {
    const uint32_t parity = (item / kStages) & 1;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (item >= num_loaded) break;
      stages.Wait(s, parity);
      const int32_t row = row_of_stage[s];
      if (row >= 0) {
        const int32_t bytes = plan::Min(chunks.bytes, p.row_bytes - offset_of_stage[s]);
        char* target = static_cast<char*>(p.rows) + row * p.row_stride + offset_of_stage[s];
        ptx::BulkStore(target, stages.At(s), bytes);
        if (stages.scale_bytes != 0 && offset_of_stage[s] + bytes == p.row_bytes) {
          ptx::BulkStore(reinterpret_cast<char*>(p.row_scales) + int64_t{row} * stages.scale_bytes,
                         stages.At(s) + stages.scale_offset, stages.scale_bytes);
        }
      }
      ++item;
      clearer.Advance(source.n, sources.num_sources());
      ptx::CommitBulkGroup();
      // The next load takes the stage of an earlier item, whose stores must have read it.
      ptx::WaitBulkGroupRead<kStoring>();
      __syncwarp();
      const int next = (s + kAhead) % kStages;
      load(next, row_of_stage[next], offset_of_stage[next]);
      num_loaded += more;
    }
  }
  clearer.Advance(1, 1);
  ptx::CommitBulkGroup();
  ptx::WaitBulkGroups();
}

// Helpers: the weight of each row.
__device__ void BringWeights(const DispatchParams& p, const PeerInputs& inputs, int32_t thread,
                             int32_t num_threads) {
  const bool by_pair = p.layout == Layout::kToken;
  const int64_t count = int64_t{p.capacity} * (by_pair ? p.top_k : 1);
  const int32_t num_sources = plan::NumSources(p.layout, p.group.num_ranks, p.num_tokens, p.top_k);
  for (int64_t i = thread; i < count; i += num_threads) {
    const int32_t encoded = p.recv_src[by_pair ? i / p.top_k : i];
    float weight = 0.0f;
    if (encoded >= 0 && encoded < num_sources && (!by_pair || p.expert_idx[i] >= 0)) {
      const plan::Source source = plan::DecodeSource(p.layout, encoded, p.num_tokens, p.top_k);
      const int32_t k = by_pair ? static_cast<int32_t>(i % p.top_k) : source.k;
      const float* weights = inputs.Of<float>(source.rank, 2);
      weight = __ldcg(&weights[int64_t{source.token} * p.top_k + k]);
    }
    p.row_weights[i] = weight;
  }
}

// Helpers: the scales of the sources of one warp, several sources at a time to hide the link's
// latency.
template <bool kCast>
__device__ void BringScales(const DispatchParams& p, OpNumbers op, uint32_t* seen,
                            const PeerInputs& inputs, int32_t warp, int32_t num_warps) {
  constexpr int kAtOnce = 4;
  const int32_t lane = threadIdx.x % 32;
  SourceIterator<DispatchParams> sources(p, warp, num_warps);
  for (bool more = true; more;) {
    int32_t batch[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      batch[i] = more ? sources.Next() : plan::kNone;
      more = more && batch[i] != plan::kNone;
      if (kCast && more) {
        if (lane == 0) WaitCast(p, op, seen, batch[i] / p.num_tokens, batch[i] % p.num_tokens);
        __syncwarp();
      }
    }
    for (int32_t j0 = 0; j0 < p.scales_per_row; j0 += 32) {
      const int32_t j = j0 + lane;
      float scale[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (batch[i] < 0 || j >= p.scales_per_row) continue;
        const float* scales = inputs.Of<float>(batch[i] / p.num_tokens, 1);
        scale[i] = __ldcg(&scales[int64_t{batch[i] % p.num_tokens} * p.scales_per_row + j]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (batch[i] < 0 || j >= p.scales_per_row) continue;
        for (int32_t m = 0; m < p.num_rows; ++m) {
          const int32_t row = p.recv_rows[int64_t{batch[i]} * p.num_rows + m];
          if (row < 0 || row >= p.capacity) break;
          p.row_scales[int64_t{row} * p.scales_per_row + j] = scale[i];
        }
      }
    }
  }
}

// Helpers: zeros for the scales of rows that have no source.
__device__ void ClearUnusedScales(const DispatchParams& p, int32_t warp, int32_t num_warps) {
  ForEachUnused(p.recv_src, p.capacity, warp, num_warps, [&](int64_t row) {
    for (int32_t j = threadIdx.x % 32; j < p.scales_per_row; j += 32) {
      p.row_scales[row * p.scales_per_row + j] = 0.0f;
    }
  });
}

// The result of a failed dispatch: NaN in every row.
template <bool kDense>
__device__ void Poison(const DispatchParams& p) {
  const auto words_per_row = static_cast<int32_t>((kDense ? p.row_stride : p.row_bytes) / 16);
  for (int64_t row = 0; row < p.capacity; ++row) {
    uint4* words = reinterpret_cast<uint4*>(static_cast<char*>(p.rows) + row * p.row_stride);
    for (int32_t i = threadIdx.x; i < words_per_row; i += blockDim.x) {
      words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
  const int32_t scales_per_row = kDense ? 0 : p.scales_per_row;
  for (int64_t i = threadIdx.x; i < int64_t{p.capacity} * scales_per_row; i += blockDim.x) {
    p.row_scales[i] = __uint_as_float(~0u);
  }
  if (p.row_weights == nullptr) return;
  const int64_t num_weights = int64_t{p.capacity} * (p.layout == Layout::kToken ? p.top_k : 1);
  for (int64_t i = threadIdx.x; i < num_weights; i += blockDim.x) {
    p.row_weights[i] = __uint_as_float(~0u);
  }
}

template <int kAhead, bool kCast, bool kDense>
__global__ void __launch_bounds__((kMaxMovers + kHelpers) * 32)
    DispatchKernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) char memory[];
  const DispatchMemory shared(memory);
  const OpNumbers op = p.behind_plan ? BeginBehindPlan(p.group) : BeginOp(p.group);
  // All blocks wait for that, so that one whose peer does not come blames this peer, and not this
  // rank, which does not publish then.
  const bool begun = !p.behind_plan || WaitPlansBegun(p.group, op.epoch, p.plan_tag);
  if (blockIdx.x == 0 && begun) {
    Publish(p.group, op, {p.row_bytes > 0 ? p.x : nullptr, p.scales, p.weights});
  }
  for (int32_t i = threadIdx.x; i < kZeroBytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(shared.zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; kCast && i < kSeenWords; i += blockDim.x) shared.seen[i] = 0;
  ptx::FenceProxyAsyncShared();
  bool ok = WaitInputs(p.group, op, *shared.inputs);  // and the zeros are there
  const int32_t warp = threadIdx.x / 32;
  const int32_t num_movers = kDense ? NumDenseMovers(p) : NumMovers(p);
  const bool moves = warp < num_movers && p.row_bytes > 0;
  const int32_t mover = warp * gridDim.x + blockIdx.x, all_movers = num_movers * gridDim.x;
  const Stages stages(p, shared.stages + static_cast<int64_t>(warp) * kStages * StageBytes(p),
                      shared.barriers + warp * kStages);
  int32_t num_early = 0;
  if (!kDense && moves) {
    stages.Begin();
    if (!kCast && p.behind_plan && ok) {
      num_early = LoadEarly<kAhead>(p, op, *shared.inputs, mover, all_movers, stages);
    }
  }
  if (p.behind_plan) ok = WaitPlanWritten(p.group, kPushPlanBlocks) && ok;
  if (!ok) {
    for (int s = 0; s < num_early; ++s) stages.Wait(s, 0);  // none may be under way at the end
  } else if (moves) {
    if constexpr (kDense) {
      MoveDenseRows(p, op, shared.seen, *shared.inputs, mover, all_movers, shared.zeros,
                    shared.stages + static_cast<int64_t>(warp) * DenseRoom(p).bytes,
                    shared.barriers + warp * kDenseLoads);
    } else {
      MoveRows<kAhead, kCast>(p, op, shared.seen, *shared.inputs, mover, all_movers, shared.zeros,
                              stages, num_early);
    }
  } else if (warp >= num_movers) {
    const int32_t helper = (warp - num_movers) * gridDim.x + blockIdx.x;
    const int32_t num_helpers = kHelpers * gridDim.x;
    const int32_t thread = helper * 32 + threadIdx.x % 32;
    if (!kDense && p.scales_per_row != 0 && BulkScaleBytes(p) == 0)
      BringScales<kCast>(p, op, shared.seen, *shared.inputs, helper, num_helpers);
    if (p.weights != nullptr) BringWeights(p, *shared.inputs, thread, num_helpers * 32);
    if (!kDense && p.scales_per_row != 0) ClearUnusedScales(p, helper, num_helpers);
  }
  if (p.behind_plan || kCast) ptx::WaitForPrevious();
  EndOp(p.group, op.epoch, [&] { Poison<kDense>(p); });
}

}  // namespace

cudaError_t LoadDispatch() {
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const auto kernel :
       {&DispatchKernel<kFewStores, false, false>, &DispatchKernel<kManyStores, false, false>,
        &DispatchKernel<kFewStores, true, false>, &DispatchKernel<kManyStores, true, false>,
        &DispatchKernel<kDenseLoads, true, true>}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, kAttribute, 220 << 10);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool FitsDispatch(const DispatchParams& params) {
  return (params.dense ? NumDenseMovers(params) : NumMovers(params)) > 0;
}

cudaError_t LaunchDispatch(const DispatchParams& params, cudaStream_t stream) {
  const int num_movers = params.dense ? NumDenseMovers(params) : NumMovers(params);
  const int num_threads = (num_movers + kHelpers) * 32;
  const bool few = params.layout == Layout::kToken;
  const auto kernel = params.dense         ? DispatchKernel<kDenseLoads, true, true>
                      : params.behind_cast ? (few ? DispatchKernel<kFewStores, true, false>
                                                  : DispatchKernel<kManyStores, true, false>)
                                           : (few ? DispatchKernel<kFewStores, false, false>
                                                  : DispatchKernel<kManyStores, false, false>);
  if (params.behind_plan || params.behind_cast) {
    return LaunchBehind<DispatchParams>(kernel, params.num_blocks, num_threads, SharedBytes(params),
                                        stream, params);
  }
  kernel<<<params.num_blocks, num_threads, SharedBytes(params), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
