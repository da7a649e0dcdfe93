// A mover of the dispatch (dispatch.cu) that makes rows of float8 dense on their way. It loads a
// chunk of a row with its scales by bulk copies, its lanes convert that into another stage, and
// bulk copies store this stage to all places of the row.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/node/await_cast.cuh"
#include "cuda/node/dispatch.h"
#include "cuda/rows/clear.cuh"
#include "cuda/rows/dense.cuh"
#include "cuda/rows/sources.cuh"

namespace jax_ep::cuda {

// Stages of a mover for loads and for stores. When lanes have read a stage, the next load into it
// begins, so all stages for loads may have one in flight. While bulk stores read one of the stages
// for stores, lanes fill the other.
//
// What bounds it: with H = 7168 and 4096 tokens on each of two ranks, a rank receives 59 million
// channels. If 24 SMs of an H200 are to convert these in 130 us, each has to do 11 channels a
// clock.
//
// * Instructions: a warp takes 32 for 256 channels, so those of an SM do at most 32 channels a
//   clock.
// * Shared memory: it moves 128 bytes a clock. A channel that becomes bf16 and is stored once takes
//   6.5 of them (1 loaded, 1.5 read with its scale, 2 written, 2 stored), so that is enough for 20.
// * Latency: a mover with data at hand does about three channels a clock, because only four vectors
//   of a lane are in flight, and there is other work between two chunks. So seven movers do 20.
//   Chunks are short, so that there is room for these. All movers together have up to 100 KB of
//   loads in flight.
constexpr int kDenseLoads = 4;
constexpr int kDenseStores = 2;
constexpr int kMaxDenseBytes = 8 << 10;           // of a chunk, as it is stored
constexpr int kDenseUnit = 4 * ops::kScaleBlock;  // channels; chunks have whole units or end a row

// Shared memory of a mover: the stages for loads, each with its scales behind its channels, then
// those for stores.
struct DenseRoom {
  int32_t width;  // bytes of a dense channel
  int32_t chunk;  // channels of all chunks of a row but the last, which has no more
  int32_t stage;  // bytes of a stage for loads
  int32_t bytes;  // of all

  __host__ __device__ explicit DenseRoom(const DispatchParams& p) : width(ByteWidth(p.dense_type)) {
    const int32_t hidden = p.row_bytes;
    const int32_t most = kMaxDenseBytes / width;
    const int32_t num_chunks = (hidden + most - 1) / most;
    chunk = plan::RoundUp((hidden + num_chunks - 1) / num_chunks, kDenseUnit);
    stage = chunk + plan::RoundUp(ScaleSlice::MaxBytes(chunk), 128);
    bytes = kDenseLoads * stage + kDenseStores * chunk * width;
  }
};

// The result, for RowClearer.
struct DenseRows {
  void* rows;
  int64_t row_stride;
  int32_t row_bytes;
  int32_t capacity;
  const int32_t* recv_src;
  bool keeps_unused;
};

__device__ inline void MoveDenseRows(const DispatchParams& p, OpNumbers op, uint32_t* seen,
                                     const PeerInputs& inputs, int32_t warp, int32_t num_warps,
                                     const char* zeros, char* stages, uint64_t* barriers) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t hidden = p.row_bytes;
  const DenseRoom room(p);
  if (lane == 0) {
    for (int s = 0; s < kDenseLoads; ++s) ptx::InitBarrier(&barriers[s], 1);
    ptx::FenceBarrierInit();
    ptx::FenceProxyAsyncGlobal();
  }
  __syncwarp();

  const DenseRows result{p.rows,     p.row_stride, static_cast<int32_t>(p.row_stride),
                         p.capacity, p.recv_src,   p.keeps_unused};
  RowClearer<DenseRows> clearer(result, zeros, warp, num_warps);
  SourceQueue<DispatchParams> sources(p, warp, num_warps);
  SourceQueue<DispatchParams>::Entry source{};
  struct Item {
    int32_t row;         // of this lane, or -1
    int32_t channel;     // of the row, the chunk's first
    int32_t num_before;  // of ScaleSlice
  };
  Item items[kDenseLoads];  // the current one first
  int32_t num_loaded = 0;
  int32_t channel = hidden;  // of the source, the next to be loaded
  for (int32_t n = -kDenseLoads; n < num_loaded; ++n) {
    if (n >= 0) {
      const Item& item = items[0];
      const int32_t slot = n % kDenseLoads;
      const uint32_t parity = n / kDenseLoads & 1;
      while (!ptx::TryWaitParity(&barriers[slot], parity)) {
      }
      const int32_t num_channels = plan::Min(room.chunk, hidden - item.channel);
      const char* values = stages + slot * room.stage;
      const float* scales = reinterpret_cast<const float*>(values + room.chunk) + item.num_before;
      char* dense = stages + kDenseLoads * room.stage + n % kDenseStores * room.chunk * room.width;
      ToDense(p.dense_type, values, scales, num_channels, dense);
      ptx::FenceProxyAsyncShared();
      __syncwarp();
      if (item.row >= 0) {
        ptx::BulkStore(
            static_cast<char*>(p.rows) + item.row * p.row_stride + item.channel * room.width, dense,
            num_channels * room.width);
      }
    }
#pragma unroll
    for (int i = 1; i < kDenseLoads; ++i) items[i - 1] = items[i];
    if (channel >= hidden && source.source != plan::kNone) {
      source = sources.Next();
      channel = 0;
    }
    if (source.source != plan::kNone) {
      const int32_t rank = source.source / p.num_tokens;
      const int32_t token = source.source % p.num_tokens;
      const ScaleSlice slice(token, hidden, channel, room.chunk);
      items[kDenseLoads - 1] = {source.row, channel, slice.num_before};
      if (lane == 0) {
        const int32_t slot = num_loaded % kDenseLoads;
        const int32_t num_channels = plan::Min(room.chunk, hidden - channel);
        char* stage = stages + slot * room.stage;
        WaitCast(p, op, seen, rank, token);
        ptx::ArriveExpectBytes(&barriers[slot], num_channels + slice.bytes);
        ptx::BulkLoad(stage, inputs.Of<char>(rank, 0) + int64_t{token} * hidden + channel,
                      num_channels, &barriers[slot]);
        ptx::BulkLoad(stage + room.chunk, inputs.Of<float>(rank, 1) + slice.first, slice.bytes,
                      &barriers[slot]);
      }
      ++num_loaded;
      channel += room.chunk;
    }
    clearer.Advance(source.n, sources.num_sources());
    ptx::CommitBulkGroup();
    // The next item takes the stage of the last but one, whose stores must have read it.
    ptx::WaitBulkGroupRead<kDenseStores - 1>();
    __syncwarp();
  }
  clearer.Advance(1, 1);
  ptx::CommitBulkGroup();
  ptx::WaitBulkGroups();
}

}  // namespace jax_ep::cuda
