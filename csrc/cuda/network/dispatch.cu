// Dispatch between hosts: every row crosses the network once for each host that needs it.
//
// In a block, *senders* pack this rank's rows for other hosts into chunks and send them. The
// *forwarder* tells the ranks of this host what has arrived. *Readers* bring this rank's rows,
// first those of ranks on this host from their inputs, then those of other hosts from the
// forwarders' memory. Senders are a team, and so are readers: all warps of a team do the same
// chunks, each some pieces of the rows.

#include "cuda/core/shared_memory.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/dispatch.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/read.cuh"
#include "cuda/network/send.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/clear.cuh"
#include "cuda/rows/pipe.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kSenders = 2;  // warps
constexpr int kReaders = 5;
constexpr int kPipes = kSenders + kReaders;  // pipe of warp w; the forwarder is the last warp
constexpr int kThreads = (kPipes + 1) * 32;
constexpr int kStagesBytes = 196 << 10;  // half a row of 7168 channels of bf16 fits a stage
constexpr int kStageBytes = kStagesBytes / (kPipes * Pipe::kStages) / 128 * 128;
// Shared memory of a block.
constexpr int kBarriersAt = kZeroBytes;
constexpr int kDoneAt = kBarriersAt + kPipes * Pipe::kStages * static_cast<int>(sizeof(uint64_t));
constexpr int kInputsAt = kDoneAt + (kPipes + 1) / 2 * static_cast<int>(sizeof(uint64_t));
constexpr int kRoomsAt = kInputsAt + static_cast<int>(sizeof(PeerInputs));
constexpr int kStagesAt =
    (kRoomsAt + kReaders * static_cast<int>(sizeof(EntryRoom)) + 127) / 128 * 128;
constexpr int kSharedBytes = kStagesAt + kPipes * Pipe::kStages * kStageBytes + kAlignmentRoom;
static_assert(kSharedBytes <= 227 << 10);

// A row in a chunk, with its scales and its weights.
struct ChunkRow {
  int32_t scales_at, weights_at, bytes;
  __host__ __device__ explicit ChunkRow(const NetworkDispatchParams& p) {
    scales_at = p.row_bytes;
    weights_at = scales_at + plan::RoundUp(p.scales_per_row * 4, 16);
    bytes = weights_at + (p.weights != nullptr ? plan::RoundUp(p.top_k * 4, 16) : 0);
  }
};

// A sender: packs its share of the chunks of the block's ways.
__device__ bool SendChunks(const NetworkDispatchParams& p, const Ways& ways, uint64_t epoch,
                           TeamMember& self, Pipe& pipe) {
  const ChunkRow format(p);
  const SentRows sent{p.routes.topk, p.num_tokens, p.top_k,     p.experts_per_host,
                      p.x,           p.row_bytes,  format.bytes};
  // One item of a row with its token; the token's copy in its place in the chunk.
  const auto add = [&](int32_t size, int32_t nth_token, char* out, int32_t per_row, int32_t at,
                       const float* values) {
    self.ForItems(size, per_row, [&](int32_t row, int32_t i) {
      const int64_t token = __shfl_sync(~0u, nth_token, row);
      if (i < 0) return;
      float* const to = reinterpret_cast<float*>(out + row * format.bytes + at);
      to[i] = values[token * per_row + i];
    });
  };
  return SendRows(p.network, sent, ways, epoch, self, pipe,
                  [&](int32_t size, int32_t nth_token, char* out) {
                    if (p.scales_per_row != 0) {
                      add(size, nth_token, out, p.scales_per_row, format.scales_at, p.scales);
                    }
                    if (p.weights != nullptr) {
                      add(size, nth_token, out, p.top_k, format.weights_at, p.weights);
                    }
                  });
}

// Where the row of a token, its scales and its weights are.
struct SourceRow {
  const char* row;
  const float* scales;
  const float* weights;
};

