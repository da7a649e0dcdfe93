// The combine op: the rows of a token meet at home.
//
// Layout "token": each rank has one row of a token at most, so home reads them over the link and
// adds. Layout "expert": each rank first adds its own rows of every token of its peers
// (*producers*) and puts the sum into a slot of home's ring, with a word that says so; home
// (*consumers*) adds it to its own rows. Both go on at the same time, token by token, in every
// block.

#include <algorithm>

#include "cuda/adder.cuh"
#include "cuda/combine.h"
#include "cuda/sources.cuh"
#include "cuda/sync.cuh"
#include "cuda/vectors.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kWarps = kAdderWarps;
constexpr int kThreads = kWarps * 32;
// Warps of a block that produce, in layout "expert".
constexpr int kProducers = kWarps / 2;

// Sums of one source that home's ring has room for.
__host__ __device__ int32_t NumRingSlots(const CombineParams& p) {
  return RingSlots(p.group.num_ranks, int64_t{p.hidden} * ByteWidth(p.type));
}

// Puts this rank's rows of one source into the list, from `first` on, as one segment. `row` is row
// m in lane m, or -1; rows are packed to the left. Returns how many there are.
__device__ int32_t ListOwnRows(const CombineParams& p, int32_t row, int32_t row_bytes,
                               Term* terms) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t count = __popc(__ballot_sync(~0u, row >= 0));
  if (row >= 0) {
    const float factor = p.row_weights == nullptr ? 1.0f : p.row_weights[row];
    const char* address = static_cast<const char*>(p.rows) + int64_t{row} * row_bytes;
    terms[lane] = Term::Of(address, factor, lane == 0, lane + 1 == count);
  }
  return count;
}

// The part of home's ring that rank `source` puts its sums into, and the words beside it.
class Ring {
 public:
  __device__ Ring(const CombineParams& p, uint64_t epoch)
      : p_(p), epoch_(epoch), num_slots_(NumRingSlots(p)) {}

  __device__ char* Sum(int home, int source, int32_t token) const {
    const int part = source < home ? source : source - 1;
    const int64_t slot = int64_t{part} * num_slots_ + token % num_slots_;
    return p_.group.peers[home]->ring + slot * p_.hidden * ByteWidth(p_.type);
  }

  // Source: the token whose sum was in the slot of `token` before, or less than 0. Not every token
  // has a sum.
  __device__ int32_t Before(int home, int32_t token) const {
    do {
      token -= num_slots_;
    } while (token >= 0 && !HasRows(home * p_.num_tokens + token));
    return token;
  }

  // Source: whether home has read the sum of `token`; WaitFree waits for it.
  __device__ bool IsFree(int home, int32_t token) const {
    if (token < 0 || kMutation == kWithoutRingFree) return true;
    return ptx::LoadAcquireSystem(FreeWord(home, token)) == Word(token);
  }
  __device__ bool WaitFree(int home, int32_t token) const {
    return token < 0 || Wait(FreeWord(home, token), Word(token), home);
  }

  // Home: tells that the sum of `source` is read.
  __device__ void TellFree(int source, int32_t token) const {
    if (token + num_slots_ >= p_.num_tokens) return;  // nobody will ask
    ptx::StoreRelaxedSystem(&p_.group.peers[source]->ring_free[p_.group.rank][token % num_slots_],
                            Word(token));
  }

  // Source: tells that the sum is there. After a fence.
  __device__ void TellReady(int home, int32_t token) const {
    ptx::StoreRelaxedSystem(&p_.group.peers[home]->ring_ready[p_.group.rank][token % num_slots_],
                            Word(token));
  }

  // Home: whether the sum of `source` is there; WaitReady waits for it.
  __device__ bool IsReady(int source, int32_t token) const {
    if (kMutation == kWithoutRingReady) return true;
    return ptx::LoadAcquireSystem(ReadyWord(source, token)) == Word(token);
  }
  __device__ bool WaitReady(int source, int32_t token) const {
    return Wait(ReadyWord(source, token), Word(token), source);
  }

 private:
  __device__ uint64_t Word(int32_t token) const {
    return epoch_ << 32 | static_cast<uint32_t>(token);
  }
  __device__ bool HasRows(int32_t source) const {
    const int32_t row = p_.recv_rows[int64_t{source} * p_.num_rows];
    return row >= 0 && row < p_.capacity;
  }
  __device__ const uint64_t* FreeWord(int home, int32_t token) const {
    return &Own(p_.group).ring_free[home][token % num_slots_];
  }
  __device__ const uint64_t* ReadyWord(int source, int32_t token) const {
    return &Own(p_.group).ring_ready[source][token % num_slots_];
  }

  __device__ bool Wait(const uint64_t* word, uint64_t expected, int peer) const {
    for (Deadline deadline;;) {
      const uint64_t seen = ptx::LoadAcquireSystem(word);
      if (seen == expected) return true;
      if (!deadline.Continue(p_.group, Phase::kRows, peer, expected, seen)) return false;
    }
  }

