// The plan op: gives every (token, k) entry its row, in one kernel of one cluster of blocks.
//
// Each block has a chunk of the tokens, and each token has some lanes of a warp. Blocks send all
// ranks (also their own) the number of entries of each column in the chunk, and send peers the ids
// of each token's experts there. So every block knows what comes before its chunk on every rank,
// and numbers the chunk's entries of all ranks. It has a bit mask of tokens for each column, so the
// position of an entry is the number of bits before it. In layout "expert", entries with rows here
// are listed by column in shared memory, so that neighbouring results are written together. Most of
// that is done before the counts arrive. Each row is written once: by the thread that has its
// entry, or as unused.
//
// Messages go to the peer's inbox. A word has 32 bits of the epoch beside its data, so a reader
// that finds the epoch has the data. So nothing is fenced, nothing is read over a link, and no rank
// waits at the end until its peers have read. A word is not overwritten before it is read, for
// these reasons:
//   * There are two inboxes and two sets of arrival flags, for even and odd epochs. A rank writes
//     those of epoch e + 2 after its op of epoch e + 1 has ended. That op, of any kind, ended only
//     after all ranks had arrived at it, and so after their ops of epoch e had ended. The arrival
//     flag here need not release anything, because the loads of a kernel that has ended have their
//     values, which no later store changes.
//   * All else that peers write to belongs to ops that end only once all ranks read no more.
// A word is not taken for a newer one either. For that, it would have to stay for exactly 2^32 ops
// without a plan that overwrites it, which is over 10 hours of nothing but ops of the group. A rank
// at another op sends its arrival flag with another tag. That is noticed before its messages are
// used for more than shared memory.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/core/behind_plan.cuh"
#include "cuda/core/clock_stamps.cuh"
#include "cuda/plan/counts.cuh"
#include "cuda/plan/tokens.cuh"

namespace jax_ep::cuda {
namespace {

// Loops are not unrolled where that gains nothing, because each launch must fetch its code.

// Sets words from `begin` to `end` to -1, all threads of all blocks together.
__device__ __noinline__ void FillNone(int32_t* words, int64_t begin, int64_t end, bool aligned) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = begin / 4 * 4 + 4 * thread; i < end; i += 4 * kBlocks * kThreads) {
    if (aligned && i >= begin && i + 4 <= end) {
      *reinterpret_cast<int4*>(words + i) =
          make_int4(plan::kNone, plan::kNone, plan::kNone, plan::kNone);
      continue;
    }
#pragma unroll 1
    for (int64_t j = i; j < i + 4; ++j) {
      if (j >= begin && j < end) words[j] = plan::kNone;
    }
  }
}

// Rows without an entry: in layout "expert" those after each group's last row, in layout "token"
// those after all others.
template <typename Params>
__device__ void FillUnusedRows(const Params& params, const PushMemory& shared) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  if (Params::kLayout == Layout::kToken) {
    const int32_t used = plan::Min(shared.demand[p.group.rank], p.capacity);
    FillNone(p.recv_src, used, p.capacity, params.aligned);
    FillNone(p.expert_idx, int64_t{used} * p.top_k, int64_t{p.capacity} * p.top_k, params.aligned);
    return;
  }
  const int32_t first = p.group.rank * n.num_local, last = first + n.num_local - 1;
#pragma unroll 1
  for (int32_t column = first + threadIdx.x / 32 * kBlocks + blockIdx.x; column < last;
       column += kWarps * kBlocks) {
    const int32_t end = shared.starts[column + 1];
#pragma unroll 1
    for (int32_t row = shared.rows[column].limit + threadIdx.x % 32; row < end; row += 32) {
      p.recv_src[row] = plan::kNone;
    }
  }
  FillNone(p.recv_src, shared.rows[last].limit, p.capacity, params.aligned);
}

