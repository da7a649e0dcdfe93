// The sizes, the shared memory and the messages of the plan's fast kernel (plan_push.cu).
#pragma once

#include <cstdint>

#include "cuda/plan_common.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;  // of the cluster; any GPU of this kind can hold them
// What a block may have, less its static part.
constexpr size_t kMaxSharedBytes = 226 << 10;
// Shared memory up to which more sources are numbered at a time.
constexpr size_t kGoodSharedBytes = 190 << 10;
// Counts, positions and numbers of slots have 16 bits.
constexpr int64_t kMaxCount = 0xffff;

// x / divisor as a product: for x below 2^16 and divisors up to 2^12.
struct Divider {
  uint32_t factor;

  static Divider By(int32_t divisor) { return {~0u / static_cast<uint32_t>(divisor)}; }
  __device__ __forceinline__ int32_t operator()(int32_t x) const {
    return static_cast<int32_t>(__umulhi(static_cast<uint32_t>(x) + 1, factor));
  }
};

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
  int32_t quads;        // of counts that a block sends: columns, invalid entries
  int32_t chunk;        // tokens of a block, a multiple of 32
  int32_t words;        // of a column's mask
  int32_t stride;       // of a column's cells; odd
  int32_t id_bits;      // of an expert id in a message: 8 or 16
  int32_t token_words;  // of a token's message; even
  int32_t sources;      // whose tokens are numbered at a time
  int32_t parts;        // of a rank's experts, 32 each
  Divider by_num_local, by_words, by_quads, by_parts;
  WideDivider by_alignment;
  // Views of a block's shared memory, in int32.
  int32_t cells, ids, list, totals, sent, rows, demand, sums, starts, slots, firsts, kept, end;
};

// What a column (or slot) has of 32 tokens that follow each other.
struct Cell {
  uint32_t mask;   // of tokens
  int32_t before;  // entries in the cells before this one
};

// The rows of a column for this rank's chunk: [first, limit), of which those from `limit` on are
// dropped.
struct ColumnRows {
  int32_t first;
  int32_t limit;
};

// The same for a slot, together with what its entries are called.
struct alignas(16) SlotRows {
  int32_t offset;  // from the place in the list to the row
  int32_t limit;
  int32_t source;  // EncodeSource of the source's first entry
  int32_t staged;  // its first entry's place in `staging`
};

struct Shared {
  int32_t* records;  // [chunk, kMaxK] of own entries: expert, then column and position
  Cell* cells;       // [columns or slots, stride]
  int32_t* staging;  // [sources, chunk, K or 1] rows here of peers; over the cells after their use
  uint32_t* ids;     // [sources, chunk, token_words] local experts, packed
  uint32_t* list;    // entries here, by slot: in the chunk of the source, and the slot above
  uint32_t* totals;  // [R, columns] entries of the rank, and of its blocks before this one above
  int32_t* sent;     // [4 * quads] counts of this block
  ColumnRows* rows;  // [row_columns]
  int32_t* demand;   // [row_columns]
  int32_t* sums;     // [R, parts] rows of 32 experts together
  int32_t* starts;   // [row_columns] first row of the column on its rank
  SlotRows* slots;   // [sources, here]
  int32_t* firsts;   // [sources, here] place in the list of the slot's first entry
  int32_t* kept;     // [L] pairs kept of each local expert (layout "token")

  __device__ Shared(const PushShape& n, int32_t* memory) {
    records = memory;
    cells = reinterpret_cast<Cell*>(memory + n.cells);
    staging = memory + n.cells;
    ids = reinterpret_cast<uint32_t*>(memory + n.ids);
    list = reinterpret_cast<uint32_t*>(memory + n.list);
    totals = reinterpret_cast<uint32_t*>(memory + n.totals);
    sent = memory + n.sent;
    rows = reinterpret_cast<ColumnRows*>(memory + n.rows);
    demand = memory + n.demand;
    sums = memory + n.sums;
    starts = memory + n.starts;
    slots = reinterpret_cast<SlotRows*>(memory + n.slots);
    firsts = memory + n.firsts;
    kept = memory + n.kept;
  }
};

