// The plan op: every (token, k) entry learns its row, in one kernel of one cluster of blocks.
//
// Each block has a chunk of the tokens. Ranks send each other all that is needed, into the peer's
// inbox: the cleaned expert ids of every token, how many entries each column has in all, and, for
// the columns of the peer, how many of them lie before each chunk. Then a block numbers the entries
// of its chunk, of every rank: a bit mask of tokens for each slot makes the position of an entry a
// matter of counting the bits before it.
//
// A word of the inbox carries 32 bits of the epoch beside its data: who finds the epoch has the
// data. So nothing is fenced, nothing is read over a link, and nobody has to wait until all have
// read. There are two inboxes, which plans use by turns. A rank sends its next plan's words only
// after this plan's have come from all peers, and those of the plan after it only after all peers
// have sent their next ones, that is after they are done with this plan: so what a rank still reads
// is never overwritten. Flags of arrival take turns by epoch for the same reason. Ops in between
// do not touch inboxes. A word could be taken for a new one only after 2^32 ops of the group.

#include <cooperative_groups.h>

#include "cuda/plan_inbox.cuh"

namespace jax_ep::cuda {
namespace {

namespace cg = cooperative_groups;

// Sets `count` words to -1, all blocks together.
__device__ void FillNone(int32_t* words, int64_t count) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = thread; i < count; i += kBlocks * kThreads) words[i] = plan::kNone;
}

// Cleans this block's entries, sends them, and marks them in the masks of the own slots.
__device__ void CleanEntries(const PlanParams& p, const Sizes& n, const Shared& shared,
                             const Inbox& inbox, uint64_t epoch, int32_t begin, int32_t count) {
  int32_t* entries = shared.entries + p.group.rank * n.entries;
  const int32_t first = begin * p.top_k;
  int32_t num_invalid = 0;
  for (int32_t word = threadIdx.x; word < n.id_words; word += kThreads) {
    uint32_t ids = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t e = 2 * word + j;
      int32_t id = plan::kNone;
      if (e < count) {
        const int32_t t = e / p.top_k;
        const int32_t k = e - t * p.top_k;
        const int32_t* given = p.topk_idx + first + t * p.top_k;
        if (IsValid(given, k, p.num_experts)) {
          id = given[k];
          const int32_t slot =
              p.layout == Layout::kExpert ? id : plan::RankOfExpert(id, n.num_local);
          atomicOr(&shared.masks[(t / 32) * n.slots + slot], 1u << (t % 32));
          if (p.layout == Layout::kToken) atomicAdd(&shared.found[n.columns + id], 1);
        } else {
          num_invalid += given[k] != plan::kNone;
        }
        p.topk[first + e] = id;
      }
      if (e < n.entries) entries[e] = id;
      ids |= (id == plan::kNone ? kNoId : static_cast<uint32_t>(id)) << (16 * j);
    }
    SendToAll(p.group, inbox, epoch, inbox.Ids(blockIdx.x, word), static_cast<int32_t>(ids));
  }
  if (num_invalid != 0) atomicAdd(&shared.found[n.totals], num_invalid);
}

// Counts the bits of the masks of slots [first, end); returns through `total` what each has.
template <typename Total>
__device__ void CountBits(const Sizes& n, const Shared& shared, int32_t first, int32_t end,
                          Total total) {
  for (int32_t slot = first + threadIdx.x; slot < end; slot += kThreads) {
    int32_t sum = 0;
    for (int32_t w = 0; w < n.masks; ++w) {
      shared.bits[w * n.slots + slot] = sum;
      sum += __popc(shared.masks[w * n.slots + slot]);
    }
    total(slot, sum);
  }
}

