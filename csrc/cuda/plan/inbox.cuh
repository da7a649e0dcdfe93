// The sizes, the shared memory and the messages of the plan's fast kernel (push.cu).
#pragma once

#include <cstdint>

#include "cuda/core/divide.h"
#include "cuda/plan/common.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = kPushPlanBlocks;  // of the cluster; any GPU of this kind can hold them
// The shared memory that a block may have, less its static part.
constexpr size_t kMaxPushBytes = 226 << 10;
// Up to this much shared memory is used to number more sources at a time.
constexpr size_t kGoodPushBytes = 190 << 10;
// Counts, positions and slot numbers have 16 bits.
constexpr int64_t kMaxCount = 0xffff;

// x / divisor for all x from 0 and divisors from 1 to 2^31 - 1.
struct WideDivider {
  uint32_t factor;
  int32_t shift;

  static WideDivider By(int32_t divisor) {
    int32_t shift = 31;
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    const uint64_t d = static_cast<uint32_t>(divisor);
    return {static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d), shift};
  }
  __device__ __forceinline__ int32_t operator()(int32_t x) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(x)} * factor >> shift);
  }
};

// Sizes that follow from the static shape. Here a *slot* is a column of this rank together with a
// source, this rank included.
struct PushShape {
  int32_t num_local;    // experts
  int32_t here;         // columns of a rank
  int32_t row_columns;  // that rows are counted by
  int32_t columns;      // that are counted: in layout "token" all experts after the ranks
  int32_t invalid;      // where a block sends how many invalid entries it has; even
  int32_t quads;        // of counts that a block sends: columns, then invalid entries
  int32_t chunk;        // tokens of a block, a multiple of 32
  int32_t words;        // of a column's mask
  int32_t tasks;        // warps that a chunk's tokens take: see ForTokens
  int32_t stride;       // of a column's cells; odd
  int32_t id_bits;      // of an expert id in a message: 8 or 16
  int32_t token_words;  // of a token's message; even
  int32_t sources;      // whose tokens are numbered at a time
  int32_t parts;        // of a rank's experts, 32 each
  bool apart;           // peers' cells lie beside own ones, not over them
  Divider by_num_local, by_num_here, by_tasks, by_quads, by_parts;
  WideDivider by_alignment;
  // Views of a block's shared memory, in int32.
  int32_t cells, peer_cells, ids, list, totals, sent, rows, demand, sums, starts, slots, lists,
      kept, end;
};

// The entries of a column (or slot) in 32 consecutive tokens.
struct alignas(8) Cell {
  uint32_t mask;   // of tokens
  int32_t before;  // entries in the cells before this one
};

// The rows of a column for this rank's chunk, from `first` on; those from `limit` on are dropped.
struct alignas(8) ColumnRows {
  int32_t first;
  int32_t limit;
};

// Where a slot's entries are in the list.
struct alignas(8) SlotList {
  int32_t place;
  int32_t count;
};

// The rows of a slot: its entries are listed from `place` on. `source` is the EncodeSource of the
// source's first entry.
struct alignas(16) SlotRows {
  ColumnRows rows;
  int32_t place;
  int32_t source;
};

struct PushMemory {
  int32_t* records;  // [chunk, kMaxK] of own entries: expert, then column and position
  Cell* cells;       // [columns, stride] of own entries
  Cell* peer_cells;  // [slots of peers, stride]
  uint32_t* ids;     // [sources, chunk, token_words] local experts, packed
  uint16_t* list;    // entries here, by slot, as numbered in the chunk of the source (layout
                     // "expert"; in layout "token" rows follow each other as tokens do)
  uint32_t* totals;  // [R, columns] entries of the rank, and of its blocks before this one above
  int32_t* sent;     // [4 * quads] counts of this block, by column
  ColumnRows* rows;  // [row_columns]
  int32_t* demand;   // [row_columns]
  int32_t* sums;     // [R, parts] rows of 32 experts together
  int32_t* starts;   // [row_columns] first row of the column on its rank
  SlotRows* slots;   // [sources, here]
  SlotList* lists;   // [sources, here] (layout "expert")
  int32_t* kept;     // [L] pairs kept of each local expert (layout "token")