// Layout "expert": writes the sources of the rows of the batch's slots. Half of a warp does a slot.
__device__ void WriteListedRows(const PushParams& params, const PushMemory& shared, Batch batch) {
  constexpr int kLanesOfSlot = 16;
  constexpr int kAtOnce = 2;  // loads side by side
#pragma unroll 1
  for (int32_t i = threadIdx.x / kLanesOfSlot; i < batch.count * params.shape.here;
       i += kThreads / kLanesOfSlot) {
    const SlotRows slot = shared.slots[i];
    const uint16_t* list = shared.list + slot.place;
    int32_t* to = params.plan.recv_src + slot.rows.first;
    const int32_t count = slot.rows.limit - slot.rows.first;
#pragma unroll 1
    for (int32_t j = threadIdx.x % kLanesOfSlot; j < count; j += kAtOnce * kLanesOfSlot) {
      const int32_t next = j + kLanesOfSlot;
      const int32_t entry = list[j];
      const int32_t next_entry = next < count ? list[next] : 0;
      to[j] = slot.source + entry;
      if (next < count) to[next] = slot.source + next_entry;
    }
  }
}

// Layout "token", if tokens were dropped: the first block writes the number of kept pairs.
__device__ void WriteKept(const PushParams& params, const PushMemory& shared) {
  const PlanParams& p = params.plan;
  int32_t dropped = 0;
#pragma unroll 1
  for (int32_t l = threadIdx.x; l < params.shape.num_local; l += kThreads) {
    const int32_t kept = shared.kept[l];
    dropped += p.demand[l] - kept;  // written by this thread
    p.counts[l] = p.group_sizes[l] = kept;
  }
  if (dropped != 0) atomicAdd(p.num_dropped, dropped);
}

