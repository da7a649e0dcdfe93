// Dispatch between hosts: every row crosses the network once for each host that needs it.
//
// In a block, *senders* pack this rank's rows for other hosts into chunks and send them; the
// *forwarder* tells the ranks of this host what came; *readers* bring this rank's rows, first those
// of ranks on this host from their inputs, then those of other hosts from the forwarders' memory.

#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/dispatch.h"
#include "cuda/network/entries.cuh"
#include "cuda/rows/clear.cuh"
#include "cuda/rows/pipe.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kSenders = 2;  // warps
constexpr int kReaders = 5;
constexpr int kPipes = kSenders + kReaders;  // pipe of warp w; the forwarder is the last warp
constexpr int kThreads = (kPipes + 1) * 32;
constexpr int kStagesBytes = 200 << 10;
constexpr int kStageBytes = kStagesBytes / (kPipes * Pipe::kStages) / 128 * 128;
// Shared memory of a block.
constexpr int kBarriersAt = kZeroBytes;
constexpr int kInputsAt = kBarriersAt + kPipes * Pipe::kStages * static_cast<int>(sizeof(uint64_t));
constexpr int kStagesAt = (kInputsAt + static_cast<int>(sizeof(PeerInputs)) + 127) / 128 * 128;
constexpr int kSharedBytes = kStagesAt + kPipes * Pipe::kStages * kStageBytes;

// How a row is cut for the stages.
struct Pieces {
  int32_t row_bytes, bytes, count;
  __host__ __device__ explicit Pieces(int32_t row_bytes)
      : row_bytes(row_bytes), bytes(16), count(0) {
    if (row_bytes == 0) return;
    count = (row_bytes + kStageBytes - 1) / kStageBytes;
    bytes = plan::RoundUp((row_bytes + count - 1) / count, 16);
    count = (row_bytes + bytes - 1) / bytes;
  }
  __device__ int32_t Offset(int32_t piece) const { return piece * bytes; }
  __device__ int32_t Bytes(int32_t piece) const {
    return plan::Min(bytes, row_bytes - Offset(piece));
  }
};

// A row in a chunk, with its scales and its weights.
struct ChunkRow {
  int32_t scales_at, weights_at, bytes;
  __host__ __device__ explicit ChunkRow(const NetworkDispatchParams& p) {
    scales_at = p.row_bytes;
    weights_at = scales_at + plan::RoundUp(p.scales_per_row * 4, 16);
    bytes = weights_at + (p.weights != nullptr ? plan::RoundUp(p.top_k * 4, 16) : 0);
  }
};

// Tokens of a window: a chunk has room for the rows of all of them.
__host__ __device__ int32_t WindowTokens(const NetworkDispatchParams& p) {
  const int32_t room = p.network.shape.chunk_bytes - static_cast<int32_t>(sizeof(ChunkHeader));
  const int32_t bytes = ChunkRow(p).bytes;
  return bytes == 0 ? kMaxWindow : plan::Min(room / bytes, kMaxWindow);
}

// The n-th of the others among `count`, beginning after `self`, so that not all ask the same one.
__device__ int32_t NthOther(int32_t self, int32_t n, int32_t count) {
  return (self + 1 + n) % count;
}

// Whether a token has an expert on a host.
__device__ bool GoesTo(const NetworkDispatchParams& p, int64_t token, int32_t host) {
  for (int32_t k = 0; k < p.top_k; ++k) {
    const int32_t expert = p.routes.topk[token * p.top_k + k];
    if (expert >= 0 && expert / p.experts_per_host == host) return true;
  }
  return false;
}

