// The memory that hosts reach over the network: chunks of rows in flight, and their words.
//
// Every rank has one such piece of memory, at the same offset of the symmetric heap. The network
// connects it with those of the rank's *counterparts*, which have the same index on the other
// hosts. NVLink connects it with those of the ranks of its own host. A row for any rank of a host
// is sent once, to the counterpart there. That rank is the row's *forwarder*: the ranks of its host
// read the row from its memory.
//
// Rows travel in chunks. There is one chunk for each *window* of a few neighbouring tokens and each
// other host. It has the rows of those tokens that go there, and a mask that says which they are.
// So both ends know how many chunks there are and which of them has a token, and all go through
// them in the same order. The windows are split between *lanes*, which have slots of their own. A
// chunk's way out, and the words for each step:
//
//   sender     packs it into `out`, puts it into the counterpart's `in`    arrived, there
//   forwarder  tells the ranks of its host                                 ready, at each of them
//   ranks      read the rows that are theirs                               done, at the forwarder
//   forwarder  tells the sender that both slots are free again             credit, there
//
// On the way home every rank of a host puts its sums of a chunk's rows into a *part*:
//
//   ranks      add their rows of each token into `part`                    part_ready, at the
//                                                                          forwarder
//   forwarder  adds the parts, puts the chunk into the counterpart's `in`  arrived, there
//              has read the parts                                          part_done, at each rank
//   home       has added what came of all hosts                            credit, at the forwarder
//
// Each word has one writer, which writes the next value only after the last one was seen.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::cuda {

constexpr int kMaxHosts = 64;
// Chunks in flight from a rank to one host in one lane.
constexpr int kChunkSlots = 2;

// The sizes that all ranks of a group agree on.
struct NetworkShape {
  int32_t num_hosts;    // P
  int32_t host_ranks;   // n, ranks on each host
  int32_t num_lanes;    // between two ranks, at most
  int32_t chunk_bytes;  // a multiple of 1024

  JAX_EP_HOST_DEVICE int64_t num_slots() const {
    return int64_t{num_hosts} * num_lanes * kChunkSlots;
  }
  // Bytes of words: arrived, credit, sent, and five for every rank of the host; then one for
  // failures, and one for signals that nobody reads.
  JAX_EP_HOST_DEVICE int64_t word_bytes() const {
    return (((3 + 5 * host_ranks) * num_slots() + 2) * 8 + 1023) / 1024 * 1024;
  }
  // Bytes of a rank's whole network memory: words, `in`, `out`, and a part for each rank of the
  // host.
  JAX_EP_HOST_DEVICE int64_t bytes() const {
    return word_bytes() + (2 + host_ranks) * num_slots() * chunk_bytes;
  }
};

// A chunk on its way from or to a host, in a lane.
struct SlotIndex {
  int32_t host;
  int32_t lane;
  int32_t slot;
};

// The parts of one rank's network memory.
class NetworkMemory {
 public:
  JAX_EP_HOST_DEVICE NetworkMemory(char* base, const NetworkShape& shape)
      : base_(base), shape_(shape) {}

  // Written over the network, by the counterpart on that host: a chunk of it is in its slot ...
  JAX_EP_HOST_DEVICE uint64_t* arrived(SlotIndex at) const { return Words(0, at); }
  // ... and the chunk that this rank has sent there has been read by all who need it.
  JAX_EP_HOST_DEVICE uint64_t* credit(SlotIndex at) const { return Words(1, at); }
  // By this rank only: the last chunk that it has sent from the slot.
  JAX_EP_HOST_DEVICE uint64_t* sent(SlotIndex at) const { return Words(2, at); }
  // By rank `index` of this host: the chunk is in its slot of that rank's memory ...
  JAX_EP_HOST_DEVICE uint64_t* ready(int32_t index, SlotIndex at) const {
    return OfRank(0, index, at);
  }
  // ... and that rank has read all that it needs of the chunk in this rank's memory.
  JAX_EP_HOST_DEVICE uint64_t* done(int32_t index, SlotIndex at) const {
    return OfRank(1, index, at);
  }
  // By rank `index` of this host: its part for this rank is there, in that rank's memory ...
  JAX_EP_HOST_DEVICE uint64_t* part_ready(int32_t index, SlotIndex at) const {
    return OfRank(2, index, at);
  }
  // ... and that rank has read the part that this rank has for it.
  JAX_EP_HOST_DEVICE uint64_t* part_done(int32_t index, SlotIndex at) const {
    return OfRank(3, index, at);
  }
  // By this rank only: the last part that it had for rank `index`.
  JAX_EP_HOST_DEVICE uint64_t* part_sent(int32_t index, SlotIndex at) const {
    return OfRank(4, index, at);
  }
  // By any counterpart: not 0 once the group has failed on a host. Never reset.
  JAX_EP_HOST_DEVICE uint64_t* failed() const {
    return Words(3 + 5 * shape_.host_ranks, {0, 0, 0});
  }
  JAX_EP_HOST_DEVICE char* in(SlotIndex at) const { return Chunk(0, at); }
  JAX_EP_HOST_DEVICE char* out(SlotIndex at) const { return Chunk(1, at); }
  // For rank `index` of this host.
  JAX_EP_HOST_DEVICE char* part(int32_t index, SlotIndex at) const { return Chunk(2 + index, at); }

