// The combine op: the rows of a token meet at home.
//
// Layout "token": each rank has at most one row of a token, so home reads the rows over the link
// and adds them. Layout "expert": each rank first adds its own rows of every token of its peers and
// puts the sum into a slot of home's ring, with a word that says so. Home adds the sum to its own
// rows. Both go on at the same time: every rank goes through a list of items, in which its own sum
// of a token comes some time after its sums for peers. Warps take items in turn.

#include "cuda/core/sync.cuh"
#include "cuda/core/tickets.cuh"
#include "cuda/node/combine.h"
#include "cuda/rows/adder.cuh"
#include "cuda/rows/ring.cuh"
#include "cuda/rows/sources.cuh"
#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kThreads = kAdderWarps * 32;
// Rows are added in parts, by different warps, if there were too few items otherwise for all warps
// to end together.
constexpr int kMinPartBytes = 4 * kStripBytes;
constexpr int kManyItems = 16384;
constexpr int kManyItemsOfAWarp = 4;

// Sums of own rows, rounded, before they are added to those of peers.
constexpr int kPieceBytes = 4 * kStripBytes;

struct WarpMemory {
  char piece[kPieceBytes];
  Term terms[2 * kMaxTerms];  // of a sum, and of the sum of own rows in it
};
constexpr int kSharedBytes = kAdderWarps * static_cast<int>(sizeof(WarpMemory));

// What all warps of a running combine need to know. It is in shared memory because registers are
// scarce.
struct CombineState : RingState {
  int32_t num_peers;  // that sums are made for
  int32_t num_units;  // parts of rows of all tokens
  int32_t lag;        // see GetItem
  PeerInputs inputs;
};

// One item of the list: for a part of a token's row, this rank's sum for its n-th peer, or, if n is
// the number of peers, the sum of its own token.
struct Item {
  RingPlace place;
  int32_t nth_peer;
};

// The number of parts of a row. Where sums go through the ring it must be the same on all ranks, so
// it depends only on numbers that they have in common.
__device__ int32_t NumParts(const CombineParams& p, int32_t row_bytes) {
  const bool by_expert = p.layout == Layout::kExpert;
  const int32_t items = by_expert ? p.num_tokens * p.group.num_ranks : p.num_tokens;
  const int32_t many = by_expert ? kManyItems : kManyItemsOfAWarp * kAdderWarps * gridDim.x;
  int32_t parts = 1;
  while (parts < kMaxParts && items * parts < many && row_bytes / parts > kMinPartBytes) parts *= 2;
  return parts;
}

// By one thread.
__device__ void MakeState(const CombineParams& p, uint64_t epoch, int32_t row_bytes,
                          CombineState& state) {
  state.epoch = epoch;
  state.row_bytes = row_bytes;
  state.num_parts = NumParts(p, row_bytes);
  state.part_bytes = plan::RoundUp((row_bytes + state.num_parts - 1) / state.num_parts, 16);
  state.num_slots = plan::Min(RingSlots(p.group.num_ranks, row_bytes), kMostRingSlots);
  state.num_peers = p.layout == Layout::kExpert ? p.group.num_ranks - 1 : 0;
  state.num_units = p.num_tokens * state.num_parts;
  // Data of peers takes about as long to arrive as a warp needs for an item.
  const int32_t under_way = gridDim.x * kAdderWarps / (state.num_peers + 1);
  const int32_t half_the_ring = state.num_slots * state.num_parts / 2;
  state.lag = plan::Min(plan::Min(under_way, half_the_ring), state.num_units);
}

// Item `index` of the list; false if there is none. First come `lag` units (parts of tokens) for
// peers only, then the units for peers and those of this rank side by side, then the rest of this
// rank's units.
//
// No deadlock is possible, although ranks may have different lags, because they may have different
// numbers of blocks. Let the time of an item be its unit, plus lag + 1/2 if it is for this rank.
// Lists are in the order of time, and an item waits only for earlier items. It waits for the peers'
// sums of the same unit. Or it waits until home has read the sum before it in the slot; that sum is
// at least as many units earlier as the ring has slots, and a lag is at most half of that number.
// Warps get items in the order of the list once they run, and a warp that holds an item that it has
// not begun is at an earlier one. So the earliest unfinished items of all ranks are being worked on
// and wait for nothing. This needs only one running block on each rank; other kernels may keep the
// rest from the SMs. (As in all ops, block 0 must run, because it publishes. Blocks get SMs in the
// order of their numbers.)
__device__ bool GetItem(const CombineState& state, uint32_t index, Item& item) {
  const uint32_t alone = state.lag * state.num_peers;
  const uint32_t both = (state.num_units - state.lag) * (state.num_peers + 1);
  int32_t unit;
  item.nth_peer = state.num_peers;
  if (index < alone) {
    unit = index / state.num_peers;
    item.nth_peer = index % state.num_peers;
  } else if (index < alone + both) {
    unit = (index - alone) / (state.num_peers + 1);
    item.nth_peer = (index - alone) % (state.num_peers + 1);
    if (item.nth_peer < state.num_peers) unit += state.lag;
  } else {
    unit = state.num_units - state.lag + (index - alone - both);
  }
  item.place.token = unit >> (__ffs(state.num_parts) - 1);
  item.place.part = unit & (state.num_parts - 1);
  item.place.slot = item.place.token % state.num_slots;
  return unit < state.num_units;
}