// A sender: packs and sends the chunks of every kSenders-th of the block's ways.
__device__ bool SendChunks(const NetworkDispatchParams& p, const Ways& ways, uint64_t epoch,
                           int32_t warp, Pipe& pipe) {
  const NetworkParams& network = p.network;
  const ChunkRow format(p);
  const Pieces pieces(p.row_bytes);
  const int32_t lane = threadIdx.x % 32, window_tokens = WindowTokens(p);
  bool more = true;
  for (int32_t n = 0; more; ++n) {
    more = false;
    for (int32_t number = blockIdx.x + warp * gridDim.x; number < ways.count;
         number += kSenders * gridDim.x) {
      const Way way(ways, network, number);
      const Windows windows(p.num_tokens, window_tokens, way.lane, ways.num_lanes);
      if (n >= windows.count) continue;
      more = true;
      const ChunkSender sender(network, way, epoch);
      const int32_t window = windows.first + n, first = window * window_tokens;
      if (!sender.WaitSlot(n, window)) return false;
      TestDelay(network.node.rank, epoch, 3);
      const int32_t count = plan::Min(window_tokens, p.num_tokens - first);
      const uint32_t tokens = __ballot_sync(~0u, lane < count && GoesTo(p, first + lane, way.host));
      const int32_t size = __popc(tokens);
      // Lane i knows the i-th of them.
      int32_t token = first;
      uint32_t left = tokens;
      for (int32_t i = 0; i < size; ++i, left &= left - 1) {
        if (lane == i) token += __ffs(static_cast<int>(left)) - 1;
      }
      char* const chunk = sender.Memory(n);
      char* const out = chunk + sizeof(ChunkHeader);
      if (lane == 0) *reinterpret_cast<ChunkHeader*>(chunk) = {tokens};
      pipe.Run(
          size * pieces.count, [&](int32_t item) { return pieces.Bytes(item % pieces.count); },
          [&](int32_t item) {
            const int64_t of_item = __shfl_sync(~0u, token, item / pieces.count);
            return static_cast<const char*>(p.x) + of_item * p.row_bytes +
                   pieces.Offset(item % pieces.count);
          },
          [&](int32_t item, const char* stage) {
            if (lane != 0) return;
            const int32_t piece = item % pieces.count;
            ptx::BulkStore(out + item / pieces.count * format.bytes + pieces.Offset(piece), stage,
                           pieces.Bytes(piece));
          });
      for (int32_t i = 0; i < size; ++i) {
        const int64_t of_row = __shfl_sync(~0u, token, i);
        float* const scales = reinterpret_cast<float*>(out + i * format.bytes + format.scales_at);
        for (int32_t j = lane; j < p.scales_per_row; j += 32) {
          scales[j] = p.scales[of_row * p.scales_per_row + j];
        }
        float* const weights = reinterpret_cast<float*>(out + i * format.bytes + format.weights_at);
        for (int32_t k = lane; p.weights != nullptr && k < p.top_k; k += 32) {
          weights[k] = p.weights[of_row * p.top_k + k];
        }
      }
      pipe.Finish();
      sender.Send(n, window, static_cast<int32_t>(sizeof(ChunkHeader)) + size * format.bytes);
    }
  }
  return true;
}

// Where the row of a token, its scales and its weights are.
struct SourceRow {
  const char* row;
  const float* scales;
  const float* weights;
};

// Brings the entries from `begin` to `end`, of one source rank, whose rows are at `where(token)`.
// When it returns, all reads of them are complete. By one warp.
template <typename Where>
__device__ void BringEntries(const NetworkDispatchParams& p, const Pieces& pieces, Pipe& pipe,
                             int32_t begin, int32_t end, Where&& where) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t* const tokens = p.routes.recv_token;
  while (begin < end) {
    int32_t count = plan::Min(32, end - begin);
    int32_t token = plan::kNone, row = 0;
    if (lane < count) {
      token = tokens[begin + lane];
      row = p.routes.recv_row[begin + lane];
    }
    // Entries of the same token lie together, and are read once. The last of them may be cut off,
    // unless it is the only one: no token has more than 32 rows on a rank.
    const int32_t before = __shfl_up_sync(~0u, token, 1);
    uint32_t heads = __ballot_sync(~0u, lane < count && (lane == 0 || token != before));
    const int32_t last_token = __shfl_sync(~0u, token, count - 1);
    if (begin + count < end && __popc(heads) > 1 && tokens[begin + count] == last_token) {
      count = 31 - __clz(static_cast<int>(heads));
      heads &= (1u << count) - 1;
    }
    const int32_t num_tokens = __popc(heads);
    const uint32_t up_to_lane = lane == 31 ? ~0u : (2u << lane) - 1;
    const int32_t number = lane < count ? __popc(heads & up_to_lane) - 1 : plan::kNone;
    // Lane i knows the i-th token.
    int32_t nth_token = 0;
    uint32_t left = heads;
    for (int32_t i = 0; i < num_tokens; ++i, left &= left - 1) {
      const int32_t found = __shfl_sync(~0u, token, __ffs(static_cast<int>(left)) - 1);
      if (lane == i) nth_token = found;
    }
    pipe.Run(
        num_tokens * pieces.count, [&](int32_t item) { return pieces.Bytes(item % pieces.count); },
        [&](int32_t item) {
          const int32_t of_item = __shfl_sync(~0u, nth_token, item / pieces.count);
          return where(of_item).row + pieces.Offset(item % pieces.count);
        },
        [&](int32_t item, const char* stage) {
          if (number != item / pieces.count) return;
          const int32_t piece = item % pieces.count;
          char* target = static_cast<char*>(p.rows) + row * p.row_stride + pieces.Offset(piece);
          ptx::BulkStore(target, stage, pieces.Bytes(piece));
        });
    for (int32_t e = 0; p.scales_per_row != 0 && e < count; ++e) {
      const float* from = where(__shfl_sync(~0u, token, e)).scales;
      float* to = p.row_scales + int64_t{__shfl_sync(~0u, row, e)} * p.scales_per_row;
      for (int32_t j = lane; j < p.scales_per_row; j += 32) to[j] = __ldcg(&from[j]);
    }
    if (p.weights != nullptr && p.layout == Layout::kExpert && lane < count) {
      const plan::Source source =
          plan::DecodeSource(p.layout, p.recv_src[row], p.num_tokens, p.top_k);
      p.row_weights[row] = __ldcg(&where(token).weights[source.k]);
    }
    for (int32_t e = 0; p.weights != nullptr && p.layout == Layout::kToken && e < count; ++e) {
      const float* from = where(__shfl_sync(~0u, token, e)).weights;
      const int64_t at = int64_t{__shfl_sync(~0u, row, e)} * p.top_k;
      for (int32_t k = lane; k < p.top_k; k += 32) {
        p.row_weights[at + k] = p.expert_idx[at + k] >= 0 ? __ldcg(&from[k]) : 0.0f;
      }
    }
    begin += count;
  }
}