// What lies before this block's chunk in this rank, and this rank's totals: to where it is needed.
__device__ void AddBlocks(const PlanParams& p, const Sizes& n, const Shared& shared,
                          const Inbox& inbox, uint64_t epoch, cg::cluster_group cluster) {
  const int32_t block = blockIdx.x;
  for (int32_t column = threadIdx.x; column < n.totals; column += kThreads) {
    int32_t counts[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      counts[b] = *cluster.map_shared_rank(&shared.found[column], b);
    }
    int32_t before = 0, total = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      before += b < block ? counts[b] : 0;
      total += counts[b];
    }
    shared.own[column] = total;
    if (column % kBlocks == block) SendToAll(p.group, inbox, epoch, inbox.Total(column), total);
    if (column >= n.columns) continue;
    shared.before[column] = before;
    const int32_t home = column / n.here;
    if (home == p.group.rank) continue;
    Send(p.group, inbox, epoch, home, inbox.Prefix(block, column - home * n.here), before);
  }
}

// The columns of all ranks: what peers have of them, and what lies before this rank's.
__device__ bool AddRanks(const PlanParams& p, const Sizes& n, const Shared& shared,
                         const Inbox& inbox, uint64_t epoch) {
  const int me = p.group.rank;
  bool ok = true;
  for (int32_t column = threadIdx.x; column < n.columns; column += kThreads) {
    const int32_t nth = column - me * n.here;
    const bool is_here = nth >= 0 && nth < n.here;
    int32_t sum = 0;
    const auto add = [&](int source, int32_t count) {
      if (source == me) {
        shared.before[column] += sum;
      } else if (is_here) {
        const int32_t place = source < me ? source : source - 1;
        shared.before[n.columns + place * n.here + nth] = sum;
      }
      sum += count;
    };
    // Sources in order; this rank's own counts are not in the inbox.
    const auto address_of = [&](int32_t i) {
      return inbox.Of(Own(p.group), i < me ? i : i + 1) + inbox.Total(column);
    };
    ok = Take(p.group, epoch, p.group.num_ranks - 1, address_of,
              [&](int32_t i, int32_t count) {
                if (i == me) add(me, shared.own[column]);
                add(i < me ? i : i + 1, count);
              }) &&
         ok;
    if (me == p.group.num_ranks - 1) add(me, shared.own[column]);
    shared.demand[column] = sum;
  }
  return ok;
}

// The chunk's entries of all peers: their ids, their masks, and what lies before them.
__device__ bool TakeEntries(const PlanParams& p, const Sizes& n, const Shared& shared,
                            const Inbox& inbox, uint64_t epoch) {
  const int me = p.group.rank;
  const int32_t num_peers = p.group.num_ranks - 1;
  const int32_t first_local = me * n.num_local;
  bool ok = true;
  for (int32_t place = 0; place < num_peers; ++place) {
    const int source = place < me ? place : place + 1;
    const uint64_t* words = inbox.Of(Own(p.group), source) + inbox.Ids(blockIdx.x, 0);
    const int32_t mine = (n.id_words - static_cast<int32_t>(threadIdx.x) + kThreads - 1) / kThreads;
    int32_t* entries = shared.entries + source * n.entries;
    ok = Take(
             p.group, epoch, mine, [&](int32_t i) { return words + threadIdx.x + i * kThreads; },
             [&](int32_t i, int32_t data) {
               const int32_t word = threadIdx.x + i * kThreads;
#pragma unroll
               for (int j = 0; j < 2; ++j) {
                 const int32_t e = 2 * word + j;
                 if (e >= n.entries) continue;
                 const uint32_t id = static_cast<uint32_t>(data) >> (16 * j) & 0xffff;
                 const int32_t local = static_cast<int32_t>(id) - first_local;
                 const bool is_here = id != kNoId && local >= 0 && local < n.num_local;
                 entries[e] = is_here ? local : plan::kNone;
                 if (!is_here) continue;
                 const int32_t t = e / p.top_k;
                 const int32_t slot =
                     n.columns + place * n.here + (p.layout == Layout::kExpert ? local : 0);
                 atomicOr(&shared.masks[(t / 32) * n.slots + slot], 1u << (t % 32));
               }
             }) &&
         ok;
  }
  const int32_t num_prefixes = num_peers * n.here;
  const int32_t mine = (num_prefixes - static_cast<int32_t>(threadIdx.x) + kThreads - 1) / kThreads;
  return Take(
             p.group, epoch, mine,
             [&](int32_t i) {
               const int32_t at = threadIdx.x + i * kThreads;
               const int32_t place = at / n.here;
               return inbox.Of(Own(p.group), place < me ? place : place + 1) +
                      inbox.Prefix(blockIdx.x, at - place * n.here);
             },
             [&](int32_t i, int32_t count) {
               shared.before[n.columns + threadIdx.x + i * kThreads] += count;
             }) &&
         ok;
}