// Brings a warp's share of the entries, all of one source rank, whose rows are at `where(token)`.
// When it returns, all reads of them are complete.
template <typename Where>
__device__ void BringEntries(const NetworkDispatchParams& p, TeamMember& self, Pipe& pipe,
                             EntryRoom& room, EntryRange entries, Where&& where) {
  const Pieces pieces(p.row_bytes, pipe.stage_bytes());
  const int32_t lane = threadIdx.x % 32;
  while (entries.begin < entries.end) {
    // The row of each token is read once, for all of its entries.
    const EntryList list(p.routes, entries, room);
    const int32_t num_items = list.num_tokens() * pieces.count, first = self.TakeShare(num_items);
    const auto item = [&](int32_t i) { return first + i * self.num_workers; };
    pipe.Run(
        self.ShareOf(num_items, first),
        [&](int32_t i) { return pieces.Bytes(item(i) % pieces.count); },
        [&](int32_t i) {
          return where(list.Token(item(i) / pieces.count)).row +
                 pieces.Offset(item(i) % pieces.count);
        },
        [&](int32_t i, const char* stage) {
          const EntryRange of_token = list.Of(item(i) / pieces.count);
          const int32_t piece = item(i) % pieces.count, entry = of_token.begin + lane;
          if (entry >= of_token.end) return;
          char* target = static_cast<char*>(p.rows) + list.Row(entry) * p.row_stride;
          ptx::BulkStore(target + pieces.Offset(piece), stage, pieces.Bytes(piece));
        });
    if (p.scales_per_row != 0) {
      self.ForItems(list.count(), p.scales_per_row, [&](int32_t entry, int32_t j) {
        if (j < 0) return;
        const int64_t to = int64_t{list.Row(entry)} * p.scales_per_row + j;
        p.row_scales[to] = __ldcg(&where(list.TokenOf(entry)).scales[j]);
      });
    }
    if (p.weights != nullptr && p.layout == Layout::kExpert) {
      self.ForItems(list.count(), 1, [&](int32_t entry, int32_t i) {
        if (i < 0) return;
        const int32_t row = list.Row(entry);
        const plan::Source source =
            plan::DecodeSource(p.layout, p.recv_src[row], p.num_tokens, p.top_k);
        p.row_weights[row] = __ldcg(&where(list.TokenOf(entry)).weights[source.k]);
      });
    }
    if (p.weights != nullptr && p.layout == Layout::kToken) {
      self.ForItems(list.count(), p.top_k, [&](int32_t entry, int32_t k) {
        if (k < 0) return;
        const int64_t at = int64_t{list.Row(entry)} * p.top_k + k;
        const float weight = __ldcg(&where(list.TokenOf(entry)).weights[k]);
        p.row_weights[at] = p.expert_idx[at] >= 0 ? weight : 0.0f;
      });
    }
    entries.begin += list.count();
  }
}

// A reader: brings its share of every chunk from other hosts and, while it waits for them, its
// share of the rows from ranks of this host.
__device__ void BringRows(const NetworkDispatchParams& p, const PeerInputs& inputs,
                          const Ways& ways, uint64_t epoch, TeamMember& self, HostEntries& host,
                          Pipe& pipe, EntryRoom& room) {
  TeamMember alone = TeamMember::Alone();
  const auto from_host = [&] {
    return host.Step([&](int32_t index, EntryRange entries) {
      BringEntries(p, alone, pipe, room, entries, [&](int64_t token) {
        return SourceRow{inputs.Of<char>(index, 0) + token * p.row_bytes,
                         inputs.Of<float>(index, 1) + token * p.scales_per_row,
                         inputs.Of<float>(index, 2) + token * p.top_k};
      });
    });
  };
  const ChunkRow format(p);
  const auto from_chunk = [&](EntryRange entries, const ChunkRows& rows) {
    BringEntries(p, self, pipe, room, entries, [&](int32_t token) {
      const char* row = rows.Of(token);
      return SourceRow{row, reinterpret_cast<const float*>(row + format.scales_at),
                       reinterpret_cast<const float*>(row + format.weights_at)};
    });
  };
  bool ok = ReadChunks(p.network, p.routes, p.num_tokens, format.bytes, ways, epoch, self,
                       from_chunk, from_host);
  while (ok) ok = from_host();
}

