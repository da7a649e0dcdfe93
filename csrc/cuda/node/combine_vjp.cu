// Gradients of combine with fused weights. Every rank has rows of some tokens. It reads the
// cotangents of these tokens, each once over the link, and makes the gradients of each row and its
// weight (rows/gradients.cuh).
//
// A team of warps goes through sources and takes the rows of each in turn. Its first warp asks for
// the next source and tells the others. A team has two buffers for cotangents in shared memory, and
// each warp has a ring of stages for parts of rows. Bulk copies fill all of them. While a warp
// computes with one part, the next parts and the cotangent of the next source are being loaded.

#include <algorithm>

#include "cuda/core/sync.cuh"
#include "cuda/node/combine_vjp.h"
#include "cuda/rows/gradients.cuh"
#include "cuda/rows/sources.cuh"
#include "cuda/rows/vectors.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kMaxTeamWarps = 4;
constexpr int kSharedBytes = 216 << 10;
constexpr int kStages = 4;
constexpr int kStageBytes = 2048;
constexpr int kBuffers = 2;  // of cotangents

__host__ __device__ int32_t RowBytes(const CombineVjpParams& p) {
  return p.hidden * ByteWidth(p.type);
}

// Barriers of a team: three for each buffer (its source is known, it is filled, it is free), and
// those of the stages.
struct Barriers {
  uint64_t known[kBuffers];
  uint64_t filled[kBuffers];
  uint64_t free[kBuffers];
  uint64_t stages[kMaxTeamWarps][kStages];
  int32_t sources[kBuffers];
};

// Of a team: barriers, then buffers, then the stages of each warp.
constexpr int kBarrierBytes = 256;
static_assert(sizeof(Barriers) <= kBarrierBytes);

__host__ __device__ int32_t TeamBytes(const CombineVjpParams& p, int32_t num_warps) {
  return kBarrierBytes + kBuffers * plan::RoundUp(RowBytes(p), 128) +
         num_warps * kStages * kStageBytes;
}

// Warps of a team: about as many as a source has rows, but one if rows are long.
__host__ __device__ int32_t TeamWarps(const CombineVjpParams& p) {
  const int32_t num_warps = p.num_rows / p.group.num_ranks > 2 ? kMaxTeamWarps : 2;
  return TeamBytes(p, num_warps) <= kSharedBytes ? num_warps : 1;
}

int NumTeams(const CombineVjpParams& p) {
  const int32_t num_warps = TeamWarps(p);
  return std::min(kSharedBytes / TeamBytes(p, num_warps), kMaxWarps / num_warps);
}

// Initialises the barriers. The block must meet before their first use.
__device__ void InitBarriers(Barriers& barriers, int32_t num_warps) {
  for (int i = 0; i < kBuffers; ++i) {
    ptx::InitBarrier(&barriers.known[i], 1);
    ptx::InitBarrier(&barriers.filled[i], 1);
    ptx::InitBarrier(&barriers.free[i], num_warps * 32);
  }
  for (int warp = 0; warp < num_warps; ++warp) {
    for (uint64_t& barrier : barriers.stages[warp]) ptx::InitBarrier(&barrier, 1);
  }
  ptx::FenceBarrierInit();
}

// The work of warp `member` of a team of `size`. All methods are called by all lanes together.
template <typename T>
class Differentiator {
 public:
  __device__ Differentiator(const CombineVjpParams& p, const PeerInputs& inputs, int32_t team,
                            int32_t num_teams, int32_t member, int32_t size, char* memory)
      : p_(p),
        inputs_(inputs),
        sources_(p, team, num_teams, member == 0),
        member_(member),
        size_(size),
        barriers_(*reinterpret_cast<Barriers*>(memory)),
        buffers_(memory + kBarrierBytes),
        stages_(buffers_ + kBuffers * plan::RoundUp(RowBytes(p), 128) +
                member * kStages * kStageBytes) {
    if (Lane() == 0) ptx::FenceProxyAsyncGlobal();
    __syncwarp();
  }