// Where the rows of every column begin on its rank, and how many are kept: see LayOutExperts. Once
// the groups reach the capacity, a multiple of the alignment, nothing is left for the rest: so a
// start is the sum of the sizes before it, cut at the capacity. One warp a rank.
__device__ void LayOutColumns(const PlanParams& p, const Sizes& n, const Shared& shared) {
  if (p.layout == Layout::kToken) {
    for (int32_t r = threadIdx.x; r < n.columns; r += kThreads) {
      shared.starts[r] = 0;
      shared.counts[r] = p.capacity;
    }
    return;
  }
  const int32_t lane = threadIdx.x % 32;
  for (int32_t r = threadIdx.x / 32; r < p.group.num_ranks; r += kThreads / 32) {
    int32_t before = 0;
    for (int32_t l0 = 0; l0 < n.num_local; l0 += 32) {
      const int32_t l = l0 + lane;
      const int32_t column = r * n.num_local + l;
      const int32_t demand = l < n.num_local ? shared.demand[column] : 0;
      const int32_t padded = plan::RoundUp(plan::Min(demand, p.expert_capacity), p.alignment);
      const int32_t sum = InclusiveWarpSum(padded);
      if (l < n.num_local) {
        const int32_t start = plan::Min(before + sum - padded, p.capacity);
        const plan::ExpertRows rows =
            plan::NextExpertRows(demand, p.expert_capacity, p.alignment, p.capacity, start);
        shared.starts[column] = rows.start;
        shared.counts[column] = rows.count;
        if (r == p.group.rank && blockIdx.x == 0) {
          p.counts[l] = rows.count;
          p.group_sizes[l] = rows.group_size;
          p.demand[l] = demand;
        }
      }
      before += __shfl_sync(~0u, sum, 31);
    }
  }
}

// The token and the place of the entries that a thread goes through, without a division for each.
struct Entry {
  int32_t t, k;

  __device__ Entry(int32_t e, int32_t top_k) : t(e / top_k), k(e % top_k) {}
  // On by `tokens` tokens and `places` places, less than a token's.
  __device__ void Advance(int32_t tokens, int32_t places, int32_t top_k) {
    t += tokens;
    k += places;
    if (k < top_k) return;
    k -= top_k;
    ++t;
  }
};