// Ids that a thread holds: K, rounded up to what there is a kernel for.
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
  const int64_t cells = 2 * int64_t{n.stride} * (slots > n.columns ? slots : n.columns);
  const int64_t staging = tokens * (by_expert ? p.top_k : 1);
  n.cells = add(cells > staging ? cells : staging);
  n.ids = add(tokens * n.token_words);
  // Whatever a message says, a token is in no more slots than it has ids.
  const int32_t token_ids = n.token_words * (32 / n.id_bits);
  n.list = add(tokens * plan::RowsPerSource(p.layout, token_ids, n.num_local));
  n.totals = add(int64_t{p.group.num_ranks} * n.columns);
  n.sent = add(4 * n.quads);
  n.rows = add(2 * n.row_columns);
  n.demand = add(n.row_columns);
  n.sums = add(by_expert ? int64_t{p.group.num_ranks} * n.parts : 0);
  n.starts = add(n.row_columns);
  n.slots = add(4 * slots);
  n.firsts = add(slots);
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
  n.quads = n.columns / 4 + 1;
  n.chunk = ((p.num_tokens + kBlocks - 1) / kBlocks + 31) / 32 * 32;
  n.words = n.chunk / 32;
  n.stride = n.words | 1;
  n.id_bits = n.num_local <= 0xff && p.top_k <= 8 ? 8 : 16;
  const int32_t ids_of_pair = 64 / n.id_bits;
  n.token_words = 2 * ((p.top_k + ids_of_pair - 1) / ids_of_pair);
  n.by_num_local = Divider::By(n.num_local);
  n.by_words = Divider::By(n.words);
  n.by_quads = Divider::By(n.quads);
  n.parts = (n.num_local + 31) / 32;
  n.by_parts = Divider::By(n.parts);
  n.by_alignment = WideDivider::By(p.alignment);
  n.sources = p.group.num_ranks;
  for (LayOutShared(p, n); n.sources > 1 && n.end * sizeof(int32_t) > kGoodSharedBytes;) {
    n.sources = (n.sources + 1) / 2;
    LayOutShared(p, n);
  }
  return n;
}

struct PushParams {
  PlanParams plan;
  PushShape shape;
  bool aligned;  // all arrays, to 16 bytes
};

// The same for one layout, whose kernel then has no code of the other one to fetch.
template <Layout kOf>
struct LayoutParams : PushParams {
  static constexpr Layout kLayout = kOf;
};

// The tokens of a block.
struct Chunk {
  int32_t begin;
  int32_t count;
};

// Sources that are numbered at a time: of all ranks in a circle that begins with this one.
struct Batch {
  int first;
  int count;

  // Own entries are marked and listed before those that come as messages.
  __device__ __forceinline__ int NumOwn() const { return first == 0 ? 1 : 0; }
  __device__ __forceinline__ int Source(const GroupParams& group, int s) const {
    const int rank = group.rank + first + s;
    return rank < group.num_ranks ? rank : rank - group.num_ranks;
  }
};

// The inbox: [R, kBlocks, quads] pairs of counts, then [R, T, token_words] ids (but not its own). A
// word has its data in the upper half, the epoch in the lower one.
__device__ __forceinline__ uint64_t* CountsOf(Workspace& workspace, const PushShape& n,
                                              uint64_t epoch, int source, int block) {
  return workspace.inbox[epoch % 2] + 2 * (source * kBlocks + block) * n.quads;
}
__device__ __forceinline__ uint64_t* IdsOf(Workspace& workspace, const PlanParams& p,
                                           const PushShape& n, uint64_t epoch, int source,
                                           int32_t token) {
  return workspace.inbox[epoch % 2] + 2 * p.group.num_ranks * kBlocks * n.quads +
         (source * p.num_tokens + token) * n.token_words;
}
int64_t InboxWords(const PlanParams& p, const PushShape& n) {
  return int64_t{p.group.num_ranks} *
         (2 * kBlocks * n.quads + int64_t{p.num_tokens} * n.token_words);
}

__device__ __forceinline__ void SendPair(uint64_t* to, uint64_t epoch, uint32_t first,
                                         uint32_t second) {
  ptx::StoreRelaxedSystem(to, PackCount(static_cast<int32_t>(first), epoch),
                          PackCount(static_cast<int32_t>(second), epoch));
}

// Two words of an inbox, on their way from `source`.
struct Pair {
  uint64_t first, second;

  __device__ __forceinline__ void Load(const uint64_t* from) {
    ptx::LoadRelaxedSystem(from, first, second);
  }
  __device__ __forceinline__ bool IsOf(uint64_t epoch) const {
    const uint32_t expected = static_cast<uint32_t>(epoch);
    return kMutation == kWithoutPlanWords ||
           (static_cast<uint32_t>(first) == expected && static_cast<uint32_t>(second) == expected);
  }
  // Called while a wait goes on; false once the group has failed.
  __device__ __forceinline__ bool Continue(Deadline& deadline, const GroupParams& group,
                                           uint64_t epoch, int source) const {
    const uint64_t seen = (first & 0xffffffff) << kTagBits;
    return deadline.Continue(group, Phase::kArrival, source, FlagValue(epoch, group.tag), seen);
  }
  // Returns once both are of this epoch; false once the group has failed.
  __device__ __forceinline__ bool Await(const GroupParams& group, uint64_t epoch, int source,
                                        const uint64_t* from) {
    for (Deadline deadline; !IsOf(epoch);) {
      if (!Continue(deadline, group, epoch, source)) return false;
      Load(from);
    }
    return true;
  }
  __device__ __forceinline__ uint32_t FirstData() const {
    return static_cast<uint32_t>(first >> 32);
  }
  __device__ __forceinline__ uint32_t SecondData() const {
    return static_cast<uint32_t>(second >> 32);
  }
};

}  // namespace
}  // namespace jax_ep::cuda
