// Receiving rows: readers go through this rank's entries, those from ranks of its host and those
// that came in chunks from other hosts.
#pragma once

#include <cstdint>

#include "cuda/network/chunks.cuh"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"

namespace jax_ep::cuda {

// Calls `bring(index, entries)` for the `number`-th of `num_readers` shares of the entries from
// each rank `index` of this host. By one warp.
template <typename Bring>
__device__ void ReadHost(const NetworkParams& network, const NetworkRoutes& routes, int32_t number,
                         int32_t num_readers, Bring&& bring) {
  const int32_t host_ranks = network.shape.host_ranks;
  for (int32_t i = 0; i < host_ranks; ++i) {
    // Begins after this rank, so that not all ranks read from the same one at once.
    const int32_t index = (network.node.rank + 1 + i) % host_ranks;
    const int32_t source = network.host * host_ranks + index;
    bring(index, ShareOfEntries(routes, source, number, num_readers));
  }
}

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

// Calls `bring(entries, rows)` for this rank's entries in each chunk that comes by the block's
// ways, from any rank of another host. Called by a team: each warp calls `bring` for all chunks and
// does a share. When `bring` returns, the warp's reads of the chunk must be complete. False once
// the group has failed.
template <typename Bring>
__device__ bool ReadChunks(const NetworkParams& network, const NetworkRoutes& routes,
                           int32_t num_tokens, int32_t chunk_row_bytes, const Ways& ways,
                           uint64_t epoch, TeamMember& self, Bring&& bring) {
  const NetworkShape& shape = network.shape;
  const int32_t window_tokens = WindowTokens(shape, chunk_row_bytes);
  const auto read = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t index = (network.node.rank + turn) % shape.host_ranks;
    const int32_t source = way.host * shape.host_ranks + index;
    const int32_t first = window * window_tokens;
    const int32_t last = routes.recv_start[source + 1];
    EntryRange entries;
    entries.begin = FirstEntry(routes.recv_token, routes.recv_start[source], last, first);
    entries.end = FirstEntry(routes.recv_token, entries.begin, last, first + window_tokens);
    const ChunkReader chunks(network, way, index, epoch);
    if (!chunks.Wait(n, window)) return false;
    TestDelay(network.node.rank, epoch, 4);
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