  __device__ PushMemory(const PushShape& n, int32_t* memory) {
    records = memory;
    cells = reinterpret_cast<Cell*>(memory + n.cells);
    peer_cells = reinterpret_cast<Cell*>(memory + n.peer_cells);
    ids = reinterpret_cast<uint32_t*>(memory + n.ids);
    list = reinterpret_cast<uint16_t*>(memory + n.list);
    totals = reinterpret_cast<uint32_t*>(memory + n.totals);
    sent = memory + n.sent;
    rows = reinterpret_cast<ColumnRows*>(memory + n.rows);
    demand = memory + n.demand;
    sums = memory + n.sums;
    starts = memory + n.starts;
    slots = reinterpret_cast<SlotRows*>(memory + n.slots);
    lists = reinterpret_cast<SlotList*>(memory + n.lists);
    kept = memory + n.kept;
  }
};

// Ids of a token that one lane of a warp holds; the lanes beside it hold the token's other ids.
constexpr int kIdsOfLane = 4;

// Ids that the lanes of a token hold: K, rounded up to a number that has a kernel.
int32_t MaxTopK(const PlanParams& p) { return p.top_k <= 8 ? 8 : 32; }

void LayOutShared(const PlanParams& p, PushShape& n) {
  int32_t end = n.chunk * MaxTopK(p);  // records
  const auto add = [&](int64_t count) {
    const int32_t begin = end;
    end += static_cast<int32_t>((count + 3) / 4 * 4);
    return begin;
  };
  const bool by_expert = p.layout == Layout::kExpert;
  const int64_t slots = int64_t{n.sources} * n.here;
  const int64_t tokens = int64_t{n.sources} * n.chunk;
  const int64_t own_cells = 2 * int64_t{n.stride} * n.columns;
  const int64_t peer_cells =
      2 * int64_t{n.stride} * (n.sources < p.group.num_ranks ? slots : slots - n.here);
  n.cells = add(n.apart || own_cells > peer_cells ? own_cells : peer_cells);
  n.peer_cells = n.apart ? add(peer_cells) : n.cells;
  n.ids = add(tokens * n.token_words);
  // A token is in no more slots than it has ids, whatever a message contains.
  const int32_t token_ids = n.token_words * (32 / n.id_bits);
  const int64_t listed = tokens * plan::RowsPerSource(p.layout, token_ids, n.num_local);
  n.list = add(by_expert ? (listed + 1) / 2 : 0);
  n.totals = add(int64_t{p.group.num_ranks} * n.columns);
  n.sent = add(4 * n.quads);
  n.rows = add(2 * n.row_columns);
  n.demand = add(n.row_columns);
  n.sums = add(by_expert ? int64_t{p.group.num_ranks} * n.parts : 0);
  n.starts = add(n.row_columns);
  n.slots = add(4 * slots);
  n.lists = add(by_expert ? 2 * slots : 0);
  n.kept = add(by_expert ? 0 : n.num_local);
  n.end = end;
}

PushShape PushShapeOf(const PlanParams& p) {
  PushShape n;
  const bool by_expert = p.layout == Layout::kExpert;
  n.num_local = p.num_experts / p.group.num_ranks;
  n.here = NumColumnsHere(p);
  n.row_columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  n.columns = n.row_columns + (by_expert ? 0 : p.num_experts);
  n.invalid = (n.columns + 1) / 2 * 2;
  n.quads = n.invalid / 4 + 1;
  n.chunk = ((p.num_tokens + kBlocks - 1) / kBlocks + 31) / 32 * 32;
  n.words = n.chunk / 32;
  n.stride = n.words | 1;
  n.tasks = n.words * (MaxTopK(p) / kIdsOfLane);
  n.id_bits = n.num_local <= 0xff && p.top_k <= 8 ? 8 : 16;
  const int32_t ids_of_pair = 64 / n.id_bits;
  n.token_words = 2 * ((p.top_k + ids_of_pair - 1) / ids_of_pair);
  n.by_num_local = Divider::By(n.num_local);
  n.by_num_here = Divider::By(n.here);
  n.by_tasks = Divider::By(n.tasks);
  n.by_quads = Divider::By(n.quads);
  n.parts = (n.num_local + 31) / 32;
  n.by_parts = Divider::By(n.parts);
  n.by_alignment = WideDivider::By(p.alignment);
  const auto fits = [&](bool apart) {
    n.apart = apart;
    LayOutShared(p, n);
    return n.end * sizeof(int32_t) <= kGoodPushBytes;
  };
  n.sources = p.group.num_ranks;
  while (!fits(true) && !fits(!by_expert) && n.sources > 1) n.sources = (n.sources + 1) / 2;
  return n;
}

