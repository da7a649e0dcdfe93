// Steps of the plan's fast kernel (push.cu) over tokens. If a step looks something up for each of a
// lane's ids, all its loads come before its stores, because loads that wait for each other take
// longer than anything else.
#pragma once

#include <cstdint>

#include "cuda/plan/lanes.cuh"

namespace jax_ep::cuda {
namespace {

// Sends every rank the token's local experts there. For this rank they go to `here`, [token_words].
template <int kMaxK, int kIdBits>
__device__ __forceinline__ void SendIds(const PushParams& params, uint64_t epoch, int32_t token,
                                        const int32_t (&ids)[kIdsOfLane], uint32_t* here) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  using Ids = Message<kMaxK, kIdBits>;
  const int32_t first = Ids::First();
  if (first >= n.token_words) return;
#pragma unroll 1
  for (int i = 1; i <= p.group.num_ranks; ++i) {  // so that not all send to one rank at once
    const int r = p.group.rank + i < p.group.num_ranks ? p.group.rank + i
                                                       : p.group.rank + i - p.group.num_ranks;
    Ids message;
    message.Pack(ids, r * n.num_local);
    if (r == p.group.rank) {
      message.Store(here + first);
      continue;
    }
    uint64_t* to = IdsOf(*p.group.peers[r], p, n, epoch, p.group.rank, token) + first;
    if constexpr (Ids::kWords == 1) {  // relaxed, as in SendPair
      ptx::StoreRelaxedSystem(to, PackCount(static_cast<int32_t>(message.words[0]), epoch));
    } else {
      SendPair(to, epoch, message.words[0], message.words[1]);
    }
  }
}

// The ids of a thread's first token.
template <int kMaxK>
__device__ __forceinline__ void LoadFirstIds(const PushParams& params, Chunk chunk,
                                             int32_t (&ids)[kIdsOfLane]) {
  const PlanParams& p = params.plan;
  const int32_t t = threadIdx.x / kLanes<kMaxK>;
  LoadValues<kMaxK>(ids, p.topk_idx + int64_t{chunk.begin + t} * p.top_k, p.top_k, params.aligned,
                    t < chunk.count);
}

// Cleans the chunk's entries, sends them, and marks them in the cells of all columns. `ids` are
// those of LoadFirstIds.
template <int kMaxK, int kIdBits, typename Params>
__device__ __forceinline__ void CleanTokens(const Params& params, const PushMemory& shared,
                                            uint64_t epoch, Chunk chunk,
                                            int32_t (&ids)[kIdsOfLane]) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  constexpr bool kByToken = Params::kLayout == Layout::kToken;
  int32_t num_invalid = 0;
  ForTokens<kMaxK>(n, 1, [&](int32_t, int32_t t) {
    const int32_t token = chunk.begin + t;
    const int64_t first = int64_t{token} * p.top_k;
    const bool inside = t < chunk.count;
    if (t >= kThreads / kLanes<kMaxK>) {
      LoadValues<kMaxK>(ids, p.topk_idx + first, p.top_k, params.aligned, inside);
    }
    num_invalid += CleanIds<kMaxK>(ids, p.num_experts);
    if (inside) {
      SendIds<kMaxK, kIdBits>(params, epoch, token, ids, shared.ids + t * n.token_words);
    }
    uint32_t ranks = 0;
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      if (ids[j] == plan::kNone) continue;
      if (kByToken) ranks |= 1u << n.by_num_local(ids[j]);
      Mark(n, shared.cells, kByToken ? p.group.num_ranks + ids[j] : ids[j], t);
    }
    if (kByToken) {
#pragma unroll 2
      for (int r = 0; r < p.group.num_ranks; ++r) {
        MarkTogether(n, shared.cells, r, t, (ranks >> r & 1) != 0);
      }
    }
    if (!inside) return;
    StoreValues<kMaxK>(p.topk + first, ids, p.top_k, params.aligned);
    StoreValues<kMaxK>(shared.records + t * kMaxK, ids, kMaxK, true);
  });
  if (num_invalid != 0) atomicAdd(&shared.sent[n.invalid], num_invalid);
}