// Zeros for the scales and weights of rows that have no source. By all readers.
__device__ void ClearUnused(const NetworkDispatchParams& p, int32_t warp, int32_t num_warps) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_weights = p.weights == nullptr ? 0 : (p.layout == Layout::kToken ? p.top_k : 1);
  if (num_weights == 0 && p.scales_per_row == 0) return;
  ForEachUnused(p.recv_src, p.capacity, warp, num_warps, [&](int64_t row) {
    for (int32_t j = lane; j < p.scales_per_row; j += 32) {
      p.row_scales[row * p.scales_per_row + j] = 0.0f;
    }
    for (int32_t k = lane; k < num_weights; k += 32) p.row_weights[row * num_weights + k] = 0.0f;
  });
}

// The result of a failed dispatch: NaN in every row.
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
  extern __shared__ __align__(16) char unaligned[];
  char* const memory = AlignForBulk(unaligned);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(memory + kBarriersAt);
  uint32_t* const done = reinterpret_cast<uint32_t*>(memory + kDoneAt);
  PeerInputs& inputs = *reinterpret_cast<PeerInputs*>(memory + kInputsAt);
  const GroupParams& node = p.network.node;
  const OpNumbers op = BeginNetworkOp(p.network);
  if (blockIdx.x == 0) {
    Publish(node, op, {p.row_bytes > 0 ? p.x : nullptr, p.scales, p.weights});
  }
  for (int32_t i = threadIdx.x; i < kZeroBytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x < kPipes) done[threadIdx.x] = 0;
  ptx::FenceProxyAsyncShared();
  const bool ok = WaitInputs(node, op, inputs);  // and the zeros are there
  const Ways ways(p.network.shape, p.network.shape.num_hosts - 1, gridDim.x);
  const int32_t warp = threadIdx.x / 32;
  if (ok && warp < kPipes) {
    Pipe pipe(memory + kStagesAt + warp * Pipe::kStages * kStageBytes,
              barriers + warp * Pipe::kStages, kStageBytes);
    ptx::FenceProxyAsyncGlobal();
    if (warp < kSenders) {
      TeamMember self(warp, kSenders, done);
      SendChunks(p, ways, op.epoch, self, pipe);
    } else {
      TeamMember self(warp - kSenders, kReaders, done + kSenders);
      const int32_t number = self.warp * gridDim.x + blockIdx.x, num_readers = kReaders * gridDim.x;
      HostEntries host(p.network, p.routes, number, num_readers);
      ClearUnused(p, number, num_readers);
      RowClearer<NetworkDispatchParams> clearer(p, memory, number, num_readers);
      clearer.Advance(1, 1);
      ptx::CommitBulkGroup();
      EntryRoom* const rooms = reinterpret_cast<EntryRoom*>(memory + kRoomsAt);
      BringRows(p, inputs, ways, op.epoch, self, host, pipe, rooms[self.warp]);
    }
    pipe.Finish();
  } else if (ok) {
    ForwardChunks(p.network, ways, op.epoch, p.num_tokens,
                  ways.WindowTokens(p.network.shape, ChunkRow(p).bytes, p.num_tokens));
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

bool FitsNetworkDispatch(const NetworkDispatchParams& params) {
  return MostWindowTokens(params.network.shape, ChunkRow(params).bytes) > 0;
}

cudaError_t LaunchNetworkDispatch(const NetworkDispatchParams& params, cudaStream_t stream) {
  NetworkDispatchKernel<<<params.num_blocks, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