struct PushParams {
  PlanParams plan;
  PushShape shape;
  bool aligned;  // all arrays, to 16 bytes
};

// The same for one layout, so that its kernel does not fetch code of the other layout.
template <Layout kOf>
struct LayoutParams : PushParams {
  static constexpr Layout kLayout = kOf;
};

// The tokens of a block.
struct Chunk {
  int32_t begin;
  int32_t count;
};

// The sources that are numbered at a time: consecutive ranks of a circle that begins with this one.
struct Batch {
  int first;
  int count;

  // Own entries are marked and listed before those of messages.
  __device__ __forceinline__ int NumOwn() const { return first == 0 ? 1 : 0; }
  __device__ __forceinline__ int Source(const GroupParams& group, int s) const {
    const int rank = group.rank + first + s;
    return rank < group.num_ranks ? rank : rank - group.num_ranks;
  }
};

__device__ __forceinline__ int32_t NumPeerSlots(const PushShape& n, Batch batch) {
  return (batch.count - batch.NumOwn()) * n.here;
}

// The inbox: [R, kBlocks, quads] pairs of counts, then [R, T, token_words] ids (but not its own). A
// word has its data in the upper half, the epoch in the lower one.
__device__ __forceinline__ uint64_t* CountsOf(Channel& channel, const PushShape& n, uint64_t epoch,
                                              int source, int block) {
  return channel.inbox[epoch % 2] + 2 * (source * kBlocks + block) * n.quads;
}
__device__ __forceinline__ uint64_t* IdsOf(Channel& channel, const PlanParams& p,
                                           const PushShape& n, uint64_t epoch, int source,
                                           int32_t token) {
  return channel.inbox[epoch % 2] + 2 * p.group.num_ranks * kBlocks * n.quads +
         (source * p.num_tokens + token) * n.token_words;
}
int64_t InboxWords(const PlanParams& p, const PushShape& n) {
  return int64_t{p.group.num_ranks} *
         (2 * kBlocks * n.quads + int64_t{p.num_tokens} * n.token_words);
}

// Relaxed, because each word has its whole message.
__device__ __forceinline__ void SendPair(uint64_t* to, uint64_t epoch, uint32_t first,
                                         uint32_t second) {
  ptx::StoreRelaxedSystem(to, PackCount(static_cast<int32_t>(first), epoch),
                          PackCount(static_cast<int32_t>(second), epoch));
}

// Neighbouring words of an inbox, on their way from `source`.
template <int kCount>
struct Words {
  uint64_t values[kCount];

  __device__ __forceinline__ void Load(const uint64_t* from) {
    if constexpr (kCount == 1) {
      values[0] = ptx::LoadRelaxedSystem(from);
    } else {
      ptx::LoadRelaxedSystem(from, values[0], values[1]);
    }
  }
  __device__ __forceinline__ bool IsOf(uint64_t epoch) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      all = all && static_cast<uint32_t>(values[i]) == static_cast<uint32_t>(epoch);
    }
    return kMutation == kWithoutPlanWords || all;
  }
  // The last word with another epoch, for the report of a wait.
  __device__ __forceinline__ uint64_t Missing(uint64_t epoch) const {
    uint64_t missing = values[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      if (static_cast<uint32_t>(values[i]) != static_cast<uint32_t>(epoch)) missing = values[i];
    }
    return missing;
  }
  // Returns once all are of this epoch; false once the group has failed.
  __device__ __forceinline__ bool Await(const GroupParams& group, uint64_t epoch, int source,
                                        const uint64_t* from) {
    for (Deadline deadline; !IsOf(epoch);) {
      if (!deadline.Continue(group, WordKind::kMessage, source, epoch, Missing(epoch))) {
        return false;
      }
      Load(from);
    }
    return true;
  }
  __device__ __forceinline__ uint32_t Data(int i) const {
    return static_cast<uint32_t>(values[i] >> 32);
  }
};
using Pair = Words<2>;

}  // namespace
}  // namespace jax_ep::cuda
