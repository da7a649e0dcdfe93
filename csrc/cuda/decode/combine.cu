// Combine in latency mode (README.md): every rank adds its rows of each token of its peers, and
// sends the rounded sum to the token's home, which adds what came.
//
// Warps do parts of rows (inbox.h). Each warp first does all its parts for peers, which wait for
// nothing, and then its parts of this rank's own tokens. So no wait of one rank keeps another rank
// from what it waits for. The former are for a start call to do, the latter for a done call.

#include "cuda/decode/combine.h"
#include "cuda/decode/handshake.cuh"
#include "cuda/rows/adder.cuh"
#include "cuda/rows/sources.cuh"
#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kWarps = 24;
constexpr int kThreads = kWarps * 32;
constexpr int32_t kStageBytes = 1920;
// Words of a part, at most, for each lane.
constexpr int kLaneWords = (WordsOf(kPartBytes, kWordBytes) + 31) / 32;
static_assert(kStageBytes % 128 == 0 && kStageBytes >= 12 * 32 * kLaneWords, "all words of lanes");

struct WarpMemory {
  char stage[kStageBytes];
  Term terms[kMaxTerms];
};
constexpr int kSharedBytes = kWarps * static_cast<int>(sizeof(WarpMemory));

// The work of one warp. All methods are called by all lanes together.
template <typename T, bool kWeighted>
class Combiner {
 public:
  __device__ Combiner(const DecodeCombineParams& p, DecodeOp op, WarpMemory& memory)
      : p_(p), op_(op), stage_(memory.stage), terms_(memory.terms) {}

  // Does what is for this call to do. Returns whether all waits have succeeded.
  __device__ bool Run() {
    const int32_t num_peers = p_.group.num_ranks - 1, num_parts = p_.slots.parts;
    const int32_t num_own = p_.num_tokens * num_parts, num_sent = num_own * num_peers;
    const int32_t num_warps = kWarps * gridDim.x;
    const int32_t begin_of_call = p_.calls == Calls::kDone ? num_sent : 0;
    const int32_t end_of_call = p_.calls == Calls::kStart ? num_sent : num_sent + num_own;
    uint32_t n = 0;
#pragma unroll 1
    for (int32_t i = begin_of_call + threadIdx.x / 32 * gridDim.x + blockIdx.x; i < end_of_call;
         i += num_warps) {
      if (TestStops(p_.group.tag, n++)) return true;
      const bool sends = i < num_sent;
      const int32_t unit = sends ? i / num_peers : i - num_sent;
      const int32_t token = unit / num_parts, part = unit - token * num_parts;
      int home = p_.group.rank;
      if (sends) {
        home += 1 + i - unit * num_peers;
        if (home >= p_.group.num_ranks) home -= p_.group.num_ranks;
      }
      // One place for all, because each launch must fetch its code.
      const int32_t begin = part * kPartBytes;
      const int32_t end = plan::Min(begin + kPartBytes, p_.row_bytes);
      const uint32_t ranks = sends ? 0 : RanksOf(token);
      const int32_t count = ListOwnRows(home * p_.num_tokens + token);
      if (count != 0) {
        AddTerms<T, kWeighted>(terms_, count, begin, end, stage_ - begin);
        __syncwarp();
      }
      if (!sends) {
        if (!BringHome(token, part, begin, end, ranks)) return false;
      } else if (count != 0) {
        StampClock(p_.group, op_.epoch, DecodePhase::kRowsRead);
        TestDelay(p_.group.rank, op_.epoch, 64 + token);
        Send(home, token, part, end - begin);
        StampClock(p_.group, op_.epoch, DecodePhase::kRowsSent);
      }
      __syncwarp();  // the stage and the list may be written again
    }
    return true;
  }

 private:
  static constexpr int kChannels = kWordBytes / static_cast<int>(sizeof(T));

  __device__ __forceinline__ static int32_t Lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ uint32_t* StageWord(int32_t word) const {
    return reinterpret_cast<uint32_t*>(stage_) + kWordInts * word;
  }

  // The ranks that have kept rows of this rank's token, as a mask.
  __device__ __forceinline__ uint32_t RanksOf(int32_t token) const {
    uint32_t ranks = 0;
    if (Lane() < p_.top_k) {
      const int32_t id = p_.topk[token * p_.top_k + Lane()];
      const int32_t row = p_.dest_row[token * p_.top_k + Lane()];
      if (id >= 0 && id < p_.num_experts && row >= 0 && row < p_.capacity) {
        ranks = 1u << p_.by_num_local(id);
      }
    }
    return __reduce_or_sync(~0u, ranks);
  }

  // Lists this rank's rows of a source, and returns their number.
  __device__ __forceinline__ int32_t ListOwnRows(int32_t source) {
    const int32_t row = RowOfLane(p_, source);
    if (row >= 0) {
      const char* address = static_cast<const char*>(p_.rows) + int64_t{row} * p_.row_bytes;
      terms_[Lane()] = {address, kWeighted ? p_.row_weights[row] : 1.0f};
    }
    __syncwarp();
    return __popc(__ballot_sync(~0u, row >= 0));
  }

