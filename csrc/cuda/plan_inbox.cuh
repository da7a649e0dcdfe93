// The sizes, the shared memory and the messages of the plan's fast kernel (plan_push.cu).
#pragma once

#include <cstdint>

#include "cuda/plan_common.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBlocks = 8;  // of the cluster; any GPU of this kind can hold them
constexpr size_t kMaxSharedBytes = 200 << 10;
constexpr uint32_t kNoId = 0xffff;
// Words that are on their way together.
constexpr int kAtOnce = 2;

// Sizes that follow from the parameters.
struct Sizes {
  int32_t columns;
  int32_t here;       // columns of a rank
  int32_t slots;      // own columns, then those here of each peer
  int32_t num_local;  // experts
  int32_t chunk;      // tokens of a block
  int32_t entries;    // of a chunk
  int32_t id_words;   // of a chunk, in the inbox
  int32_t masks;      // words of a slot's mask
  int32_t totals;     // columns, and in layout "token" all experts after them
  int32_t source;     // words of one source in the inbox

  __host__ __device__ explicit Sizes(const PlanParams& p) {
    columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
    here = NumColumnsHere(p);
    slots = NumSlots(p);
    num_local = p.num_experts / p.group.num_ranks;
    chunk = (p.num_tokens + kBlocks - 1) / kBlocks;
    entries = chunk * p.top_k;
    id_words = (entries + 1) / 2;
    masks = (chunk + 31) / 32;
    totals = columns + (p.layout == Layout::kToken ? p.num_experts : 0);
    source = totals + kBlocks * (here + id_words);
  }
};

// Views of a block's shared memory; all int32.
struct Shared {
  int32_t* entries;  // [R, entries]: expert ids, then rows on this rank
  int32_t* before;   // [slots]: rows before this block's chunk
  int32_t* demand;   // [columns]: of all ranks
  int32_t* starts;   // [columns]: first row of the column on its rank
  int32_t* counts;   // [columns]: rows kept of the column
  int32_t* own;      // [totals]: of this rank
  int32_t* found;    // [totals + 1]: in this block's chunk; then its invalid entries
  int32_t* kept;     // [L]: pairs kept of each local expert (layout "token")
  uint32_t* masks;   // [masks, slots]
  int32_t* bits;     // [masks, slots]: set in the words before

  __device__ Shared(const PlanParams& p, const Sizes& n, int32_t* memory) {
    entries = memory;
    before = entries + p.group.num_ranks * n.entries;
    demand = before + n.slots;
    starts = demand + n.columns;
    counts = starts + n.columns;
    own = counts + n.columns;
    found = own + n.totals;
    kept = found + n.totals + 1;
    masks = reinterpret_cast<uint32_t*>(kept + n.num_local);
    bits = reinterpret_cast<int32_t*>(masks + n.slots * n.masks);
  }
};

size_t SharedBytes(const PlanParams& p) {
  const Sizes n(p);
  return sizeof(int32_t) * (size_t(p.group.num_ranks) * n.entries + n.slots + 3 * n.columns +
                            2 * n.totals + 1 + n.num_local + 2 * size_t(n.slots) * n.masks);
}

// Where things are in an inbox.
struct Inbox {
  const Sizes& n;
  int parity;

  __device__ uint64_t* Of(Workspace& workspace, int source) const {
    return workspace.inbox[parity] + int64_t{source} * n.source;
  }
  __device__ int32_t Total(int32_t column) const { return column; }
  __device__ int32_t Prefix(int32_t block, int32_t nth) const {
    return n.totals + block * n.here + nth;
  }
  __device__ int32_t Ids(int32_t block, int32_t word) const {
    return n.totals + kBlocks * n.here + block * n.id_words + word;
  }
};

// Takes `count` words, several at once: `address_of(i)` says where one is, `use(i, data)` gets it.
// False once the group has failed.
template <typename AddressOf, typename Use>
__device__ bool Take(const GroupParams& group, uint64_t epoch, int32_t count, AddressOf address_of,
                     Use use) {
  const uint32_t expected = static_cast<uint32_t>(epoch);
  bool ok = true;
  for (int32_t first = 0; first < count; first += kAtOnce) {
    uint64_t words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < count) words[i] = ptx::LoadRelaxedSystem(address_of(first + i));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) continue;
      for (Deadline deadline;
           ok && kMutation != kWithoutPlanWords && static_cast<uint32_t>(words[i]) != expected;) {
        ok = deadline.Continue(group, Phase::kRows, group.rank, expected,
                               static_cast<uint32_t>(words[i]));
        words[i] = ptx::LoadRelaxedSystem(address_of(first + i));
      }
      if (ok) use(first + i, static_cast<int32_t>(words[i] >> 32));
    }
  }
  return ok;
}

// Sends a word to all peers, or to one.
__device__ void Send(const GroupParams& group, const Inbox& inbox, uint64_t epoch, int peer,
                     int32_t at, int32_t data) {
  ptx::StoreRelaxedSystem(inbox.Of(*group.peers[peer], group.rank) + at, PackCount(data, epoch));
}
__device__ void SendToAll(const GroupParams& group, const Inbox& inbox, uint64_t epoch, int32_t at,
                          int32_t data) {
  for (int r = 0; r < group.num_ranks; ++r) {
    if (r != group.rank) Send(group, inbox, epoch, r, at, data);
  }
}

}  // namespace
}  // namespace jax_ep::cuda