// The work of one warp. All methods are called by all lanes together.
template <typename T, bool kWeighted>
class Combiner {
 public:
  __device__ Combiner(const CombineParams& p, const CombineState& state, WarpMemory& memory)
      : p_(p), state_(state), ring_(p, state), terms_(memory.terms), piece_(memory.piece) {}

  // Returns early once the group has failed.
  __device__ void Run(Tickets& tickets) {
    Item item;
    for (uint32_t n = 0; GetItem(state_, tickets.Take(), item); ++n) {
      if (TestStops(p_.group.tag, n)) return;
      const bool is_own = item.nth_peer == state_.num_peers;
      if (!(is_own ? BringHome(item.place) : AddForPeer(item.place, item.nth_peer))) return;
    }
  }

 private:
  __device__ static int32_t Lane() { return threadIdx.x % 32; }

  // Bytes of a row that are a part.
  __device__ int32_t BeginOf(int32_t part) const { return part * state_.part_bytes; }
  __device__ int32_t EndOf(int32_t part) const {
    return plan::Min(BeginOf(part) + state_.part_bytes, state_.row_bytes);
  }

  // Lists this rank's rows of a source from terms_[first] on, and returns their number. `row` is
  // row m in lane m, or -1. The lanes with rows come first.
  __device__ int32_t ListOwnRows(int32_t row, int32_t first) {
    if (row >= 0) {
      const char* address = static_cast<const char*>(p_.rows) + int64_t{row} * state_.row_bytes;
      terms_[first + Lane()] = {address, kWeighted ? p_.row_weights[row] : 1.0f};
    }
    return __popc(__ballot_sync(~0u, row >= 0));
  }

  // This rank's sum for a token of a peer.
  __device__ bool AddForPeer(const RingPlace& place, int32_t nth_peer) {
    int home = p_.group.rank + 1 + nth_peer;
    if (home >= p_.group.num_ranks) home -= p_.group.num_ranks;
    const int32_t row = RowOfLane(p_, home * p_.num_tokens + place.token);
    const int32_t count = ListOwnRows(row, 0);
    if (count == 0) return true;
    if (!ring_.WaitFree(home, place)) return false;
    __syncwarp();  // the list is written
    AddTerms<T, kWeighted>(terms_, count, BeginOf(place.part), EndOf(place.part),
                           ring_.Sum(home, p_.group.rank, place));
    __syncwarp();
    if (Lane() == 0) {
      TestDelay(p_.group.rank, state_.epoch, 3 + place.token);
      ring_.TellReady(home, place);
    }
    return true;
  }

  // The sum of a token of this rank. It has a term for each rank, in ascending order: the rounded
  // sum of this rank's own rows, or the peer's one row.
  __device__ bool BringHome(const RingPlace& place) {
    const int32_t token = place.token, begin = BeginOf(place.part), end = EndOf(place.part);
    const bool by_expert = p_.layout == Layout::kExpert;
    // Lane k has entry k: the rank that holds it, or -1.
    int32_t rank = plan::kNone, row = plan::kNone;
    if (Lane() < p_.top_k) {
      const int32_t expert = p_.topk[int64_t{token} * p_.top_k + Lane()];
      row = p_.dest_row[int64_t{token} * p_.top_k + Lane()];
      if (expert >= 0 && expert < p_.num_experts && row >= 0 && row < p_.capacity) {
        rank = plan::RankOfExpert(expert, p_.num_experts / p_.group.num_ranks);
      }
    }
    const int32_t own_row =
        by_expert ? RowOfLane(p_, p_.group.rank * p_.num_tokens + token) : plan::kNone;
    // The first lane that has an entry of a peer waits for that peer.
    const int first = __ffs(__match_any_sync(~0u, rank)) - 1;
    const bool awaits = by_expert && rank >= 0 && rank != p_.group.rank && first == Lane();
    if (!__all_sync(~0u, !awaits || ring_.WaitReady(rank, place))) return false;
    const int32_t num_own = ListOwnRows(own_row, kMaxTerms);
    int32_t count = 0, own = plan::kNone;
    for (int32_t r = 0; r < p_.group.num_ranks; ++r) {
      const uint32_t there = __ballot_sync(~0u, rank == r);
      const bool is_own = by_expert && r == p_.group.rank;
      if (there == 0 || (is_own && num_own == 0)) continue;
      if (is_own) own = count;
      if (Lane() == __ffs(there) - 1) {
        const char* address = by_expert
                                  ? ring_.Sum(p_.group.rank, r, place)
                                  : state_.inputs.Of<char>(r, 0) + int64_t{row} * state_.row_bytes;
        terms_[count] = {address, 1.0f};
      }
      ++count;
    }
    __syncwarp();  // the list is written, and all lanes see what others have waited for
    char* y = static_cast<char*>(p_.y) + int64_t{token} * state_.row_bytes;
    if (count == 0) {
      Clear(y, begin, end);
    } else if (own == plan::kNone) {
      AddTerms<T, kWeighted>(terms_, count, begin, end, y);
    } else {
      AddOwnFirst(num_own, own, count, begin, end, y);
    }
    __syncwarp();
    if (awaits) ring_.TellFree(rank, place);
    return true;
  }

