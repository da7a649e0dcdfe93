// Dispatch in latency mode (README.md). In each block, *routers* are warps that exchange ids, make
// the routes and write the handle, and *movers* send the parts of this rank's rows, bring parts
// that came, and deliver them once the routes are there. A start call does what comes before the
// first wait, and a done call the rest.

#include <algorithm>
#include <limits>

#include "cuda/decode/dispatch.h"
#include "cuda/decode/parts.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/routes.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kMovers = 16;  // warps
constexpr int kThreads = (kRouters + kMovers) * 32;

// The work of one mover. All methods are called by all lanes together.
template <typename From>
class Mover {
 public:
  __device__ Mover(const DecodeDispatchParams& p, DecodeOp op, const RouteMemory& routes,
                   char* stages)
      : p_(p),
        op_(op),
        routes_(routes),
        index_(threadIdx.x / 32 - kRouters),
        parts_(p, op, stages + index_ * 2 * kStageBytes) {}

  // Sends this mover's share of the parts of this rank's rows to the peers that need them, and then
  // brings the block's parts and delivers them, as far as these are for this call to do. Returns
  // whether all waits have succeeded.
  __device__ bool Run(const TokenRange& range, int32_t at_once) {
    const int32_t num_parts = p_.slots.parts;
    const int32_t num_sent = p_.calls == Calls::kDone ? 0 : p_.shape.num_tokens * num_parts;
    int32_t first = range.begin, count = plan::Min(range.end - first, at_once);
    int32_t to_send = index_ * gridDim.x + blockIdx.x;
    int32_t to_bring = index_;
    uint32_t n_sent = 0;
    bool awaits_routes = true, ok = true;
    // One loop for all, because each launch must fetch its code.
#pragma unroll 1
    for (;;) {
      const bool sends = to_send < num_sent && !TestStops(p_.group.tag, n_sent);
      const bool brings = !sends && to_bring < count * num_parts;
      const int32_t item = sends ? to_send : to_bring;
      const int32_t n = item / num_parts;
      const Part part(p_, item - n * num_parts);
      int peer = p_.group.rank;
      int32_t token = n;
      if (brings) {
        peer = (first + n) / p_.shape.num_tokens;
        token = first + n - peer * p_.shape.num_tokens;
      }
      if (sends) {
        uint32_t ranks = RanksOf(token);
        parts_.Fill(token, part);  // its loads are in flight together with that of the ids
        ranks = __reduce_or_sync(~0u, ranks) & ~(1u << p_.group.rank | p_.group.absent);
        __syncwarp();
        StampClock(p_.group, op_.epoch, DecodePhase::kRowsRead);
        TestDelay(p_.group.rank, op_.epoch, 64 + token);
        parts_.Send(token, part, ranks);
        __syncwarp();
        StampClock(p_.group, op_.epoch, DecodePhase::kRowsSent);
        to_send += kMovers * gridDim.x;
        ++n_sent;
        continue;
      }
      if (p_.calls == Calls::kStart) break;
      to_send = num_sent;
      if (brings) {
        if (peer == p_.group.rank) {
          parts_.Fill(token, part);
        } else {
          ok = ok && Bring(peer, token, part);
          StampClock(p_.group, op_.epoch, DecodePhase::kRowsThere);
        }
        parts_.Publish();
      }
      if (awaits_routes) {
        awaits_routes = false;
        ok = __syncthreads_and(ok);
        if (!ok) break;  // as the routers do
      }
      // After a failure that only this warp has met, it comes to the barriers that are left.
      if (brings && ok) {
        parts_.Deliver(part, RowOfEntry(n));
        parts_.Turn();
        to_bring += kMovers;
        continue;
      }
      if (first + count == range.end) break;
      // The next tokens. The routes of these are used no more after the barrier.
      __syncthreads();
      first += count;
      count = plan::Min(range.end - first, at_once);
      to_bring = index_;
      awaits_routes = true;
    }
    return ok;
  }

 private:
  // Lane k: the rank of entry k of this rank's token, as a bit.
  __device__ __forceinline__ uint32_t RanksOf(int32_t token) const {
    const int32_t lane = threadIdx.x % 32;
    if (lane >= p_.shape.top_k) return 0;
    const int32_t id = p_.plan.topk_idx[token * p_.shape.top_k + lane];
    return id >= 0 && id < p_.shape.num_experts ? 1u << p_.by_num_local(id) : 0;
  }

  // Lane k: the row here of entry k of the batch's n-th token, or -1.
  __device__ __forceinline__ int32_t RowOfEntry(int32_t n) const {
    const int32_t lane = threadIdx.x % 32, top_k = p_.shape.top_k;
    return lane < top_k ? routes_.rows[n * top_k + lane] : plan::kNone;
  }

