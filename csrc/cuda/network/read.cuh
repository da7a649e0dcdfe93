// Receiving rows: readers go through this rank's entries, those from ranks of its host and those
// that came in chunks from other hosts.
#pragma once

#include <cstdint>

#include "cuda/network/chunks.cuh"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"

namespace jax_ep::cuda {

// A warp's share of the entries from the ranks of this host, in small steps: what it does while it
// has to wait for chunks. Readers take turns, so that all of them are at about the same tokens.
class HostEntries {
 public:
  // The `number`-th of `num_readers` shares.
  __device__ HostEntries(const NetworkParams& network, const NetworkRoutes& routes, int32_t number,
                         int32_t num_readers)
      : network_(network), routes_(routes), number_(number), num_readers_(num_readers) {}

  // Calls `bring(index, entries)` for the next few entries, all from rank `index` of this host.
  // False once there are none left. By one warp.
  template <typename Bring>
  __device__ bool Step(Bring&& bring) {
    const int32_t host_ranks = network_.shape.host_ranks;
    while (next_ >= end_) {
      if (num_begun_ == host_ranks) return false;
      // Beginning after this rank, so that not all read from the same one.
      index_ = (network_.node.rank + 1 + num_begun_++) % host_ranks;
      const int32_t source = network_.host * host_ranks + index_;
      first_ = routes_.recv_start[source], end_ = routes_.recv_start[source + 1];
      next_ = first_ + number_ * kStep;
    }
    const EntryRange now{StartOfToken(next_), StartOfToken(plan::Min(next_ + kStep, end_))};
    next_ += num_readers_ * kStep;
    bring(index_, now);
    return true;
  }

 private:
  static constexpr int kStep = 16;  // entries, or a few more or less, so that no token is cut

  // The first entry from `at` on that is the first of its token. By one warp.
  __device__ int32_t StartOfToken(int32_t at) const {
    const int32_t* const tokens = routes_.recv_token;
    // A token has at most 32 entries.
    const int32_t mine = at + static_cast<int32_t>(threadIdx.x % 32);
    const bool is_first = mine == first_ || mine >= end_ || tokens[mine] != tokens[mine - 1];
    const uint32_t firsts = __ballot_sync(~0u, is_first);
    return firsts != 0 ? at + __ffs(static_cast<int>(firsts)) - 1 : plan::Min(at + 32, end_);
  }

  const NetworkParams& network_;
  const NetworkRoutes& routes_;
  int32_t number_, num_readers_;
  int32_t num_begun_ = 0, index_ = 0;  // ranks
  // The entries of rank `index_`, and where this warp's next step among them is.
  int32_t first_ = 0, end_ = 0, next_ = 0;
};

// The rows of a window's tokens in a chunk.
struct ChunkRows {
  const char* rows;
  int32_t row_bytes;  // of a row, with what goes with it
  int32_t first;      // token of the window
  uint32_t tokens;    // of the window, one bit each, that have a row here

  __device__ const char* Of(int32_t token) const {
    return rows + __popc(tokens & ((1u << (token - first)) - 1)) * row_bytes;
  }
};

// Calls `bring(entries, rows)` for this rank's entries in each chunk, from any rank of another
// host, that comes by the block's ways. By a team: each warp calls it for all chunks, and does a
// share. When it returns, all of the warp's reads of the chunk have to be complete. While a chunk
// is not there, calls `meanwhile()`, which does something else, or returns false if there is
// nothing to do. False once the group has failed.
template <typename Bring, typename Meanwhile>
__device__ bool ReadChunks(const NetworkParams& network, const NetworkRoutes& routes,
                           int32_t num_tokens, int32_t chunk_row_bytes, const Ways& ways,
                           uint64_t epoch, TeamMember& self, Bring&& bring, Meanwhile&& meanwhile) {
  const NetworkShape& shape = network.shape;
  const int32_t window_tokens = ways.WindowTokens(shape, chunk_row_bytes, num_tokens);
  EntryCursors cursors;
  const auto read = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t index = (network.node.rank + turn) % shape.host_ranks;
    const int32_t source = way.host * shape.host_ranks + index;
    const int32_t first = window * window_tokens;
    const EntryRange entries =
        cursors.Find(routes, num_tokens, source, turn, first, first + window_tokens);
    const ChunkReader chunks(network, way, index, epoch);
    while (!chunks.IsHere(n, window) && meanwhile()) {
    }
    if (!chunks.Wait(n, window)) return false;
    TestDelay(network.node.rank, epoch, 4, self.warp);
    const char* const chunk = chunks.Memory(n);
    uint32_t tokens = 0;
    if (threadIdx.x % 32 == 0) tokens = __ldcg(reinterpret_cast<const uint32_t*>(chunk));
    tokens = __shfl_sync(~0u, tokens, 0);
    bring(entries, ChunkRows{chunk + sizeof(ChunkHeader), chunk_row_bytes, first, tokens});
    bool ok = true;
    if (self.IsTeller(network.node, ok)) chunks.Done(n, window);
    return ok;
  };
  return ForEachWindow(network, ways, num_tokens, window_tokens, shape.host_ranks, read);
}

}  // namespace jax_ep::cuda