  __device__ void Run() {
    int32_t nth = -1;  // of the rows of the source; none was looked for yet
    int32_t offset = 0;
    float lanes[kVector] = {};
    float weight = 0.0f;
    while (true) {
      while (num_loaded_ - num_done_ < kStages && Load()) {
      }
      if (sources_done_ == sources_started_) return;  // and no more can be started
      const int buffer = sources_done_ % kBuffers;
      const Rows rows = buffer == 0 ? rows_[0] : rows_[1];
      if (nth < 0) {
        Wait(&barriers_.filled[buffer], sources_done_ / kBuffers);
        nth = rows.first;
      }
      if (nth >= rows.count) {
        // By all lanes, because racecheck would not see that one lane acts for the others.
        ptx::ArriveExpectBytes(&barriers_.free[buffer], 0);
        ++sources_done_;
        nth = -1;
        continue;
      }
      const int32_t row = __shfl_sync(~0u, rows.of_lane, nth);
      if (offset == 0) weight = p_.row_weights[row];
      const int stage = num_done_ % kStages;
      Wait(&barriers_.stages[member_][stage], num_done_ / kStages);
      const int32_t bytes = plan::Min(kStageBytes, RowBytes(p_) - offset);
      Compute(stages_ + stage * kStageBytes, Buffer(buffer) + offset,
              static_cast<char*>(p_.d_rows) + int64_t{row} * RowBytes(p_) + offset, bytes, weight,
              lanes);
      ++num_done_;
      offset += bytes;
      if (offset == RowBytes(p_)) {
        const float d_weight = AddLanes(lanes);
        if (Lane() == 0) p_.d_weights[row] = d_weight;
#pragma unroll
        for (int i = 0; i < kVector; ++i) lanes[i] = 0.0f;
        offset = 0;
        nth += size_;
      }
      __syncwarp();  // the stage may be loaded again
    }
  }

 private:
  static constexpr int kVectorBytes = kVector * sizeof(T);
  static constexpr int kPerLane = kStageBytes / kVectorBytes / 32;

  // The rows of a source.
  struct Rows {
    int32_t of_lane;
    int32_t count;
    int32_t first;  // of this warp; then every size-th
  };

  __device__ static int32_t Lane() { return threadIdx.x % 32; }

  __device__ char* Buffer(int i) { return buffers_ + i * plan::RoundUp(RowBytes(p_), 128); }

  __device__ void Wait(uint64_t* barrier, int32_t use) {
    while (!ptx::TryWaitParity(barrier, use & 1)) {
    }
  }

  // Starts the next load of a part of a row, or the next source. False if that must wait, or if
  // there is nothing to start.
  __device__ bool Load() {
    if (load_nth_ >= load_rows_.count) return StartSource();
    const int32_t row = __shfl_sync(~0u, load_rows_.of_lane, load_nth_);
    const int32_t bytes = plan::Min(kStageBytes, RowBytes(p_) - load_offset_);
    if (Lane() == 0) {
      const int stage = num_loaded_ % kStages;
      uint64_t* barrier = &barriers_.stages[member_][stage];
      ptx::ArriveExpectBytes(barrier, bytes);
      ptx::BulkLoad(stages_ + stage * kStageBytes,
                    static_cast<const char*>(p_.rows) + int64_t{row} * RowBytes(p_) + load_offset_,
                    bytes, barrier);
    }
    ++num_loaded_;
    load_offset_ += bytes;
    if (load_offset_ == RowBytes(p_)) {
      load_offset_ = 0;
      load_nth_ += size_;
    }
    return true;
  }

  // The first warp also chooses the source and starts the load of its cotangent.
  __device__ bool StartSource() {
    if (is_last_ || sources_started_ - sources_done_ == kBuffers) return false;
    const int buffer = sources_started_ % kBuffers;
    const int32_t use = sources_started_ / kBuffers;
    int32_t source;
    if (member_ == 0) {
      // The other warps may still need the contents of the buffer.
      if (use > 0 && !WaitUnlessBusy(&barriers_.free[buffer], use - 1)) return false;
      source = sources_.Next().source;
    } else {
      if (!WaitUnlessBusy(&barriers_.known[buffer], use)) return false;
      source = barriers_.sources[buffer];
    }
    if (member_ == 0 && Lane() == 0) {
      barriers_.sources[buffer] = source;
      ptx::ArriveExpectBytes(&barriers_.known[buffer], 0);
      if (source != plan::kNone) {
        const int32_t rank = source / p_.num_tokens;
        const int64_t token = source % p_.num_tokens;
        ptx::ArriveExpectBytes(&barriers_.filled[buffer], RowBytes(p_));
        ptx::BulkLoad(Buffer(buffer), inputs_.Of<char>(rank, 0) + token * RowBytes(p_),
                      RowBytes(p_), &barriers_.filled[buffer]);
      }
    }
    is_last_ = source == plan::kNone;
    if (is_last_) return false;
    load_rows_.of_lane = RowOfLane(p_, source);
    load_rows_.count = __popc(__ballot_sync(~0u, load_rows_.of_lane >= 0));
    load_offset_ = 0;
    load_nth_ = load_rows_.first = (member_ + size_ - num_rows_ % size_) % size_;
    num_rows_ += load_rows_.count;
    (buffer == 0 ? rows_[0] : rows_[1]) = load_rows_;
    ++sources_started_;
    return true;
  }