// Lists entries of this rank's columns in layout "expert": `first` is the number of the lane's
// first one in the chunk.
__device__ __forceinline__ void ListEntries(const PushMemory& shared,
                                            const bool (&listed)[kIdsOfLane],
                                            const int32_t (&slots)[kIdsOfLane],
                                            const int32_t (&positions)[kIdsOfLane], int32_t first) {
  int32_t places[kIdsOfLane];
#pragma unroll
  for (int j = 0; j < kIdsOfLane; ++j) places[j] = listed[j] ? shared.lists[slots[j]].place : 0;
#pragma unroll
  for (int j = 0; j < kIdsOfLane; ++j) {
    if (listed[j]) shared.list[places[j] + positions[j]] = static_cast<uint16_t>(first + j);
  }
}

// Own entries get their position in the chunk: records become column | position << 16. Those that
// are here are listed.
template <int kMaxK, typename Params>
__device__ __forceinline__ void PlaceOwnEntries(const Params& params, const PushMemory& shared,
                                                Chunk chunk) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  constexpr bool kByToken = Params::kLayout == Layout::kToken;
  ForTokens<kMaxK>(n, 1, [&](int32_t, int32_t t) {
    if (t >= chunk.count) return;
    int32_t records[kIdsOfLane], slots[kIdsOfLane], positions[kIdsOfLane];
    bool here[kIdsOfLane];
    Cell cells[kIdsOfLane];
    LoadValues<kMaxK>(records, shared.records + t * kMaxK, kMaxK, true, true);
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      if (kByToken && records[j] != plan::kNone) records[j] = n.by_num_local(records[j]);
      cells[j] = {0, 0};
      if (records[j] != plan::kNone) cells[j] = CellOf(n, shared.cells, records[j], t);
    }
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      slots[j] = records[j] - p.group.rank * n.here;
      here[j] = records[j] != plan::kNone &&
                static_cast<uint32_t>(slots[j]) < static_cast<uint32_t>(n.here);
      positions[j] = PositionOf(cells[j], t);
      if (records[j] != plan::kNone) records[j] |= positions[j] << 16;
    }
    if (!kByToken) {
      ListEntries(shared, here, slots, positions, t * p.top_k + FirstK<kMaxK>());
    }
    StoreValues<kMaxK>(shared.records + t * kMaxK, records, kMaxK, true);
  });
}

// Ids of tokens of a batch's peers, taken in the order of ForTokens. Several messages are being
// loaded while one is used.
template <int kMaxK, int kIdBits, typename Params>
class IncomingIds {
 public:
  using Ids = Message<kMaxK, kIdBits>;

  __device__ __forceinline__ IncomingIds(const Params& params, uint64_t epoch, Chunk chunk,
                                         Batch batch)
      : params_(params), epoch_(epoch), chunk_(chunk), batch_(batch) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) Load(ahead_[j], threadIdx.x / 32 + j * kWarps);
  }

  // Takes them all, and marks them in the cells of their slots; false once the group has failed.
  __device__ __forceinline__ bool Take(const PushMemory& shared) {
    const PushShape& n = params_.shape;
    bool ok = true;
    const int num_own = batch_.NumOwn();
    int32_t task = threadIdx.x / 32;
    ForTokens<kMaxK>(n, batch_.count - num_own, [&](int32_t nth, int32_t t) {
      Words<Ids::kWords> words = ahead_[0];
#pragma unroll
      for (int j = 0; j + 1 < kAhead; ++j) ahead_[j] = ahead_[j + 1];
      Load(ahead_[kAhead - 1], task + kAhead * kWarps);
      task += kWarps;
      const uint64_t* from = From(nth, t);
      Ids ids;
      ids.SetNone();
      if (from != nullptr) {
        const int s = num_own + nth;
        ok = ok &&
             words.Await(params_.plan.group, epoch_, batch_.Source(params_.plan.group, s), from);
        if (ok) {
#pragma unroll
          for (int w = 0; w < Ids::kWords; ++w) ids.words[w] = words.Data(w);
        }
        ids.Store(shared.ids + (s * n.chunk + t) * n.token_words + Ids::First());
      }
      bool is_here = false;
#pragma unroll
      for (int j = 0; j < kIdsOfLane; ++j) {
        const int32_t id = ids.Id(j);
        if (id >= n.num_local) continue;
        is_here = true;
        if (!kByToken) Mark(n, shared.peer_cells, nth * n.here + id, t);
      }
      if (kByToken) MarkTogether(n, shared.peer_cells, nth, t, is_here);
    });
    return ok;
  }

 private:
  static constexpr int kAhead = Ids::kWords == 1 ? 3 : 2;
  static constexpr bool kByToken = Params::kLayout == Layout::kToken;

  // Where this lane's words of a token arrive, if it has any.
  __device__ __forceinline__ const uint64_t* From(int32_t nth, int32_t t) const {
    if (t >= chunk_.count || Ids::First() >= params_.shape.token_words) return nullptr;
    const int source = batch_.Source(params_.plan.group, batch_.NumOwn() + nth);
    return IdsOf(Own(params_.plan.group), params_.plan, params_.shape, epoch_, source,
                 chunk_.begin + t) +
           Ids::First();
  }
  __device__ __forceinline__ void Load(Words<Ids::kWords>& words, int32_t task) const {
    const PushShape& n = params_.shape;
    if (task >= (batch_.count - batch_.NumOwn()) * n.tasks) return;
    const int32_t nth = n.by_tasks(task);
    const uint64_t* from = From(nth, TokenOfTask<kMaxK>(task - nth * n.tasks));
    if (from != nullptr) words.Load(from);
  }

  const Params& params_;
  const uint64_t epoch_;
  const Chunk chunk_;
  const Batch batch_;
  Words<Ids::kWords> ahead_[kAhead] = {};
};