template <int kMaxK, int kIdBits, Layout kLayout>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    PushPlanKernel(const __grid_constant__ LayoutParams<kLayout> params) {
  extern __shared__ __align__(16) int32_t memory[];
  __shared__ uint32_t failed;  // any block of the cluster
  __shared__ int32_t num_listed;
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  const PushMemory shared(n, memory);
  const int32_t begin = plan::Min(blockIdx.x * n.chunk, p.num_tokens);
  const Chunk chunk{begin, plan::Min(n.chunk, p.num_tokens - begin)};
  constexpr bool by_token = kLayout == Layout::kToken;
  const uint64_t launched = StampTime(p.group);

  int32_t ids[kIdsOfLane];  // on their way while the epoch comes
  LoadFirstIds<kMaxK>(params, chunk, ids);
  const uint64_t epoch = BeginOp(p.group).epoch;
  StampClockAt(p.group, epoch, 0, launched);
  // Another kernel, such as one of XLA, which may be launched in this way too, would take SMs from
  // the plans of ranks that share this GPU, and hold them until this plan ends.
  if (p.is_followed) ptx::LetNextBegin();
  // The memory that other blocks write to is ready once all have passed the second half. The warp
  // that prepares it has nothing else to wait for yet.
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) failed = 0;
    if (by_token) {
#pragma unroll 1
      for (int32_t l = threadIdx.x; l < n.num_local; l += 32) shared.kept[l] = 0;
    }
    ptx::ClusterArriveRelease();
  } else {
    ptx::ClusterArriveRelaxed();
  }
  ClearCells(n, shared.cells, n.columns);
  if (n.apart) ClearCells(n, shared.peer_cells, NumPeerSlots(n, Batch{0, n.sources}));
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < 4 * n.quads; i += kThreads) shared.sent[i] = 0;
  if (threadIdx.x == 0) num_listed = 0;
  const int32_t from_end = kThreads - 1 - static_cast<int32_t>(threadIdx.x);
  if (blockIdx.x == 0 && from_end < p.group.num_ranks) {
    ptx::StoreRelaxedSystem(&p.group.peers[from_end]->arrival[epoch % 2][p.group.rank].value,
                            FlagValue(epoch, p.group.tag));
  }
  __syncthreads();
  StampClock(p.group, epoch, 1);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.num_dropped = 0;
  TestDelay(p.group.rank, epoch, 0);
  CleanTokens<kMaxK, kIdBits>(params, shared, epoch, chunk, ids);
  __syncthreads();
  StampClock(p.group, epoch, 2);
  SumCells<kLayout>(n, shared.cells, n.columns, [&](int32_t column, int32_t total) {
    const bool is_first = threadIdx.x % kLanesOfColumn<kLayout> == 0;
    if (is_first && column < n.columns) shared.sent[column] = total;
    if (by_token) return;
    const int32_t slot = column - p.group.rank * n.here;
    const bool is_here = static_cast<uint32_t>(slot) < static_cast<uint32_t>(n.here);
    const int32_t place = PlaceInList(is_here ? total : 0, &num_listed);
    if (is_first && is_here) shared.lists[slot] = {place, total};
  });
  __syncthreads();
  SendCounts(params, shared, epoch);
  StampClock(p.group, epoch, 3);

  bool ok = true, drops = false;
  for (int first = 0; first < p.group.num_ranks; first += n.sources) {
    const Batch batch{first, plan::Min(n.sources, p.group.num_ranks - first)};
    const int32_t num_slots = NumPeerSlots(n, batch);
    IncomingIds<kMaxK, kIdBits, LayoutParams<kLayout>> incoming(params, epoch, chunk, batch);
    IncomingCounts counts;
    if (first == 0) PlaceOwnEntries<kMaxK>(params, shared, chunk);
    StampClock(p.group, epoch, 4);
    if (num_slots != 0) {
      if (first != 0 || !n.apart) {
        __syncthreads();
        ClearCells(n, shared.peer_cells, num_slots);
        if (threadIdx.x == 0 && first != 0) num_listed = 0;
        __syncthreads();
      }
      ok = incoming.Take(shared) && ok;
      __syncthreads();
      StampClock(p.group, epoch, 5);
    }
    // By a warp with the least to do now.
    if (first == 0 && from_end < p.group.num_ranks) {
      const Flag& flag = Own(p.group).arrival[epoch % 2][from_end];
      // Long enough for a peer's next two ops to begin, where nothing else keeps it from that.
      for (uint32_t i = 0; i < (kMutation == kWithoutPlansBegun ? 40 : 1); ++i) {
        TestDelay(p.group.rank, epoch, 2 + i);
      }
      ok = WaitFlag(p.group, flag.value, epoch, WordKind::kArrivalFlag, from_end) && ok;
    }
    if (num_slots != 0) {
      SumCells<kLayout>(n, shared.peer_cells, num_slots, [&](int32_t slot, int32_t total) {
        if (by_token) return;
        const int32_t place = PlaceInList(total, &num_listed);
        if (threadIdx.x % kLanesOfColumn<kLayout> == 0 && slot < num_slots) {
          shared.lists[batch.NumOwn() * n.here + slot] = {place, total};
        }
      });
      __syncthreads();
      StampClock(p.group, epoch, 6);
    }
    if (first == 0) counts.Load(params, epoch);
    if (num_slots != 0 && !by_token) {
      ListPeerEntries<kMaxK, kIdBits>(params, shared, chunk, batch);
    }
    StampClock(p.group, epoch, 7);
    if (first == 0) {
      ok = counts.Take(params, shared, epoch) && ok;
      StampClock(p.group, epoch, 8);
      // A rank that failed earlier has told so before it arrived, because it had passed Fail's
      // fence by then.
      if (from_end < p.group.num_ranks) ok = ok && !HasFailed(p.group, epoch);
      TestDelay(p.group.rank, epoch, 1);
    }
    ok = __syncthreads_and(ok);
    if (!ok) break;
    StampClock(p.group, epoch, 9);
    if (first == 0) SumColumns(params, shared);
    SumSlots(params, shared, batch);
    if (first == 0) {
      __syncthreads();
      if (by_token) {
        drops = shared.demand[p.group.rank] > p.capacity;
        if (blockIdx.x == 0) WriteDemand(params, shared);
      } else {
        LayOutExpertRows(params, shared);
        __syncthreads();
      }
    }
    StampClock(p.group, epoch, 10);
    if (!by_token) LayOutSlots(params, shared, chunk, batch);
    if (first == 0) WriteOwnRows<kMaxK>(params, shared, chunk);
    StampClock(p.group, epoch, 11);
    if (!by_token || first != 0) __syncthreads();
    if (by_token) {
      WriteTokenRows<kMaxK, kIdBits>(params, shared, chunk, batch, drops);
    } else {
      WriteListedRows(params, shared, batch);
      StampClock(p.group, epoch, 12);
      WriteRecvRows<kMaxK, kIdBits>(params, shared, chunk, batch);
    }
    StampClock(p.group, epoch, 13);
  }

  if (ok) FillUnusedRows(params, shared);
  if (ok && p.is_followed) TellPlanWritten(p.group);
  if (drops) __syncthreads();  // all is counted
  ptx::ClusterWaitAcquire();
  if (!ok && threadIdx.x < kBlocks) *ptx::MapShared(&failed, threadIdx.x) = 1;
  if (drops && blockIdx.x != 0) {
#pragma unroll 1
    for (int32_t l = threadIdx.x; l < n.num_local; l += kThreads) {
      if (shared.kept[l] != 0) atomicAdd(ptx::MapShared(&shared.kept[l], 0), shared.kept[l]);
    }
  }
  // Only messages to other blocks must be visible before the kernel ends; rows need not.
  if (!ok || drops) {
    ptx::ClusterArriveRelease();
  } else {
    ptx::ClusterArriveRelaxed();
  }
  ptx::ClusterWaitAcquire();
  if (failed != 0) {
    ptx::ClusterArriveRelease();  // over the rows of all blocks
    ptx::ClusterWaitAcquire();
    Poison(p, blockIdx.x * kThreads + threadIdx.x, kBlocks * kThreads);
    FillNone(p.recv_src, 0, p.capacity, params.aligned);
    if (by_token) FillNone(p.expert_idx, 0, int64_t{p.capacity} * p.top_k, params.aligned);
  }
  if (!ok && p.is_followed) TellPlanWritten(p.group);
  if (blockIdx.x != 0) return;
  if (drops && failed == 0) WriteKept(params, shared);
  StampClock(p.group, epoch, 14);
  if (threadIdx.x == 0 && !p.is_followed) EndOpAtOnce(p.group, epoch);
}