// A reader's share of the entries from ranks of its host.
__device__ void ReadHost(const NetworkDispatchParams& p, const PeerInputs& inputs, int32_t reader,
                         Pipe& pipe) {
  const NetworkParams& network = p.network;
  const Pieces pieces(p.row_bytes);
  const int32_t* const tokens = p.routes.recv_token;
  const int32_t num_readers = kReaders * gridDim.x;
  const int32_t share_of = reader * gridDim.x + blockIdx.x;
  for (int32_t i = 0; i < network.shape.host_ranks; ++i) {
    const int32_t index = NthOther(network.node.rank, i, network.shape.host_ranks);
    const int32_t rank = network.host * network.shape.host_ranks + index;
    const int32_t first = p.routes.recv_start[rank], last = p.routes.recv_start[rank + 1];
    const int32_t share = (last - first + num_readers - 1) / num_readers;
    int32_t begin = plan::Min(first + share * share_of, last);
    int32_t end = plan::Min(begin + share, last);
    // Not between entries of the same token.
    while (begin > first && begin < last && tokens[begin] == tokens[begin - 1]) ++begin;
    while (end > first && end < last && tokens[end] == tokens[end - 1]) ++end;
    BringEntries(p, pieces, pipe, begin, end, [&](int64_t token) {
      return SourceRow{inputs.Of<char>(index, 0) + token * p.row_bytes,
                       inputs.Of<float>(index, 1) + token * p.scales_per_row,
                       inputs.Of<float>(index, 2) + token * p.top_k};
    });
  }
}

// A reader: the rows of this rank in the chunks of every kReaders-th of the ranks that the block's
// ways lead to.
__device__ bool ReadChunks(const NetworkDispatchParams& p, const Ways& ways, uint64_t epoch,
                           int32_t reader, Pipe& pipe) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const ChunkRow format(p);
  const Pieces pieces(p.row_bytes);
  const int32_t window_tokens = WindowTokens(p), lane = threadIdx.x % 32;
  bool more = true;
  for (int32_t n = 0; more; ++n) {
    more = false;
    for (int32_t i = reader;; i += kReaders) {
      const int32_t number = blockIdx.x + i / shape.host_ranks * gridDim.x;
      if (number >= ways.count) break;
      const Way way(ways, network, number);
      const Windows windows(p.num_tokens, window_tokens, way.lane, ways.num_lanes);
      if (n >= windows.count) continue;
      more = true;
      const int32_t index = (network.node.rank + i) % shape.host_ranks;
      const int32_t rank = way.host * shape.host_ranks + index;
      const int32_t window = windows.first + n, first = window * window_tokens;
      const int32_t last = p.routes.recv_start[rank + 1];
      const int32_t begin = FirstEntry(p.routes.recv_token, p.routes.recv_start[rank], last, first);
      const int32_t end = FirstEntry(p.routes.recv_token, begin, last, first + window_tokens);
      const ChunkReader chunks(network, way, index, epoch);
      if (!chunks.Wait(n, window)) return false;
      TestDelay(network.node.rank, epoch, 4);
      const char* const chunk = chunks.Memory(n);
      uint32_t sent = 0;
      if (lane == 0) sent = __ldcg(reinterpret_cast<const uint32_t*>(chunk));
      sent = __shfl_sync(~0u, sent, 0);
      BringEntries(p, pieces, pipe, begin, end, [&](int32_t token) {
        const int32_t before = __popc(sent & ((1u << (token - first)) - 1));
        const char* row = chunk + sizeof(ChunkHeader) + before * format.bytes;
        return SourceRow{row, reinterpret_cast<const float*>(row + format.scales_at),
                         reinterpret_cast<const float*>(row + format.weights_at)};
      });
      chunks.Done(n, window);
    }
  }
  return true;
}