// Numbers the chunk's entries of one source.
__device__ void NumberEntries(const PlanParams& p, const Sizes& n, const Shared& shared, int source,
                              int32_t begin, int32_t count) {
  const int me = p.group.rank;
  const bool by_expert = p.layout == Layout::kExpert;
  const int32_t first_slot =
      source == me ? 0 : n.columns + (source < me ? source : source - 1) * n.here;
  int32_t* entries = shared.entries + source * n.entries;
  const int32_t tokens = kThreads / p.top_k;
  const int32_t places = kThreads % p.top_k;
  Entry entry(threadIdx.x, p.top_k);
  for (int32_t e = threadIdx.x; e < count; e += kThreads, entry.Advance(tokens, places, p.top_k)) {
    const int32_t id = entries[e];  // of peers the local one
    const int32_t t = entry.t;
    const int32_t k = entry.k;
    int32_t row = plan::kNone;
    int32_t local = plan::kNone;  // if the row is here
    if (id != plan::kNone) {
      const int32_t rank = source == me ? plan::RankOfExpert(id, n.num_local) : me;
      const int32_t expert = source == me ? id : id + me * n.num_local;
      const int32_t column = by_expert ? expert : rank;
      const int32_t slot = first_slot + (source == me ? column : by_expert ? id : 0);
      const int32_t word = (t / 32) * n.slots + slot;
      const int32_t position = shared.before[slot] + shared.bits[word] +
                               __popc(shared.masks[word] & ((1u << (t % 32)) - 1));
      row = plan::ExpertRow(shared.starts[column], shared.counts[column], position);
      if (rank == me && row != plan::kNone) local = expert - me * n.num_local;
    }
    if (source == me) p.dest_row[begin * p.top_k + e] = row;
    entries[e] = local != plan::kNone ? row : plan::kNone;
    if (local == plan::kNone) continue;
    p.recv_src[row] = plan::EncodeSource(p.layout, {source, begin + t, k}, p.num_tokens, p.top_k);
    if (by_expert) continue;
    p.expert_idx[int64_t{row} * p.top_k + k] = local;
    atomicAdd(&shared.kept[local], 1);
  }
}

// The rows of each source token, ascending: an entry's place is the number of smaller rows.
__device__ void ListRows(const PlanParams& p, const Sizes& n, const Shared& shared, int source,
                         int32_t begin, int32_t count) {
  const int32_t num_rows = plan::RowsPerSource(p.layout, p.top_k, n.num_local);
  const int32_t* entries = shared.entries + source * n.entries;
  const int32_t tokens = kThreads / p.top_k;
  const int32_t places = kThreads % p.top_k;
  Entry entry(threadIdx.x, p.top_k);
  for (int32_t e = threadIdx.x; e < count; e += kThreads, entry.Advance(tokens, places, p.top_k)) {
    const int32_t row = entries[e];
    if (row == plan::kNone) continue;
    const int32_t t = entry.t;
    int32_t place = 0;
#pragma unroll 8
    for (int32_t k = 0; k < p.top_k; ++k) {
      const int32_t other = entries[t * p.top_k + k];
      place += other != plan::kNone && other < row;
    }
    p.recv_rows[(int64_t{source} * p.num_tokens + begin + t) * num_rows + place] = row;
  }
}