  const CombineParams& p_;
  uint64_t epoch_;
  int32_t num_slots_;
};

// Producers: this rank's sums for all peers, by one of `num_warps` warps. Tokens of all peers take
// turns. Every rank goes through the tokens in the same order, and a warp waits only when it has
// told all that it did: so what it waits for comes. Returns early once the group has failed.
template <typename T, bool kWeighted>
__device__ void Produce(const CombineParams& p, uint64_t epoch, Adder<T, true, kWeighted>& adder,
                        int32_t warp, int32_t num_warps) {
  const int32_t row_bytes = p.hidden * sizeof(T);
  const int32_t num_peers = p.group.num_ranks - 1;
  const Ring ring(p, epoch);
  const auto token_of = [&](int32_t item) { return item / num_peers; };
  const auto home_of = [&](int32_t item) {
    return (p.group.rank + 1 + item % num_peers) % p.group.num_ranks;
  };
  const auto source_of = [&](int32_t item) {
    return home_of(item) * p.num_tokens + token_of(item);
  };
  const auto tell = [&](int32_t item) {
    if (item < 0) return;
    ptx::FenceProxyAsyncGlobal();  // home reads by bulk copies what this lane stored
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    TestDelay(p.group.rank, epoch, 3 + token_of(item));
    ptx::FenceAcquireReleaseSystem();
    ring.TellReady(home_of(item), token_of(item));
  };
  // A sum is finished while the next one's terms are on their way. Sum and flush are called at one
  // place each, since their code is long.
  int32_t pending = -1;
  int32_t pending_mark = 0;
  const auto flush = [&] {
    adder.FinishUntil(pending_mark);
    tell(pending);
    pending = -1;
  };
  const int32_t num_items = p.num_tokens * num_peers;
  int32_t next_row = warp < num_items ? RowOfLane(p, source_of(warp)) : plan::kNone;
  for (int32_t item = warp;; item += num_warps) {
    const bool is_past = item >= num_items;  // nothing is left but what is pending
    const int32_t row = next_row;
    const int32_t next = item + num_warps;  // there when it is needed
    next_row = next < num_items ? RowOfLane(p, source_of(next)) : plan::kNone;
    const int32_t num_terms = ListOwnRows(p, row, row_bytes, adder.terms());
    const int home = home_of(item);
    const int32_t token = token_of(item);
    const int32_t before = num_terms > 0 ? ring.Before(home, token) : -1;
    for (bool is_free = __all_sync(~0u, ring.IsFree(home, before));; is_free = true) {
      if (is_free && num_terms > 0) adder.Sum(num_terms, ring.Sum(home, p.group.rank, token));
      flush();
      if (is_free) break;
      if (!__all_sync(~0u, ring.WaitFree(home, before))) return;
    }
    if (is_past) return;
    if (num_terms == 0) continue;
    pending = item;
    pending_mark = adder.num_started();
  }
}

// What a warp needs to know of a token: its entries (lane k has entry k) and, in layout "expert",
// this rank's rows of it (lane m has row m).
struct TokenRows {
  int32_t expert;
  int32_t row;
  int32_t own_row;
};

__device__ TokenRows LoadToken(const CombineParams& p, int32_t token) {
  const int32_t lane = threadIdx.x % 32;
  TokenRows rows{plan::kNone, plan::kNone, plan::kNone};
  if (token >= p.num_tokens) return rows;
  if (lane < p.top_k) {
    rows.expert = p.topk[int64_t{token} * p.top_k + lane];
    rows.row = p.dest_row[int64_t{token} * p.top_k + lane];
  }
  if (p.layout == Layout::kExpert) {
    rows.own_row = RowOfLane(p, p.group.rank * p.num_tokens + token);
  }
  return rows;
}

// The rank that holds this lane's entry of a token, or -1.
__device__ int32_t RankOfEntry(const CombineParams& p, const TokenRows& rows) {
  const bool exists =
      rows.expert >= 0 && rows.expert < p.num_experts && rows.row >= 0 && rows.row < p.capacity;
  return exists ? plan::RankOfExpert(rows.expert, p.num_experts / p.group.num_ranks) : plan::kNone;
}

// Home: lists the terms of a token: for each rank, ascending, this rank's own rows or the peer's
// one row. Returns how many there are.
__device__ int32_t ListTerms(const CombineParams& p, const Ring& ring, const PeerInputs& inputs,
                             int32_t token, const TokenRows& rows, int32_t rank, Term* terms) {
  const int32_t lane = threadIdx.x % 32;
  const bool by_expert = p.layout == Layout::kExpert;
  const int32_t row_bytes = p.hidden * ByteWidth(p.type);
  int32_t count = 0;
  for (int32_t r = 0; r < p.group.num_ranks; ++r) {
    const uint32_t there = __ballot_sync(~0u, rank == r);
    if (there == 0) continue;
    if (by_expert && r == p.group.rank) {
      const int32_t own_row = lane < kMaxTerms - count ? rows.own_row : plan::kNone;
      count += ListOwnRows(p, own_row, row_bytes, terms + count);
      continue;
    }
    if (count == kMaxTerms) break;  // of a handle that is none
    if (lane == __ffs(there) - 1) {
      const char* row = by_expert ? ring.Sum(p.group.rank, r, token)
                                  : inputs.Of<char>(r, 0) + int64_t{rows.row} * row_bytes;
      terms[count] = Term::Of(row, 1.0f, true, true);
    }
    ++count;
  }
  return count;
}