  __device__ __forceinline__ void Send(int home, int32_t token, int32_t part, int32_t bytes) {
    const int32_t share = DecodeShare(p_.group.rank, home);
    StampedWord* to = WordsAt(p_, op_, home) + p_.slots.RowAt(share, token, part);
    const int32_t num_words = WordsOf(bytes, kWordBytes);
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      const int32_t word = Lane() + 32 * j;
      if (word >= num_words) continue;
      const uint32_t* data = StageWord(word);
      StoreWord(to + word, data[0], data[1], data[2], op_.stamp());
    }
  }

  // Adds the ranks' sums of a part, in ascending order; the stage has this rank's. False once the
  // group has failed.
  __device__ __forceinline__ bool BringHome(int32_t token, int32_t part, int32_t begin, int32_t end,
                                            uint32_t ranks) {
    const int32_t num_words = WordsOf(end - begin, kWordBytes);
    float sums[kLaneWords][kChannels] = {};
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
      const int rank = __ffs(ranks) - 1;
      uint4 data[kLaneWords];
      if (rank == p_.group.rank) {
#pragma unroll
        for (int j = 0; j < kLaneWords; ++j) {
          const uint32_t* words = StageWord(Lane() + 32 * j);
          data[j] = make_uint4(words[0], words[1], words[2], 0);
        }
      } else {
        const int32_t share = DecodeShare(rank, p_.group.rank);
        const StampedWord* from =
            WordsAt(p_, op_, p_.group.rank) + p_.slots.RowAt(share, token, part);
        const bool ok = WaitWords(p_, op_, from, num_words, WordKind::kSumWords, rank, data);
        if (!__all_sync(~0u, ok)) return false;
      }
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        float channels[kChannels];
        constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
        UnpackWord(T{}, data[j].x, &channels[0]);
        UnpackWord(T{}, data[j].y, &channels[kPerWord]);
        UnpackWord(T{}, data[j].z, &channels[2 * kPerWord]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums[j][c] = __fadd_rn(sums[j][c], channels[c]);
      }
    }
    StampClock(p_.group, op_.epoch, DecodePhase::kRowsThere);
    __syncwarp();
    Store(token, begin, end - begin, sums);
    return true;
  }

  __device__ __forceinline__ void Store(int32_t token, int32_t begin, int32_t bytes,
                                        const float (&sums)[kLaneWords][kChannels]) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      uint32_t* words = StageWord(Lane() + 32 * j);
#pragma unroll
      for (int i = 0; i < kWordInts; ++i) words[i] = PackWord(T{}, &sums[j][i * kPerWord]);
    }
    __syncwarp();
    char* y = static_cast<char*>(p_.y) + int64_t{token} * p_.row_bytes + begin;
#pragma unroll
    for (int j = 0; j < (kPartBytes / 16 + 31) / 32; ++j) {
      const int32_t at = 16 * (Lane() + 32 * j);
      if (at < bytes) {
        *reinterpret_cast<uint4*>(y + at) = *reinterpret_cast<const uint4*>(stage_ + at);
      }
    }
  }

  const DecodeCombineParams& p_;
  DecodeOp op_;
  char* stage_;
  Term* terms_;
};

// The result of a failed combine, by one block.
__device__ __noinline__ void Poison(const DecodeCombineParams& p) {
  uint4* words = static_cast<uint4*>(p.y);
  const int64_t num_words = int64_t{p.num_tokens} * p.row_bytes / 16;
  for (int64_t i = threadIdx.x; i < num_words; i += kThreads) {
    words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
}

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1)
    DecodeCombineKernel(const __grid_constant__ DecodeCombineParams p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ bool found_other;
  const DecodeOp op = BeginDecode(p, found_other);
  const bool greets = blockIdx.x == 0 && threadIdx.x / 32 == kWarps - 1;
  bool ok = !greets || SayHello(p, op);
  WarpMemory& of_warp = reinterpret_cast<WarpMemory*>(memory)[threadIdx.x / 32];
  ok = ok && Combiner<T, kWeighted>(p, op, of_warp).Run();
  if (p.calls == Calls::kStart) return EndStart(p, op, found_other);
  StampClock(p.group, op.epoch, DecodePhase::kWritten);
  if (greets) ok = ok && WaitHellos(p, op);
  EndDecode(p, op, found_other, ok, [&] { Poison(p); });
}

}  // namespace

DecodeCombineParams ParamsOfDecode(const ops::CombineArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  DecodeCombineParams params{};
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.num_experts = geometry.num_experts;
  params.by_num_local = Divider::By(geometry.num_local_experts());
  params.capacity = geometry.capacity;
  params.num_rows = geometry.rows_per_source();
  params.row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.topk = args.handle.topk;
  params.dest_row = args.handle.dest_row;
  params.recv_rows = args.handle.recv_rows;
  params.y = args.y;
  params.slots = DecodeSlotsOf(geometry.num_ranks, geometry.num_tokens, 0, params.row_bytes,
                               /*has_scales=*/false, 0);
  return params;
}

const char* ObstacleOf(const DecodeCombineParams& p) {
  return DecodeObstacle(p.inboxes, p.slots, p.top_k);
}

cudaError_t LoadDecodeCombine() {
  const auto load = [](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  };
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [&](auto element) {
      const cudaError_t first = load(DecodeCombineKernel<decltype(element), false>);
      return first != cudaSuccess ? first : load(DecodeCombineKernel<decltype(element), true>);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchDecodeCombine(const DecodeCombineParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    const auto kernel = params.row_weights == nullptr
                            ? DecodeCombineKernel<decltype(element), false>
                            : DecodeCombineKernel<decltype(element), true>;
    kernel<<<params.num_blocks, kThreads, kSharedBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