  // The same, where term `own` is the sum of this rank's own rows.
  __device__ void AddOwnFirst(int32_t num_own, int32_t own, int32_t count, int32_t begin,
                              int32_t end, char* y) {
    if (!kWeighted && num_own == 1) {  // its sum needs no rounding
      if (Lane() == 0) terms_[own] = terms_[kMaxTerms];
      __syncwarp();
      AddTerms<T, kWeighted>(terms_, count, begin, end, y);
      return;
    }
    for (; begin < end; begin += kPieceBytes) {
      const int32_t piece_end = plan::Min(begin + kPieceBytes, end);
      if (Lane() == 0) terms_[own] = {piece_ - begin, 1.0f};
      __syncwarp();
      AddTerms<T, kWeighted>(terms_ + kMaxTerms, num_own, begin, piece_end, piece_ - begin);
      AddTerms<T, kWeighted>(terms_, count, begin, piece_end, y);
      __syncwarp();
    }
  }

  __device__ static void Clear(char* row, int32_t begin, int32_t end) {
    for (int32_t at = begin + Lane() * 16; at < end; at += kStripBytes) {
      *reinterpret_cast<uint4*>(row + at) = make_uint4(0, 0, 0, 0);
    }
  }

  const CombineParams& p_;
  const CombineState& state_;
  Ring<CombineParams> ring_;
  Term* terms_;
  char* piece_;
};

// Home: values of single rows.
__device__ void BringValues(const CombineParams& p, const PeerInputs& inputs, int32_t thread,
                            int32_t num_threads) {
  const int32_t count = p.num_tokens * p.top_k;
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  for (int32_t i = thread; i < count; i += num_threads) {
    const int32_t expert = p.topk[i];
    const int32_t row = p.dest_row[i];
    float value = 0.0f;
    if (expert >= 0 && expert < p.num_experts && row >= 0 && row < p.capacity) {
      const float* values = inputs.Of<float>(plan::RankOfExpert(expert, num_local), 1);
      value = __ldcg(&values[p.layout == Layout::kExpert ? int64_t{row}
                                                         : int64_t{row} * p.top_k + i % p.top_k]);
    }
    p.home[i] = value;
  }
}

// By one block.
template <typename T>
__device__ void Poison(const CombineParams& p) {
  const int64_t num_words = int64_t{p.num_tokens} * p.hidden * sizeof(T) / 16;
  uint4* words = static_cast<uint4*>(p.y);
  for (int64_t i = threadIdx.x; i < num_words; i += kThreads) {
    words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
  if (p.home == nullptr) return;
  for (int32_t i = threadIdx.x; i < p.num_tokens * p.top_k; i += kThreads) {
    p.home[i] = __uint_as_float(~0u);
  }
}

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1)
    CombineKernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ CombineState state;
  const OpNumbers op = BeginOp(p.group);
  const bool has_rows = p.hidden > 0;  // else only values come home
  if (blockIdx.x == 0) {
    const bool is_read = p.layout == Layout::kToken && has_rows;
    Publish(p.group, op, {is_read ? p.rows : nullptr, p.values, nullptr});
  }
  if (has_rows && threadIdx.x == kThreads / 2) {  // a thread that has nothing to do above
    MakeState(p, op.epoch, p.hidden * sizeof(T), state);
  }
  Tickets tickets(p.group);                     // the first is on its way meanwhile
  if (WaitInputs(p.group, op, state.inputs)) {  // where the block meets
    const int32_t warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    if (p.values != nullptr) {
      BringValues(p, state.inputs, warp * 32 + threadIdx.x % 32, kThreads * gridDim.x);
    }
    if (has_rows) {
      WarpMemory& memory = reinterpret_cast<WarpMemory*>(shared)[threadIdx.x / 32];
      Combiner<T, kWeighted>(p, state, memory).Run(tickets);
    }
  }
  EndOp(p.group, op.epoch, [&] { Poison<T>(p); });
}

}  // namespace

cudaError_t LoadCombine() {
  const auto load = [](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  };
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [&](auto element) {
      const cudaError_t first = load(CombineKernel<decltype(element), false>);
      return first != cudaSuccess ? first : load(CombineKernel<decltype(element), true>);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    const auto kernel = params.row_weights == nullptr ? CombineKernel<decltype(element), false>
                                                      : CombineKernel<decltype(element), true>;
    kernel<<<params.num_blocks, kThreads, kSharedBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