// The first block, once all have numbered their entries: the counts of the whole rank.
__device__ void CountRows(const PlanParams& p, const Sizes& n, const Shared& shared,
                          const Inbox& inbox, uint64_t epoch, cg::cluster_group cluster) {
  if (p.layout == Layout::kToken) {
    for (int32_t l = threadIdx.x; l < n.num_local; l += kThreads) {
      int32_t kept = 0;
      for (int b = 0; b < kBlocks; ++b) kept += *cluster.map_shared_rank(&shared.kept[l], b);
      const int32_t column = n.columns + p.group.rank * n.num_local + l;
      int32_t demand = shared.own[column];
      Take(
          p.group, epoch, p.group.num_ranks - 1,
          [&](int32_t i) {
            return inbox.Of(Own(p.group), i < p.group.rank ? i : i + 1) + inbox.Total(column);
          },
          [&](int32_t, int32_t count) { demand += count; });
      p.counts[l] = p.group_sizes[l] = kept;
      p.demand[l] = demand;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  int32_t dropped = 0;
  for (int32_t l = threadIdx.x; l < n.num_local; l += 32) dropped += p.demand[l] - p.counts[l];
  for (int offset = 16; offset > 0; offset /= 2) dropped += __shfl_down_sync(~0u, dropped, offset);
  if (threadIdx.x != 0) return;
  *p.num_dropped = dropped;
  int32_t num_invalid = 0;
  for (int b = 0; b < kBlocks; ++b) {
    num_invalid += *cluster.map_shared_rank(&shared.found[n.totals], b);
  }
  *p.num_invalid = num_invalid;
}

__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    PushPlanKernel(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) int32_t memory[];
  __shared__ bool block_ok;
  const cg::cluster_group cluster = cg::this_cluster();
  const Sizes n(p);
  const Shared shared(p, n, memory);
  Workspace& own = Own(p.group);
  const uint64_t epoch = BeginOp(p.group);
  const Inbox inbox{n, static_cast<int>(*static_cast<volatile uint32_t*>(&own.num_plans) % 2)};
  const int32_t begin = plan::Min(blockIdx.x * n.chunk, p.num_tokens);
  const int32_t count = (plan::Min(begin + n.chunk, p.num_tokens) - begin) * p.top_k;

  if (blockIdx.x == 0 && threadIdx.x < p.group.num_ranks) {
    ptx::StoreRelaxedSystem(&p.group.peers[threadIdx.x]->arrival[epoch % 2][p.group.rank].value,
                            FlagValue(epoch, p.group.tag));
  }
  for (int32_t i = threadIdx.x; i < n.slots * n.masks; i += kThreads) shared.masks[i] = 0;
  for (int32_t i = threadIdx.x; i <= n.totals; i += kThreads) shared.found[i] = 0;
  for (int32_t i = threadIdx.x; i < n.num_local; i += kThreads) shared.kept[i] = 0;
  __syncthreads();
  TestDelay(p.group.rank, epoch, 0);
  CleanEntries(p, n, shared, inbox, epoch, begin, count);
  // Before the blocks meet, since any of them may write any row.
  FillNone(p.recv_src, p.capacity);
  FillNone(p.recv_rows, int64_t{p.group.num_ranks} * p.num_tokens *
                            plan::RowsPerSource(p.layout, p.top_k, n.num_local));
  if (p.layout == Layout::kToken) FillNone(p.expert_idx, int64_t{p.capacity} * p.top_k);
  __syncthreads();
  CountBits(n, shared, 0, n.columns,
            [&](int32_t slot, int32_t total) { shared.found[slot] = total; });
  TestDelay(p.group.rank, epoch, 1);
  cluster.sync();
  AddBlocks(p, n, shared, inbox, epoch, cluster);
  bool ok = WaitArrivals(p.group, epoch);  // also for what the block shares
  if (ok) ok = AddRanks(p, n, shared, inbox, epoch);
  ok = __syncthreads_and(ok);
  if (ok) {
    LayOutColumns(p, n, shared);
    ok = TakeEntries(p, n, shared, inbox, epoch);
  }
  ok = __syncthreads_and(ok);
  if (ok) {
    CountBits(n, shared, n.columns, n.slots, [](int32_t, int32_t) {});
    __syncthreads();
    for (int s = 0; s < p.group.num_ranks; ++s) NumberEntries(p, n, shared, s, begin, count);
    __syncthreads();
    for (int s = 0; s < p.group.num_ranks; ++s) ListRows(p, n, shared, s, begin, count);
  }
  if (threadIdx.x == 0) block_ok = ok;
  cluster.sync();
  for (int b = 0; b < kBlocks; ++b) ok = ok && *cluster.map_shared_rank(&block_ok, b);
  if (!ok) {
    Poison(p);
  } else if (blockIdx.x == 0) {
    CountRows(p, n, shared, inbox, epoch, cluster);
  }
  cluster.sync();  // nobody ends while others read its shared memory
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  own.num_plans += 1;
  own.epoch = epoch;
  own.active = 0;
}

}  // namespace

bool FitsPushPlan(const PlanParams& params) {
  const Sizes n(params);
  return int64_t{params.group.num_ranks} * n.source <= kInboxWords &&
         SharedBytes(params) <= kMaxSharedBytes;
}

cudaError_t LoadPushPlan() {
  return cudaFuncSetAttribute(PushPlanKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kMaxSharedBytes);
}

cudaError_t LaunchPushPlan(const PlanParams& params, cudaStream_t stream) {
  PushPlanKernel<<<kBlocks, kThreads, SharedBytes(params), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