  // Waits if this warp has nothing else to do. Otherwise it returns at once: true if the wait is
  // over.
  __device__ bool WaitUnlessBusy(uint64_t* barrier, int32_t use) {
    if (sources_started_ != sources_done_) {
      return __all_sync(~0u, ptx::TryWaitParity(barrier, use & 1));
    }
    Wait(barrier, use);
    return true;
  }

  __device__ static void Compute(const char* given, const char* gradient, char* d_row,
                                 int32_t bytes, float weight, float (&lanes)[kVector]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t at = (Lane() + 32 * i) * kVectorBytes;
      if (at >= bytes) break;
      float cotangent[kVector], products[kVector], scaled[kVector];
      Unpack(*reinterpret_cast<const RawVector<T>*>(gradient + at), cotangent);
      Unpack(*reinterpret_cast<const RawVector<T>*>(given + at), products);
      // If a row ends after half a vector, the other half is not part of it.
      if (at + kVectorBytes > bytes) {
#pragma unroll
        for (int j = kVector / 2; j < kVector; ++j) cotangent[j] = products[j] = 0.0f;
      }
      Multiply(products, cotangent);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        lanes[j] = __fadd_rn(lanes[j], products[j]);
        scaled[j] = __fmul_rn(cotangent[j], weight);
      }
      StorePart(reinterpret_cast<T*>(d_row + at), Pack<T>(scaled), bytes - at);
    }
  }

  const CombineVjpParams& p_;
  const PeerInputs& inputs_;
  SourceQueue<CombineVjpParams> sources_;
  bool is_last_ = false;  // no source comes any more
  int32_t member_;
  int32_t size_;
  Barriers& barriers_;
  char* buffers_;
  char* stages_;
  Rows rows_[kBuffers] = {};  // of the sources whose cotangents are there, or on their way
  Rows load_rows_ = {plan::kNone, 0, 0};
  int32_t load_nth_ = 0;
  int32_t load_offset_ = 0;
  int32_t num_rows_ = 0;  // of the sources that were started
  int32_t sources_started_ = 0;
  int32_t sources_done_ = 0;
  uint32_t num_loaded_ = 0;
  uint32_t num_done_ = 0;
};

template <typename T>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    CombineVjpKernel(const __grid_constant__ CombineVjpParams p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ PeerInputs inputs;
  const OpNumbers op = BeginOp(p.group);
  if (blockIdx.x == 0) Publish(p.group, op, {p.dy, nullptr, nullptr});
  const int32_t warp = threadIdx.x / 32;
  const int32_t num_warps = blockDim.x / 32;
  const int32_t size = TeamWarps(p), team = warp / size, member = warp % size;
  char* team_memory = memory + team * TeamBytes(p, size);
  if (member == 0 && threadIdx.x % 32 == 0) {
    InitBarriers(*reinterpret_cast<Barriers*>(team_memory), size);
  }
  if (WaitInputs(p.group, op, inputs)) {  // where the block meets
    Differentiator<T>(p, inputs, team * gridDim.x + blockIdx.x, num_warps / size * gridDim.x,
                      member, size, team_memory)
        .Run();
  }
  const int32_t first = blockIdx.x * num_warps + warp;
  for (int32_t c = first; c < p.capacity; c += gridDim.x * num_warps) {
    if (p.recv_src[c] < 0) ClearGradients<T>(p, c);
  }
  EndOp(p.group, op.epoch, [&] {
    for (int32_t c = warp; c < p.capacity; c += num_warps) FillGradients<T>(p, c, ~0u);
  });
}

}  // namespace

cudaError_t LoadCombineVjp() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [](auto element) {
      return cudaFuncSetAttribute(CombineVjpKernel<decltype(element)>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int64_t MaxCombineVjpRowBytes() {
  constexpr int kRoom = kSharedBytes - kBarrierBytes - kStages * kStageBytes;  // for the buffers
  return kRoom / kBuffers - 128;  // less the padding that aligns a buffer
}

cudaError_t LaunchCombineVjp(const CombineVjpParams& params, cudaStream_t stream) {
  const int team_warps = TeamWarps(params), num_teams = NumTeams(params);
  const int num_warps = num_teams * team_warps;
  const size_t shared_bytes = static_cast<size_t>(num_teams) * TeamBytes(params, team_warps);
  return VisitRowType(params.type, [&](auto element) {
    CombineVjpKernel<decltype(element)>
        <<<params.num_blocks, num_warps * 32, shared_bytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
