// Sending rows: senders pack this rank's rows for other hosts into chunks, and send them.
#pragma once

#include <cstdint>

#include "cuda/network/chunks.cuh"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/pipe.cuh"

namespace jax_ep::cuda {

// How a row is divided for the stages of a pipe.
struct Pieces {
  int32_t row_bytes, bytes, count;
  // Pieces of about the same size, a multiple of `unit` but for the last one, as is `stage_bytes`.
  __host__ __device__ Pieces(int32_t row_bytes, int32_t stage_bytes, int32_t unit = 16)
      : row_bytes(row_bytes), bytes(unit), count(0) {
    if (row_bytes == 0) return;
    count = (row_bytes + stage_bytes - 1) / stage_bytes;
    bytes = plan::RoundUp((row_bytes + count - 1) / count, unit);
    count = (row_bytes + bytes - 1) / bytes;
  }
  __device__ int32_t Offset(int32_t piece) const { return piece * bytes; }
  __device__ int32_t Bytes(int32_t piece) const {
    return plan::Min(bytes, row_bytes - Offset(piece));
  }
};

// What a rank sends: the rows of its tokens, each once to every other host that has an expert of
// it.
struct SentRows {
  const int32_t* topk;  // [T, K]
  int32_t num_tokens;   // T
  int32_t top_k;        // K
  int32_t experts_per_host;
  const void* rows;  // [T, row_bytes]
  int32_t row_bytes;
  int32_t chunk_row_bytes;  // of a row in a chunk, with what goes with it

  __device__ bool GoesTo(int64_t token, int32_t host) const {
    const int32_t first = host * experts_per_host;
    bool goes = false;
#pragma unroll 8  // without an early end, so that the loads do not wait for each other
    for (int32_t k = 0; k < top_k; ++k) {
      const int32_t expert = topk[token * top_k + k];
      goes |= expert >= first && expert - first < experts_per_host;
    }
    return goes;
  }
};

// Sends the chunks of the block's ways, by a team; each of its warps packs a share of the pieces.
// `add(size, nth_token, out)` writes a warp's share of what goes with the rows of a chunk, whose
// first one is at `out`; lane i has the i-th token. False once the group has failed.
template <typename Add>
__device__ bool SendRows(const NetworkParams& network, const SentRows& sent, const Ways& ways,
                         uint64_t epoch, TeamMember& self, Pipe& pipe, Add&& add) {
  const Pieces pieces(sent.row_bytes, pipe.stage_bytes());
  const int32_t window_tokens =
      ways.WindowTokens(network.shape, sent.chunk_row_bytes, sent.num_tokens);
  const int32_t lane = threadIdx.x % 32;
  const auto send = [&](const Way& way, int32_t, int32_t n, int32_t window) {
    const ChunkSender sender(network, way, epoch);
    const int32_t first = window * window_tokens;
    if (!sender.WaitSlot(n)) return false;
    TestDelay(network.node.rank, epoch, 3, self.warp);
    const int32_t count = plan::Min(window_tokens, sent.num_tokens - first);
    const uint32_t tokens = __ballot_sync(~0u, lane < count && sent.GoesTo(first + lane, way.host));
    const int32_t size = __popc(tokens);
    const int32_t nth_token = first + PlaceOfNthBit(tokens);
    char* const chunk = sender.Memory(n);
    char* const out = chunk + sizeof(ChunkHeader);
    if (lane == 0 && self.warp == 0) *reinterpret_cast<ChunkHeader*>(chunk) = {tokens};
    const int32_t num_items = size * pieces.count, first_item = self.TakeShare(num_items);
    const auto item = [&](int32_t i) { return first_item + i * self.num_workers; };
    pipe.Run(
        self.ShareOf(num_items, first_item),
        [&](int32_t i) { return pieces.Bytes(item(i) % pieces.count); },
        [&](int32_t i) {
          const int64_t token = __shfl_sync(~0u, nth_token, item(i) / pieces.count);
          return static_cast<const char*>(sent.rows) + token * sent.row_bytes +
                 pieces.Offset(item(i) % pieces.count);
        },
        [&](int32_t i, const char* stage) {
          if (lane != 0) return;
          const int32_t piece = item(i) % pieces.count;
          ptx::BulkStore(out + item(i) / pieces.count * sent.chunk_row_bytes + pieces.Offset(piece),
                         stage, pieces.Bytes(piece));
        });
    add(size, nth_token, out);
    pipe.Finish();
    bool ok = true;
    if (self.IsTeller(network.node, ok)) {
      sender.Send(n, window,
                  static_cast<int32_t>(sizeof(ChunkHeader)) + size * sent.chunk_row_bytes);
    }
    return ok;
  };
  return ForEachWindow(network, ways, sent.num_tokens, window_tokens, 1, send);
}

}  // namespace jax_ep::cuda