  // Brings a part of a peer's token, if its ids say that it comes. False once the group has failed.
  __device__ __forceinline__ bool Bring(int peer, int32_t token, const Part& part) {
    const StampedWord* ids = WordsAt(p_, op_, p_.group.rank) + p_.slots.IdsAt(peer, token);
    uint4 word[1];
    const bool ok = WaitWords(p_, op_, ids, p_.slots.id_words, WordKind::kIds, peer, word);
    bool is_here = false;
    if (static_cast<int32_t>(threadIdx.x % 32) < p_.slots.id_words) {
      const uint32_t first = p_.group.rank * p_.num_local,
                     pairs[] = {word[0].x, word[0].y, word[0].z};
#pragma unroll
      for (int j = 0; j < kWordInts; ++j) {
        is_here = is_here || (pairs[j] & 0xffff) - first < static_cast<uint32_t>(p_.num_local) ||
                  (pairs[j] >> 16) - first < static_cast<uint32_t>(p_.num_local);
      }
    }
    if (!__all_sync(~0u, ok)) return false;
    return !__any_sync(~0u, is_here) || parts_.Receive(peer, token, part);
  }

  const DecodeDispatchParams& p_;
  DecodeOp op_;
  const RouteMemory& routes_;
  int32_t index_;
  PartMover<From> parts_;
};

// The work of the routers. It has the barriers of the block that Mover::Run has.
template <Layout kLayout>
__device__ __forceinline__ bool Route(const DecodeDispatchParams& p, DecodeOp op,
                                      Router<kLayout>& router, RouteWriter<kLayout> writer,
                                      const TokenRange& range, int32_t at_once) {
  const bool greets = blockIdx.x == 0 && threadIdx.x / 32 == kRouters - 1;  // it has few ids
  int32_t first = range.begin, count = plan::Min(range.end - first, at_once);
  bool ok = !greets || SayHello(p, op);
  if (p.calls != Calls::kDone && !TestStops(p.group.tag, 0)) SendIds(p, op);
  if (p.calls == Calls::kStart) return ok;
  router.Clear();
  SyncRouters();
  ok = router.Count(first, count) && ok;
  StampClock(p.group, op.epoch, DecodePhase::kIdsThere);
  if (greets) ok = ok && WaitHellos(p, op);
  SyncRouters();
  router.LayOut();
  SyncRouters();
#pragma unroll 1
  for (bool is_first = true;; is_first = false) {
    router.Number(first, count);
    ok = __syncthreads_and(ok);
    if (!ok) return false;
    StampClock(p.group, op.epoch, DecodePhase::kPlanKnown);
    writer.WriteRows(first, count);
    if (is_first) {
      if (blockIdx.x == 0) writer.WriteNumbers();
      writer.ClearUnused();
    }
    if (first + count == range.end) return true;
    __syncthreads();
    router.Advance(count);
    SyncRouters();
    first += count;
    count = plan::Min(range.end - first, at_once);
    router.ReadBatch(first, count);
    SyncRouters();
  }
}

__device__ void Fill(void* memory, int64_t bytes) {
  uint32_t* words = static_cast<uint32_t*>(memory);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < bytes / 4; i += kThreads) words[i] = ~0u;
}

// The result of a failed dispatch, by one block.
__device__ __noinline__ void Poison(const DecodeDispatchParams& p) {
  const int64_t num_tokens = p.shape.num_tokens, top_k = p.shape.top_k;
  const int64_t capacity = p.shape.capacity;
  const bool by_token = p.shape.layout == Layout::kToken;
  Fill(p.plan.topk, num_tokens * top_k * 4);
  Fill(p.plan.dest_row, num_tokens * top_k * 4);
  Fill(p.plan.recv_rows, p.shape.num_ranks * num_tokens * p.num_rows * 4);
  Fill(p.plan.recv_src, capacity * 4);
  if (by_token) Fill(p.plan.expert_idx, capacity * top_k * 4);
  for (int32_t* numbers : {p.plan.group_sizes, p.plan.counts, p.plan.demand}) {
    Fill(numbers, p.num_local * 4);
  }
  Fill(p.plan.num_dropped, 4);
  Fill(p.plan.num_invalid, 4);
  Fill(p.rows, capacity * p.out_row_bytes);
  if (p.row_scales != nullptr) Fill(p.row_scales, capacity * p.scales_per_row * 4);
  if (p.packed_scales != nullptr) Fill(p.packed_scales, p.packed.At(p.num_packed(), 0, 0) * 4);
  if (p.row_weights != nullptr) Fill(p.row_weights, capacity * (by_token ? top_k : 1) * 4);
}