template <Layout kLayout>
using Kernel = void (*)(LayoutParams<kLayout>);

template <Layout kLayout>
Kernel<kLayout> KernelFor(const PlanParams& p, const PushShape& n) {
  if (MaxTopK(p) == 32) return PushPlanKernel<32, 16, kLayout>;
  return n.id_bits == 8 ? PushPlanKernel<8, 8, kLayout> : PushPlanKernel<8, 16, kLayout>;
}

template <Layout kLayout>
cudaError_t Load() {
  for (const Kernel<kLayout> kernel :
       {&PushPlanKernel<8, 8, kLayout>, &PushPlanKernel<8, 16, kLayout>,
        &PushPlanKernel<32, 16, kLayout>}) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxPushBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <Layout kLayout>
cudaError_t Launch(const PushParams& params, cudaStream_t stream) {
  const Kernel<kLayout> kernel = KernelFor<kLayout>(params.plan, params.shape);
  kernel<<<kBlocks, kThreads, params.shape.end * sizeof(int32_t), stream>>>(
      LayoutParams<kLayout>{params});
  return cudaGetLastError();
}

bool IsAligned(const PlanParams& p) {
  uintptr_t bits = 0;
  for (const int32_t* pointer :
       {p.topk_idx, static_cast<const int32_t*>(p.topk), static_cast<const int32_t*>(p.dest_row),
        static_cast<const int32_t*>(p.recv_rows), static_cast<const int32_t*>(p.recv_src),
        static_cast<const int32_t*>(p.expert_idx)}) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return bits % 16 == 0;
}

}  // namespace

bool FitsPushPlan(const PlanParams& params) {
  const PushShape n = PushShapeOf(params);
  return params.top_k <= MaxTopK(params) && params.num_tokens <= kMaxCount &&
         int64_t{n.chunk} * params.top_k <= kMaxCount && n.columns <= kMaxCount &&
         n.sources * n.here <= kMaxCount && InboxWords(params, n) <= kInboxWords &&
         n.end * sizeof(int32_t) <= kMaxPushBytes;
}

cudaError_t LoadPushPlan() {
  const cudaError_t error = Load<Layout::kExpert>();
  return error != cudaSuccess ? error : Load<Layout::kToken>();
}

cudaError_t LaunchPushPlan(const PlanParams& params, cudaStream_t stream) {
  const PushParams all{params, PushShapeOf(params), IsAligned(params)};
  return params.layout == Layout::kToken ? Launch<Layout::kToken>(all, stream)
                                         : Launch<Layout::kExpert>(all, stream);
}

}  // namespace jax_ep::cuda
