// Gradients of combine between hosts: the cotangents of a rank's tokens go to the ranks that have
// their rows, each once over the network to each host, like the rows of dispatch
// (network/dispatch.cu).
//
// In a block, *senders* pack and send this rank's cotangents for other hosts, and the *forwarder*
// tells the ranks of this host what has arrived. *Readers* load cotangents piece by piece through
// shared memory: those of this host from the peers' inputs, and those of others from the
// forwarders' memory. With them they make the gradients of this rank's rows (rows/gradients.cuh).

#include "cuda/core/shared_memory.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/combine_vjp.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/read.cuh"
#include "cuda/network/send.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/clear.cuh"
#include "cuda/rows/gradients.cuh"
#include "cuda/rows/pipe.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kSenders = 3;  // warps
constexpr int kReaders = 8;
constexpr int kPipes = kSenders + kReaders;  // pipe of warp w; the forwarder is the last warp
constexpr int kThreads = (kPipes + 1) * 32;
constexpr int kStageBytes = 4 << 10;
// A piece of a row: a multiple of the 256 channels that a warp takes at a time, of any type.
constexpr int kPieceUnit = 256 * sizeof(float);
static_assert(kStageBytes % kPieceUnit == 0);
// Dynamic shared memory.
constexpr int kStagesBytes = kPipes * Pipe::kStages * kStageBytes + kAlignmentRoom;
// Rows with the same cotangent whose gradients are made at a time.
constexpr int kUnitRows = 4;

// The rest of a block's shared memory.
struct Shared {
  PeerInputs inputs;
  uint64_t barriers[kPipes * Pipe::kStages];
  uint32_t done[kPipes];
};

__host__ __device__ int32_t RowBytes(const NetworkCombineVjpParams& p) {
  return p.hidden * ByteWidth(p.type);
}

// The gradients of a unit: up to kUnitRows rows of one token.
template <typename T>
struct Unit {
  static constexpr int kVectorBytes = sizeof(RawVector<T>);
  static constexpr int kPerLane = kStageBytes / kVectorBytes / 32;

  float weights[kUnitRows];
  float lanes[kUnitRows][kVector];

  __device__ void Begin() {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) lanes[r][j] = 0.0f;
    }
  }

  // A piece of row `r`: of the cotangent in shared memory, and of the row at the same offset.
  __device__ __forceinline__ void Add(int r, const char* gradient, const char* given, char* d_row,
                                      int32_t bytes) {
    const int32_t lane_at = threadIdx.x % 32 * kVectorBytes;
    RawVector<T> raw[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t at = lane_at + 32 * i * kVectorBytes;
#pragma unroll
      for (int word = 0; word < kVectorBytes / 16; ++word) {
        // A lane past the end loads bytes that it does not use. A row may end after half a vector.
        const int32_t from = plan::Min(at + 16 * word, bytes - 16);
        raw[i].words[word] = __ldcg(reinterpret_cast<const uint4*>(given + from));
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t at = lane_at + 32 * i * kVectorBytes;
      if (at >= bytes) break;
      float cotangent[kVector], products[kVector], scaled[kVector];
      Unpack(*reinterpret_cast<const RawVector<T>*>(gradient + at), cotangent);
      Unpack(raw[i], products);
      // If a row ends after half a vector, the other half is not part of it.
      if (at + kVectorBytes > bytes) {
#pragma unroll
        for (int j = kVector / 2; j < kVector; ++j) cotangent[j] = products[j] = 0.0f;
      }
      Multiply(products, cotangent);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        lanes[r][j] = __fadd_rn(lanes[r][j], products[j]);
        scaled[j] = __fmul_rn(cotangent[j], weights[r]);
      }
      StorePart(reinterpret_cast<T*>(d_row + at), Pack<T>(scaled), bytes - at);
    }
  }
};

// The gradients of a warp's share of the entries, all of one source rank, whose cotangents are at
// `where(token)`. When it returns, all reads of those are complete.
template <typename T, typename Where>
__device__ void Differentiate(const NetworkCombineVjpParams& p, TeamMember& self, Pipe& pipe,
                              EntryRange entries, Where&& where) {
  const int32_t row_bytes = RowBytes(p), lane = threadIdx.x % 32;
  const Pieces pieces(row_bytes, kStageBytes, kPieceUnit);
  while (entries.begin < entries.end) {
    const EntryBatch batch(p.routes, entries);
    // The entries of a token are divided into units; lane u knows where the u-th unit begins.
    const uint32_t up_to_lane = lane == 31 ? ~0u : (2u << lane) - 1;
    const uint32_t heads_so_far = batch.heads & up_to_lane;
    const int32_t in_token = lane - (31 - __clz(static_cast<int>(heads_so_far)));
    const uint32_t heads = __ballot_sync(~0u, lane < batch.count && in_token % kUnitRows == 0);
    const int32_t head = PlaceOfNthBit(heads);
    const int32_t after = PlaceOfNthBit(heads & (heads - 1));  // where the next one begins
    const int32_t num_units = __popc(heads);
    const int32_t size = (lane + 1 < num_units ? after : batch.count) - head;
    const int32_t first = self.TakeShare(num_units);
    Unit<T> unit;
    const auto number = [&](int32_t item) {
      return first + item / pieces.count * self.num_workers;
    };
    pipe.Run(
        self.ShareOf(num_units, first) * pieces.count,
        [&](int32_t item) { return pieces.Bytes(item % pieces.count); },
        [&](int32_t item) {
          const int32_t entry = __shfl_sync(~0u, head, number(item));
          return where(__shfl_sync(~0u, batch.token, entry)) + pieces.Offset(item % pieces.count);
        },
        [&](int32_t item, const char* stage) {
          const int32_t piece = item % pieces.count;
          const int32_t entry = __shfl_sync(~0u, head, number(item));
          const int32_t count = __shfl_sync(~0u, size, number(item));
          if (piece == 0) unit.Begin();
#pragma unroll
          for (int r = 0; r < kUnitRows; ++r) {
            if (r >= count) break;
            const int32_t row = __shfl_sync(~0u, batch.row, entry + r);
            const int64_t at = int64_t{row} * row_bytes + pieces.Offset(piece);
            if (piece == 0) unit.weights[r] = p.row_weights[row];
            unit.Add(r, stage, static_cast<const char*>(p.rows) + at,
                     static_cast<char*>(p.d_rows) + at, pieces.Bytes(piece));
            if (piece + 1 < pieces.count) continue;
            const float d_weight = AddLanes(unit.lanes[r]);
            if (lane == 0) p.d_weights[row] = d_weight;
          }
        });
    entries.begin += batch.count;
  }
}