// Layout "expert": the entries here of a token of the batch's `nth` peer.
template <int kMaxK, int kIdBits>
struct PeerEntries {
  bool here[kIdsOfLane];
  int32_t slots[kIdsOfLane];
  int32_t positions[kIdsOfLane];  // in the slot

  __device__ __forceinline__ PeerEntries(const PushShape& n, const PushMemory& shared, int32_t s,
                                         int32_t nth, int32_t t, bool inside) {
    using Ids = Message<kMaxK, kIdBits>;
    Ids ids;
    ids.SetNone();
    if (inside && Ids::First() < n.token_words) {
      ids.Load(shared.ids + (s * n.chunk + t) * n.token_words + Ids::First());
    }
    Cell cells[kIdsOfLane];
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      const int32_t id = ids.Id(j);
      here[j] = id < n.num_local;
      slots[j] = s * n.here + id;
      cells[j] = {0, 0};
      if (here[j]) cells[j] = CellOf(n, shared.peer_cells, nth * n.here + id, t);
    }
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) positions[j] = PositionOf(cells[j], t);
  }
};

// Layout "expert": lists the entries whose ids were taken.
template <int kMaxK, int kIdBits>
__device__ __forceinline__ void ListPeerEntries(const PushParams& params, const PushMemory& shared,
                                                Chunk chunk, Batch batch) {
  const PushShape& n = params.shape;
  const int num_own = batch.NumOwn();
  ForTokens<kMaxK>(n, batch.count - num_own, [&](int32_t nth, int32_t t) {
    const PeerEntries<kMaxK, kIdBits> entries(n, shared, num_own + nth, nth, t, t < chunk.count);
    ListEntries(shared, entries.here, entries.slots, entries.positions,
                t * params.plan.top_k + FirstK<kMaxK>());
  });
}

// Layout "expert": the rows here of a source's token, ascending. Called by whole warps.
template <int kMaxK>
__device__ __forceinline__ void StoreRecvRows(const PushParams& params, int64_t token, bool inside,
                                              int32_t (&rows)[kIdsOfLane]) {
  const int32_t num_rows = plan::Min(params.plan.top_k, params.shape.num_local);
  Sort<kMaxK>(rows);
  if (!inside) return;
  StoreValues<kMaxK>(params.plan.recv_rows + token * num_rows, rows, num_rows, params.aligned);
}