// Home: the sums of all tokens, by one of `num_warps` warps. Returns early once the group has
// failed.
template <typename T, bool kWeighted>
__device__ void BringHome(const CombineParams& p, uint64_t epoch, const PeerInputs& inputs,
                          Adder<T, false, kWeighted>& adder, int32_t warp, int32_t num_warps) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t row_bytes = p.hidden * sizeof(T);
  const bool by_expert = p.layout == Layout::kExpert;
  const Ring ring(p, epoch);
  // Slots become free once their sums are read: a token later. Lane by lane, those of one rank.
  int32_t pending = -1;
  int32_t pending_rank = -1;
  int32_t pending_mark = 0;
  const auto flush = [&] {
    adder.FinishUntil(pending_mark);
    if (pending_rank >= 0) ring.TellFree(pending_rank, pending);
    pending_rank = -1;
  };
  TokenRows next_rows = LoadToken(p, warp);
  for (int32_t token = warp;; token += num_warps) {
    const bool is_past = token >= p.num_tokens;  // nothing is left but what is pending
    const TokenRows rows = next_rows;
    next_rows = LoadToken(p, token + num_warps);  // there when it is needed
    const int32_t rank = RankOfEntry(p, rows);
    // The first lane that has an entry of a rank waits for that rank.
    const int first = __ffs(__match_any_sync(~0u, rank)) - 1;
    const bool awaits = by_expert && rank >= 0 && rank != p.group.rank && first == lane;
    if (is_past) pending_mark = adder.num_started();
    for (bool is_ready = !by_expert || __all_sync(~0u, !awaits || ring.IsReady(rank, token));;
         is_ready = true) {
      if (is_ready && !is_past) {
        if (by_expert) {
          ptx::FenceProxyAsyncGlobal();
          __syncwarp();
        }
        char* y = static_cast<char*>(p.y) + int64_t{token} * row_bytes;
        const int32_t num_terms = ListTerms(p, ring, inputs, token, rows, rank, adder.terms());
        if (num_terms > 0) {
          adder.Sum(num_terms, y);
        } else {
          for (int32_t i = lane; i < row_bytes / 16; i += 32) {
            reinterpret_cast<uint4*>(y)[i] = make_uint4(0, 0, 0, 0);
          }
        }
      }
      flush();
      if (is_ready) break;
      if (!__all_sync(~0u, !awaits || ring.WaitReady(rank, token))) return;
    }
    if (is_past) return;
    if (!by_expert) continue;
    pending = token;
    pending_rank = awaits ? rank : -1;
    pending_mark = adder.num_started();
  }
}

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
  __shared__ PeerInputs inputs;
  const uint64_t epoch = BeginOp(p.group);
  const bool by_expert = p.layout == Layout::kExpert;
  const bool has_rows = p.hidden > 0;  // else only values come home
  if (blockIdx.x == 0) {
    Publish(p.group, epoch, {by_expert || !has_rows ? nullptr : p.rows, p.values, nullptr});
  }
  const int32_t num_blocks = gridDim.x;
  const int32_t block = blockIdx.x;
  const int32_t warp = threadIdx.x / 32;
  const int32_t num_producers = by_expert && has_rows && p.group.num_ranks > 1 ? kProducers : 0;
  const bool ok = WaitInputs(p.group, epoch, inputs);
  if (ok && warp < num_producers) {
    Adder<T, true, kWeighted> adder(p, shared);
    Produce(p, epoch, adder, warp * num_blocks + block, num_producers * num_blocks);
  } else if (ok) {
    const int32_t num_consumers = kWarps - num_producers;
    const int32_t consumer = (warp - num_producers) * num_blocks + block;
    if (p.values != nullptr) {
      BringValues(p, inputs, consumer * 32 + threadIdx.x % 32, num_consumers * num_blocks * 32);
    }
    if (has_rows) {
      Adder<T, false, kWeighted> adder(p, shared);
      BringHome(p, epoch, inputs, adder, consumer, num_consumers * num_blocks);
    }
  }
  EndOp(p.group, epoch, [&] { Poison<T>(p); });
}

}  // namespace

cudaError_t LoadCombine() {
  const auto load = [](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAdderBytes);
  };
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [&](auto element) {
      const cudaError_t error = load(CombineKernel<decltype(element), false>);
      return error != cudaSuccess ? error : load(CombineKernel<decltype(element), true>);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    const auto kernel = params.row_weights == nullptr ? CombineKernel<decltype(element), false>
                                                      : CombineKernel<decltype(element), true>;
    kernel<<<params.num_blocks, kThreads, kAdderBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