// A reader: gradients of the rows with tokens of this host, of unused rows, and of those with
// tokens of other hosts.
template <typename T>
__device__ void ReadAll(const NetworkCombineVjpParams& p, const PeerInputs& inputs,
                        const Ways& ways, uint64_t epoch, TeamMember& self, Pipe& pipe) {
  const int32_t row_bytes = RowBytes(p);
  const int32_t number = self.warp * gridDim.x + blockIdx.x, num_readers = kReaders * gridDim.x;
  TeamMember alone = TeamMember::Alone();
  HostEntries host(p.network, p.routes, number, num_readers);
  const auto from_host = [&] {
    return host.Step([&](int32_t index, EntryRange entries) {
      Differentiate<T>(p, alone, pipe, entries, [&](int64_t token) {
        return inputs.Of<char>(index, 0) + token * row_bytes;
      });
    });
  };
  if (row_bytes == 0) {
    for (int32_t c = number; c < p.capacity; c += num_readers) FillGradients<T>(p, c, 0u);
  } else {
    ForEachUnused(p.recv_src, p.capacity, number, num_readers,
                  [&](int32_t c) { ClearGradients<T>(p, c); });
  }
  const auto from_chunk = [&](EntryRange entries, const ChunkRows& rows) {
    Differentiate<T>(p, self, pipe, entries, [&](int32_t token) { return rows.Of(token); });
  };
  bool ok = ReadChunks(p.network, p.routes, p.num_tokens, row_bytes, ways, epoch, self, from_chunk,
                       from_host);
  while (ok) ok = from_host();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    NetworkCombineVjpKernel(const __grid_constant__ NetworkCombineVjpParams p) {
  extern __shared__ __align__(16) char unaligned[];
  char* const stages = AlignForBulk(unaligned);
  __shared__ Shared shared;
  const GroupParams& node = p.network.node;
  const OpNumbers op = BeginNetworkOp(p.network);
  const int32_t row_bytes = RowBytes(p);
  if (blockIdx.x == 0) Publish(node, op, {row_bytes > 0 ? p.dy : nullptr, nullptr, nullptr});
  if (threadIdx.x < kPipes) shared.done[threadIdx.x] = 0;
  const bool ok = WaitInputs(node, op, shared.inputs);  // and the numbers of chunks are zero
  const Ways ways(p.network.shape, p.network.shape.num_hosts - 1, gridDim.x);
  const int32_t warp = threadIdx.x / 32;
  if (ok && warp < kPipes) {
    Pipe pipe(stages + warp * Pipe::kStages * kStageBytes, shared.barriers + warp * Pipe::kStages,
              kStageBytes);
    ptx::FenceProxyAsyncGlobal();
    if (warp < kSenders) {
      TeamMember self(warp, kSenders, shared.done);
      const SentRows sent{p.routes.topk, p.num_tokens, p.top_k,  p.experts_per_host,
                          p.dy,          row_bytes,    row_bytes};
      SendRows(p.network, sent, ways, op.epoch, self, pipe, [](int32_t, int32_t, char*) {});
    } else {
      TeamMember self(warp - kSenders, kReaders, shared.done + kSenders);
      ReadAll<T>(p, shared.inputs, ways, op.epoch, self, pipe);
    }
    pipe.Finish();
  } else if (ok) {
    ForwardChunks(p.network, ways, op.epoch, p.num_tokens,
                  ways.WindowTokens(p.network.shape, row_bytes, p.num_tokens));
  }
  EndOp(node, op.epoch, [&] {
    if (threadIdx.x == 0) TellHosts(p.network);
    for (int32_t c = warp; c < p.capacity; c += kPipes + 1) FillGradients<T>(p, c, ~0u);
  });
}

}  // namespace

cudaError_t LoadNetworkCombineVjp() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [](auto element) {
      return cudaFuncSetAttribute(NetworkCombineVjpKernel<decltype(element)>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kStagesBytes);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool FitsNetworkCombineVjp(const NetworkCombineVjpParams& params) {
  return MostWindowTokens(params.network.shape, RowBytes(params)) > 0;
}

cudaError_t LaunchNetworkCombineVjp(const NetworkCombineVjpParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    NetworkCombineVjpKernel<decltype(element)>
        <<<params.num_blocks, kThreads, kStagesBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