 private:
  JAX_EP_HOST_DEVICE int64_t Number(SlotIndex at) const {
    return (int64_t{at.host} * shape_.num_lanes + at.lane) * kChunkSlots + at.slot;
  }
  JAX_EP_HOST_DEVICE uint64_t* Words(int64_t part, SlotIndex at) const {
    return reinterpret_cast<uint64_t*>(base_) + part * shape_.num_slots() + Number(at);
  }
  JAX_EP_HOST_DEVICE uint64_t* OfRank(int64_t what, int32_t index, SlotIndex at) const {
    return Words(3 + what * shape_.host_ranks + index, at);
  }
  JAX_EP_HOST_DEVICE char* Chunk(int64_t part, SlotIndex at) const {
    return base_ + shape_.word_bytes() +
           (part * shape_.num_slots() + Number(at)) * shape_.chunk_bytes;
  }

  char* base_;
  NetworkShape shape_;
};

// The contents of a word: the number of the op, its tag, and a chunk of it.
constexpr int kChunkBits = 20;
constexpr int kChunkTagBits = 12;
constexpr int32_t kMaxChunks = (1 << kChunkBits) - 1;

JAX_EP_HOST_DEVICE uint64_t ChunkWord(uint64_t epoch, uint32_t tag, int32_t chunk) {
  return epoch << 32 | static_cast<uint64_t>(tag & ((1u << kChunkTagBits) - 1)) << kChunkBits |
         static_cast<uint32_t>(chunk + 1);
}

// The head of a chunk. Rows follow, at multiples of 16 bytes from its end; bulk copies are faster
// from multiples of more.
struct alignas(128) ChunkHeader {
  uint32_t tokens;  // one bit for each token of the window: whether its row follows, in order
};
constexpr int kMaxWindow = 32;

// The most tokens of a window, so that a chunk has room for all of their rows. `row_bytes` includes
// what goes with a row. 0 if a chunk has no room for a single row.
JAX_EP_HOST_DEVICE int32_t MostWindowTokens(const NetworkShape& shape, int32_t row_bytes) {
  const int32_t room = shape.chunk_bytes - static_cast<int32_t>(sizeof(ChunkHeader));
  const int32_t tokens = row_bytes == 0 ? kMaxWindow : room / row_bytes;
  return tokens < kMaxWindow ? tokens : kMaxWindow;
}

// The number of tokens of a window: less than the most where the lanes' shares are more equal then.
// But windows of a few rows would cost more than that saves.
JAX_EP_HOST_DEVICE int32_t WindowTokens(const NetworkShape& shape, int32_t row_bytes,
                                        int32_t num_tokens, int32_t num_lanes) {
  constexpr int32_t kFewestBytes = 32 << 10, kMoreTurns = 4;
  const auto divide = [](int32_t x, int32_t by) { return (x + by - 1) / by; };
  const int32_t most = MostWindowTokens(shape, row_bytes);
  if (most == 0 || row_bytes == 0) return most;
  const int32_t fewest = divide(kFewestBytes, row_bytes);
  // The largest share of a lane.
  const auto share = [&](int32_t tokens) {
    return divide(divide(num_tokens, tokens), num_lanes) * tokens;
  };
  const int32_t turns = divide(num_tokens, most * num_lanes);
  int32_t best = most;
  for (int32_t more = 0; more <= kMoreTurns && turns > 0; ++more) {
    int32_t tokens = divide(num_tokens, (turns + more) * num_lanes);
    if (tokens < fewest) tokens = fewest;
    if (tokens < most && share(tokens) < share(best)) best = tokens;
  }
  return best;
}

// The number of windows that a lane has. Lanes take turns: the n-th window of a lane is
// `lane + n * num_lanes`. So all blocks of all ranks are at about the same tokens, and the rows of
// those are neighbours in each expert: few pages of memory are in use at a time.
JAX_EP_HOST_DEVICE int32_t NumWindows(int32_t num_tokens, int32_t tokens_per_window, int32_t lane,
                                      int32_t num_lanes) {
  const int32_t total = (num_tokens + tokens_per_window - 1) / tokens_per_window;
  return lane < total ? (total - lane - 1) / num_lanes + 1 : 0;
}

// The work of the blocks of a kernel between hosts. Each block serves some of the *ways*; a way is
// a lane to a host. All ranks run the same number of blocks.
struct Ways {
  int32_t num_lanes;  // to each host, that are used
  int32_t count;

  // To `num_hosts` hosts.
  JAX_EP_HOST_DEVICE Ways(const NetworkShape& shape, int32_t num_hosts, int32_t num_blocks) {
    num_lanes = num_hosts > 0 ? num_blocks / num_hosts : 0;
    if (num_lanes > shape.num_lanes) num_lanes = shape.num_lanes;
    if (num_lanes < 1) num_lanes = 1;
    count = num_hosts * num_lanes;
  }
  JAX_EP_HOST_DEVICE int32_t WindowTokens(const NetworkShape& shape, int32_t row_bytes,
                                          int32_t num_tokens) const {
    return cuda::WindowTokens(shape, row_bytes, num_tokens, num_lanes);
  }
};

}  // namespace jax_ep::cuda