// Zeros for the scales and weights of rows that have no source. By all readers.
__device__ void ClearUnused(const NetworkDispatchParams& p, int32_t warp, int32_t num_warps) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_weights = p.weights == nullptr ? 0 : (p.layout == Layout::kToken ? p.top_k : 1);
  for (int64_t row = warp; row < p.capacity; row += num_warps) {
    if (p.recv_src[row] >= 0) continue;
    for (int32_t j = lane; j < p.scales_per_row; j += 32) {
      p.row_scales[row * p.scales_per_row + j] = 0.0f;
    }
    for (int32_t k = lane; k < num_weights; k += 32) p.row_weights[row * num_weights + k] = 0.0f;
  }
}

// What a failed dispatch gives: NaN in every row.
__device__ void Poison(const NetworkDispatchParams& p) {
  const int32_t words_per_row = p.row_bytes / 16;
  for (int64_t row = 0; row < p.capacity; ++row) {
    uint4* words = reinterpret_cast<uint4*>(static_cast<char*>(p.rows) + row * p.row_stride);
    for (int32_t i = threadIdx.x; i < words_per_row; i += blockDim.x) {
      words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
  const auto fill = [&](float* values, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) values[i] = __uint_as_float(~0u);
  };
  fill(p.row_scales, int64_t{p.capacity} * p.scales_per_row);
  if (p.row_weights == nullptr) return;
  fill(p.row_weights, int64_t{p.capacity} * (p.layout == Layout::kToken ? p.top_k : 1));
}

__global__ void __launch_bounds__(kThreads)
    NetworkDispatchKernel(const __grid_constant__ NetworkDispatchParams p) {
  extern __shared__ __align__(128) char memory[];
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(memory + kBarriersAt);
  PeerInputs& inputs = *reinterpret_cast<PeerInputs*>(memory + kInputsAt);
  const GroupParams& node = p.network.node;
  const OpNumbers op = BeginOp(node);
  if (blockIdx.x == 0) {
    Publish(node, op, {p.row_bytes > 0 ? p.x : nullptr, p.scales, p.weights});
  }
  for (int32_t i = threadIdx.x; i < kZeroBytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::FenceProxyAsyncShared();
  const bool ok = WaitInputs(node, op, inputs);  // and the zeros are there
  const Ways ways(p.network.shape, p.network.shape.num_hosts - 1, gridDim.x);
  const int32_t warp = threadIdx.x / 32;
  if (ok && warp < kPipes) {
    Pipe pipe(memory + kStagesAt + warp * Pipe::kStages * kStageBytes,
              barriers + warp * Pipe::kStages, kStageBytes);
    ptx::FenceProxyAsyncGlobal();
    if (warp < kSenders) {
      SendChunks(p, ways, op.epoch, warp, pipe);
    } else {
      const int32_t reader = warp - kSenders;
      const int32_t number = reader * gridDim.x + blockIdx.x, num_readers = kReaders * gridDim.x;
      ReadHost(p, inputs, reader, pipe);
      ClearUnused(p, number, num_readers);
      RowClearer<NetworkDispatchParams> clearer(p, memory, number, num_readers);
      clearer.Advance(1, 1);
      ptx::CommitBulkGroup();
      ReadChunks(p, ways, op.epoch, reader, pipe);
    }
    pipe.Finish();
  } else if (ok) {
    ForwardChunks(p.network, ways, op.epoch, p.num_tokens, WindowTokens(p));
  }
  EndOp(node, op.epoch, [&] {
    if (threadIdx.x == 0) TellHosts(p.network);
    Poison(p);
  });
}

}  // namespace

cudaError_t LoadNetworkDispatch() {
  return cudaFuncSetAttribute(NetworkDispatchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

bool FitsNetworkDispatch(const NetworkDispatchParams& params) { return WindowTokens(params) > 0; }

cudaError_t LaunchNetworkDispatch(const NetworkDispatchParams& params, cudaStream_t stream) {
  NetworkDispatchKernel<<<params.num_blocks, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