// The rows of own entries on all ranks, and in layout "expert" those here by token.
template <int kMaxK, typename Params>
__device__ __forceinline__ void WriteOwnRows(const Params& params, const PushMemory& shared,
                                             Chunk chunk) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  ForTokens<kMaxK>(n, 1, [&](int32_t, int32_t t) {
    const bool inside = t < chunk.count;
    int32_t rows[kIdsOfLane];
    ColumnRows columns[kIdsOfLane];
    LoadValues<kMaxK>(rows, shared.records + t * kMaxK, kMaxK, true, inside);
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      columns[j] = {0, 0};
      if (rows[j] != plan::kNone) columns[j] = shared.rows[rows[j] & 0xffff];
    }
    bool here[kIdsOfLane];
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      const int32_t slot = (rows[j] & 0xffff) - p.group.rank * n.here;
      here[j] = static_cast<uint32_t>(slot) < static_cast<uint32_t>(n.here);
      const int32_t row =
          columns[j].first + static_cast<int32_t>(static_cast<uint32_t>(rows[j]) >> 16);
      rows[j] = rows[j] != plan::kNone && row < columns[j].limit ? row : plan::kNone;
    }
    const int32_t own = chunk.begin + t;
    if (inside) {
      StoreValues<kMaxK>(p.dest_row + int64_t{own} * p.top_k, rows, p.top_k, params.aligned);
    }
    if constexpr (Params::kLayout == Layout::kExpert) {
#pragma unroll
      for (int j = 0; j < kIdsOfLane; ++j) rows[j] = here[j] ? rows[j] : plan::kNone;
      StoreRecvRows<kMaxK>(params, int64_t{p.group.rank} * p.num_tokens + own, inside, rows);
    }
  });
}

// Layout "expert": the rows here of the tokens of the batch's peers.
template <int kMaxK, int kIdBits>
__device__ __forceinline__ void WriteRecvRows(const PushParams& params, const PushMemory& shared,
                                              Chunk chunk, Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  const int num_own = batch.NumOwn();
  ForTokens<kMaxK>(n, batch.count - num_own, [&](int32_t nth, int32_t t) {
    const int32_t s = num_own + nth;
    const bool inside = t < chunk.count;
    const PeerEntries<kMaxK, kIdBits> entries(n, shared, s, nth, t, inside);
    int32_t rows[kIdsOfLane];
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      ColumnRows slot{0, 0};
      if (entries.here[j]) slot = shared.slots[entries.slots[j]].rows;
      const int32_t row = slot.first + entries.positions[j];
      rows[j] = row < slot.limit ? row : plan::kNone;
    }
    const int64_t token = int64_t{batch.Source(p.group, s)} * p.num_tokens + chunk.begin + t;
    StoreRecvRows<kMaxK>(params, token, inside, rows);
  });
}

// Layout "token": the rows here of the tokens of all the batch's sources. `drops`: kept pairs are
// counted.
template <int kMaxK, int kIdBits>
__device__ __forceinline__ void WriteTokenRows(const PushParams& params, const PushMemory& shared,
                                               Chunk chunk, Batch batch, bool drops) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  using Ids = Message<kMaxK, kIdBits>;
  const int num_own = batch.NumOwn();
  ForTokens<kMaxK>(n, batch.count, [&](int32_t s, int32_t t) {
    if (t >= chunk.count) return;
    Ids ids;
    ids.SetNone();
    if (Ids::First() < n.token_words) {
      ids.Load(shared.ids + (s * n.chunk + t) * n.token_words + Ids::First());
    }
    const Cell cell = s < num_own ? CellOf(n, shared.cells, p.group.rank, t)
                                  : CellOf(n, shared.peer_cells, s - num_own, t);
    int32_t row = shared.slots[s].rows.first + PositionOf(cell, t);
    if ((cell.mask >> (t % 32) & 1) == 0 || row >= p.capacity) row = plan::kNone;
    const int32_t token = batch.Source(p.group, s) * p.num_tokens + chunk.begin + t;
    if (FirstK<kMaxK>() == 0) {
      p.recv_rows[token] = row;
      if (row != plan::kNone) p.recv_src[row] = token;
    }
    if (row == plan::kNone) return;
    int32_t experts[kIdsOfLane];
#pragma unroll
    for (int j = 0; j < kIdsOfLane; ++j) {
      const bool here = ids.Id(j) < n.num_local;
      experts[j] = here ? ids.Id(j) : plan::kNone;
      if (drops && here) atomicAdd(&shared.kept[ids.Id(j)], 1);
    }
    StoreValues<kMaxK>(p.expert_idx + int64_t{row} * p.top_k, experts, p.top_k, params.aligned);
  });
}

}  // namespace
}  // namespace jax_ep::cuda