template <typename From, Layout kLayout>
__global__ void __launch_bounds__(kThreads, 1)
    DecodeDispatchKernel(const __grid_constant__ DecodeDispatchParams p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ bool found_other;
  RouteMemory& routes = *reinterpret_cast<RouteMemory*>(memory);
  const DecodeOp op = BeginDecode(p, found_other);
  const TokenRange range(p);
  const int32_t at_once = kBatchEntries / p.shape.top_k;  // tokens of a batch
  bool ok;
  if (threadIdx.x < kRouterThreads) {
    Router<kLayout> router(p, op, range, routes);
    ok = Route(p, op, router, RouteWriter<kLayout>(p, op, routes), range, at_once);
  } else {
    ok = Mover<From>(p, op, routes, memory + RouteBytes(p)).Run(range, at_once);
  }
  if (p.calls == Calls::kStart) return EndStart(p, op, found_other);
  ptx::CommitBulkGroup();
  ptx::WaitBulkGroups();
  StampClock(p.group, op.epoch, DecodePhase::kWritten);
  EndDecode(p, op, found_other, ok, [&] { Poison(p); });
}

int32_t SharedBytes(const DecodeDispatchParams& p) {
  return RouteBytes(p) + kMovers * 2 * kStageBytes;
}

using Kernel = void (*)(DecodeDispatchParams);

template <typename From>
Kernel KernelFor(Layout layout) {
  return layout == Layout::kExpert ? DecodeDispatchKernel<From, Layout::kExpert>
                                   : DecodeDispatchKernel<From, Layout::kToken>;
}

// Calls `visit` with the kernel for such rows.
template <typename Visit>
cudaError_t VisitKernel(bool cast, RowType type, Layout layout, Visit&& visit) {
  if (!cast) return visit(KernelFor<void>(layout));
  return VisitRowType(type,
                      [&](auto element) { return visit(KernelFor<decltype(element)>(layout)); });
}

}  // namespace

DecodeDispatchParams ParamsOf(const ops::PlanArgs& plan, const ops::DispatchArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  DecodeDispatchParams params{};
  params.shape = plan.shape;
  params.num_local = plan.shape.num_local_experts();
  params.by_num_local = Divider::By(params.num_local);
  params.num_rows = plan.shape.rows_per_source();
  params.type = RowTypeOf(geometry.dtype);
  params.cast = args.quantization != ops::Quantization::kNone;
  params.ue8m0 = args.quantization == ops::Quantization::kFp8Ue8m0;
  params.dense = params.cast && args.dense_output;
  params.row_bytes = params.cast ? geometry.hidden : static_cast<int32_t>(geometry.row_bytes());
  params.out_row_bytes =
      params.cast && !params.dense ? geometry.hidden : static_cast<int32_t>(geometry.row_bytes());
  params.scales_per_row =
      params.cast || args.scales != nullptr ? geometry.hidden / ops::kScaleBlock : 0;
  params.keeps_unused = args.unused_rows == ops::UnusedRows::kUndefined;
  params.x = args.x;
  params.scales = args.scales;
  params.weights = args.weights;
  params.plan = plan.buffers;
  params.rows = args.rows;
  params.packed = ops::PackedScalesOf(args);
  if (args.packed_rows == 0) {
    params.row_scales = args.row_scales;
  } else {
    params.packed_scales = reinterpret_cast<uint32_t*>(args.row_scales);
  }
  params.row_weights = args.row_weights;
  params.slots = DecodeSlotsOf(params.shape.num_ranks, params.shape.num_tokens, params.shape.top_k,
                               params.row_bytes, params.scales_per_row != 0,
                               params.weights != nullptr ? params.shape.top_k : 0);
  return params;
}

const char* ObstacleOf(const DecodeDispatchParams& p) {
  if (p.row_bytes == 0) return "rows with channels";
  if (p.shape.capacity > kMaxDecodeCapacity) return "a capacity of at most 2^30";
  return DecodeObstacle(p.inboxes, p.slots, p.shape.top_k);
}

int32_t UsefulDecodeBlocks(int32_t num_ranks, int32_t num_tokens) {
  constexpr int kFewest = 16;  // a few also clear unused rows
  return std::clamp(num_ranks * num_tokens, kFewest, kMaxDecodeBlocks);
}

cudaError_t LoadDecodeDispatch() {
  constexpr int kMostShared = 160 << 10;
  for (const bool cast : {false, true}) {
    for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
      for (const Layout layout : {Layout::kExpert, Layout::kToken}) {
        const cudaError_t error = VisitKernel(cast, type, layout, [](Kernel kernel) {
          return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kMostShared);
        });
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchDecodeDispatch(const DecodeDispatchParams& params, cudaStream_t stream) {
  return VisitKernel(params.cast, params.type, params.shape.layout, [&](Kernel kernel) {
    kernel<<<params.num_blocks, kThreads, SharedBytes(params), stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
