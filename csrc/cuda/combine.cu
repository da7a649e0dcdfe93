// The combine op: the rows of a token meet at home.
//
// Layout "token": each rank has one row of a token at most, so home reads them over the link and
// adds. Layout "expert": each rank first adds its own rows of every token of its peers; home reads
// these partial sums as soon as the chunk of tokens that they belong to is ready. The first blocks
// add
// (*producers*), the others bring home (*consumers*), at the same time.
//
// Either way a warp makes one sum after the other from a list of terms. It loads them by bulk
// copies into a ring of stages of its own, several terms ahead, across the bounds of sums.

#include <algorithm>

#include "cuda/combine.h"
#include "cuda/sync.cuh"
#include "cuda/vectors.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kStages = 6;
constexpr int kStageBytes = 2048;
// Tokens whose partial sums become ready together.
constexpr int kChunkTokens = 32;
constexpr int kMaxTerms = 32;

// One term of a sum.
struct Term {
  const char* row;
  float factor;
  bool begins_segment;  // of the terms of one rank, whose sum is rounded
  bool ends_segment;
};

// What a warp's ring keeps for each stage.
struct Stage {
  char* output;  // where the finished sum goes, if this is its last term; else null
  float factor;
  uint16_t bytes;
  bool is_segment;  // on its own
  bool ends_segment;
};

struct WarpMemory {
  uint64_t barriers[kStages];
  Stage stages[kStages];
  Term terms[kMaxTerms];
};

constexpr int kSharedBytes =
    kWarps * (kStages * kStageBytes + static_cast<int>(sizeof(WarpMemory)));

// Adds rows for one warp. All methods are called by all lanes together.
template <typename T>
class Adder {
 public:
  __device__ Adder(const CombineParams& p, char* shared)
      : row_bytes_(p.hidden * static_cast<int32_t>(sizeof(T))),
        weighted_(p.row_weights != nullptr) {
    const int32_t warp = threadIdx.x / 32;
    buffers_ = shared + warp * kStages * kStageBytes;
    memory_ = reinterpret_cast<WarpMemory*>(shared + kWarps * kStages * kStageBytes) + warp;
    if (Lane() == 0) {
      for (uint64_t& barrier : memory_->barriers) ptx::InitBarrier(&barrier, 1);
      ptx::FenceBarrierInit();
      ptx::FenceProxyAsyncGlobal();
    }
    __syncwarp();
  }

  // The list that the next sum is made from; valid until Sum returns.
  __device__ Term* terms() { return memory_->terms; }

  // Starts the sum of the first `num_terms` terms, as long as a row, to `output`. Waits for stages
  // by finishing earlier terms.
  __device__ void Sum(int32_t num_terms, char* output) {
    __syncwarp();
    for (int32_t offset = 0; offset < row_bytes_; offset += kStageBytes) {
      const int32_t bytes = plan::Min(kStageBytes, row_bytes_ - offset);
      for (int32_t i = 0; i < num_terms; ++i) {
        if (num_loaded_ - num_added_ == kStages) Add();
        if (Lane() == 0) {
          const int32_t s = num_loaded_ % kStages;
          const Term& term = memory_->terms[i];
          char* target = i + 1 == num_terms ? output + offset : nullptr;
          memory_->stages[s] = {target, term.factor, static_cast<uint16_t>(bytes),
                                term.begins_segment && term.ends_segment, term.ends_segment};
          ptx::ArriveExpectBytes(&memory_->barriers[s], bytes);
          ptx::BulkLoad(buffers_ + s * kStageBytes, term.row + offset, bytes,
                        &memory_->barriers[s]);
        }
        ++num_loaded_;
      }
    }
    __syncwarp();
  }

  // How many terms were started so far: a mark for FinishUntil.
  __device__ int32_t num_started() const { return num_loaded_; }

  // Finishes the sums whose terms were started before `mark`.
  __device__ void FinishUntil(int32_t mark) {
    while (num_added_ < mark) Add();
  }

  // Finishes all sums that were started.
  __device__ void Finish() { FinishUntil(num_loaded_); }

 private:
  static constexpr int kVectorBytes = kVector * sizeof(T);
  static constexpr int kPerLane = kStageBytes / kVectorBytes / 32;

  __device__ static int32_t Lane() { return threadIdx.x % 32; }

  // Adds the oldest term that is loaded.
  __device__ void Add() {
    const int32_t s = num_added_ % kStages;
    const uint32_t parity = (num_added_ / kStages) & 1;
    while (!ptx::TryWaitParity(&memory_->barriers[s], parity)) {
    }
    const Stage stage = memory_->stages[s];
    const T* row = reinterpret_cast<const T*>(buffers_ + s * kStageBytes);
    // Lanes past the end of a short chunk add what lies there and store nothing.
    RawVector<T> raw[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      raw[i] = *reinterpret_cast<const RawVector<T>*>(row + (Lane() + 32 * i) * kVector);
    }
    if (stage.is_segment && !weighted_) {  // its sum needs no rounding
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        float term[kVector];
        Unpack(raw[i], term);
#pragma unroll
        for (int j = 0; j < kVector; ++j) total_[i][j] = __fadd_rn(total_[i][j], term[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        float term[kVector];
        Unpack(raw[i], term);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (weighted_) term[j] = __fmul_rn(term[j], stage.factor);
          segment_[i][j] = __fadd_rn(segment_[i][j], term[j]);
        }
      }
      if (stage.ends_segment) CloseSegment();
    }
    if (stage.output != nullptr) StoreTotal(stage);
    ++num_added_;
    __syncwarp();  // the stage may be loaded again
  }

  // Adds the segment, rounded, to the total.
  __device__ void CloseSegment() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      float rounded[kVector];
      Unpack(Pack<T>(segment_[i]), rounded);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        total_[i][j] = __fadd_rn(total_[i][j], rounded[j]);
        segment_[i][j] = 0.0f;
      }
    }
  }

  __device__ void StoreTotal(const Stage& stage) {
    const int32_t num_vectors = stage.bytes / kVectorBytes;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t v = Lane() + 32 * i;
      if (v < num_vectors) {
        StoreVector(reinterpret_cast<T*>(stage.output) + v * kVector, Pack<T>(total_[i]));
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) total_[i][j] = 0.0f;
    }
  }

  char* buffers_;
  WarpMemory* memory_;
  int32_t row_bytes_;
  bool weighted_;
  int32_t num_loaded_ = 0;
  int32_t num_added_ = 0;
  float segment_[kPerLane][kVector] = {};
  float total_[kPerLane][kVector] = {};
};

// Puts this rank's rows of one source into the list, from `first` on, as one segment. `row` is row
// m in lane m, or -1; rows are packed to the left. Returns how many there are.
__device__ int32_t ListOwnRows(const CombineParams& p, int32_t row, int32_t row_bytes,
                               Term* terms) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t count = __popc(__ballot_sync(~0u, row >= 0));
  if (row >= 0) {
    const float factor = p.row_weights == nullptr ? 1.0f : p.row_weights[row];
    terms[lane] = {static_cast<const char*>(p.rows) + int64_t{row} * row_bytes, factor, lane == 0,
                   lane + 1 == count};
  }
  return count;
}

// Row m of a source in lane m, or -1.
__device__ int32_t RowOfLane(const CombineParams& p, int32_t source) {
  const int32_t lane = threadIdx.x % 32;
  if (lane >= p.num_rows) return plan::kNone;
  const int32_t row = p.recv_rows[int64_t{source} * p.num_rows + lane];
  return row < p.capacity ? row : plan::kNone;
}

__host__ __device__ int32_t NumChunks(int32_t num_tokens) {
  return plan::Min((num_tokens + kChunkTokens - 1) / kChunkTokens, kMaxRowChunks);
}

// Tokens of a chunk; all but the last have as many.
__host__ __device__ int32_t ChunkSize(int32_t num_tokens) {
  const int32_t num_chunks = NumChunks(num_tokens);
  return (num_tokens + num_chunks - 1) / num_chunks;
}

// Producers: the partial sums for all peers, by one of `num_warps` warps. Tokens of all peers take
// turns, so that all homes can begin early. The warp that finishes a chunk last tells its home.
template <typename T>
__device__ void Produce(const CombineParams& p, uint64_t epoch, Adder<T>& adder, int32_t warp,
                        int32_t num_warps) {
  const int32_t row_bytes = p.hidden * sizeof(T);
  const int32_t num_peers = p.group.num_ranks - 1;
  const int32_t chunk_size = ChunkSize(p.num_tokens);
  Workspace& own = Own(p.group);
  const auto token_of = [&](int32_t item) { return item / num_peers; };
  const auto peer_of = [&](int32_t item) {
    return (p.group.rank + 1 + item % num_peers) % p.group.num_ranks;
  };
  const auto source_of = [&](int32_t item) {
    return peer_of(item) * p.num_tokens + token_of(item);
  };
  const auto finish = [&](int32_t item) {
    if (item < 0) return;
    ptx::FenceProxyAsyncGlobal();  // home reads by bulk copies what this lane stored
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const int32_t chunk = token_of(item) / chunk_size;
    const int32_t size = plan::Min(chunk_size, p.num_tokens - chunk * chunk_size);
    __threadfence();
    uint32_t* counter = &own.chunk_tokens[peer_of(item)][chunk];
    if (atomicAdd(counter, 1u) != static_cast<uint32_t>(size) - 1) return;
    *counter = 0;
    __threadfence_system();
    ptx::StoreReleaseSystem(&p.group.peers[peer_of(item)]->rows[p.group.rank][chunk],
                            FlagValue(epoch, p.group.tag));
  };
  // A sum is finished while the next one's terms are on their way.
  int32_t pending = -1;
  int32_t pending_mark = 0;
  const int32_t num_items = p.num_tokens * num_peers;
  int32_t next_row = warp < num_items ? RowOfLane(p, source_of(warp)) : plan::kNone;
  for (int32_t item = warp; item < num_items; item += num_warps) {
    const int32_t row = next_row;
    const int32_t next = item + num_warps;
    if (next < num_items) next_row = RowOfLane(p, source_of(next));  // there when it is needed
    const int32_t num_terms = ListOwnRows(p, row, row_bytes, adder.terms());
    if (num_terms > 0) {
      adder.Sum(num_terms, static_cast<char*>(p.partials) + int64_t{source_of(item)} * row_bytes);
    }
    adder.FinishUntil(pending_mark);
    finish(pending);
    pending = item;
    pending_mark = adder.num_started();
  }
  adder.Finish();
  finish(pending);
}

// What a warp needs to know of a token: its entries (lane k has entry k) and, in layout "expert",
// this rank's rows of it (lane m has row m).
struct TokenRows {
  int32_t expert;
  int32_t row;
  int32_t own_row;
};

__device__ TokenRows LoadToken(const CombineParams& p, int32_t token) {
  const int32_t lane = threadIdx.x % 32;
  TokenRows rows{plan::kNone, plan::kNone, plan::kNone};
  if (token >= p.num_tokens) return rows;
  if (lane < p.top_k) {
    rows.expert = p.topk[int64_t{token} * p.top_k + lane];
    rows.row = p.dest_row[int64_t{token} * p.top_k + lane];
  }
  if (p.layout == Layout::kExpert) {
    rows.own_row = RowOfLane(p, p.group.rank * p.num_tokens + token);
  }
  return rows;
}

// Home: lists the terms of a token: for each rank, ascending, this rank's own rows or the peer's
// one row. Returns how many there are.
__device__ int32_t ListTerms(const CombineParams& p, uint64_t epoch, int32_t token,
                             const TokenRows& rows, int32_t row_bytes, Term* terms) {
  const int32_t lane = threadIdx.x % 32;
  const bool by_expert = p.layout == Layout::kExpert;
  const int32_t source = p.group.rank * p.num_tokens + token;
  const bool exists =
      rows.expert >= 0 && rows.expert < p.num_experts && rows.row >= 0 && rows.row < p.capacity;
  const int32_t rank =
      exists ? plan::RankOfExpert(rows.expert, p.num_experts / p.group.num_ranks) : plan::kNone;
  int32_t count = 0;
  for (int32_t r = 0; r < p.group.num_ranks; ++r) {
    const uint32_t there = __ballot_sync(~0u, rank == r);
    if (there == 0) continue;
    if (by_expert && r == p.group.rank) {
      count += ListOwnRows(p, rows.own_row, row_bytes, terms + count);
      continue;
    }
    if (lane == __ffs(there) - 1) {
      const char* base = PeerAddress<char>(p.group, epoch, r, 0);
      terms[count] = {base + int64_t{by_expert ? source : rows.row} * row_bytes, 1.0f, true, true};
    }
    ++count;
  }
  return count;
}

// Home: the sums of all tokens, by one of `num_warps` warps. In layout "expert" it waits for each
// chunk of its peers' partial sums; false once the group has failed.
template <typename T>
__device__ bool BringHome(const CombineParams& p, uint64_t epoch, Adder<T>& adder, int32_t warp,
                          int32_t num_warps) {
  const int32_t row_bytes = p.hidden * sizeof(T);
  const int32_t lane = threadIdx.x % 32;
  const int32_t chunk_size = ChunkSize(p.num_tokens);
  const bool by_expert = p.layout == Layout::kExpert;
  int32_t ready_chunk = -1;
  TokenRows next_rows = LoadToken(p, warp);
  for (int32_t token = warp; token < p.num_tokens; token += num_warps) {
    const TokenRows rows = next_rows;
    next_rows = LoadToken(p, token + num_warps);  // there when it is needed
    const int32_t chunk = token / chunk_size;
    if (by_expert && chunk != ready_chunk) {
      bool ready = true;
      for (int32_t r = lane; r < p.group.num_ranks; r += 32) {
        if (r == p.group.rank) continue;
        ready = ready && WaitFlag(p.group, Own(p.group).rows[r][chunk], epoch, Phase::kRows, r);
      }
      if (!__all_sync(~0u, ready)) {
        adder.Finish();
        return false;
      }
      ptx::FenceProxyAsyncGlobal();
      __syncwarp();
      ready_chunk = chunk;
    }
    char* y = static_cast<char*>(p.y) + int64_t{token} * row_bytes;
    const int32_t num_terms = ListTerms(p, epoch, token, rows, row_bytes, adder.terms());
    if (num_terms > 0) {
      adder.Sum(num_terms, y);
      continue;
    }
    for (int32_t i = lane; i < row_bytes / 16; i += 32) {
      reinterpret_cast<uint4*>(y)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  adder.Finish();
  return true;
}

// Home: values of single rows.
__device__ void BringValues(const CombineParams& p, uint64_t epoch, int32_t thread,
                            int32_t num_threads) {
  const int32_t count = p.num_tokens * p.top_k;
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  for (int32_t i = thread; i < count; i += num_threads) {
    const int32_t expert = p.topk[i];
    const int32_t row = p.dest_row[i];
    float value = 0.0f;
    if (expert >= 0 && expert < p.num_experts && row >= 0 && row < p.capacity) {
      const float* values =
          PeerAddress<float>(p.group, epoch, plan::RankOfExpert(expert, num_local), 1);
      value = __ldcg(&values[p.layout == Layout::kExpert ? int64_t{row}
                                                         : int64_t{row} * p.top_k + i % p.top_k]);
    }
    p.home[i] = value;
  }
}

template <typename T>
__device__ void Poison(const CombineParams& p) {
  const int64_t num_words = int64_t{p.num_tokens} * p.hidden * sizeof(T) / 16;
  uint4* words = static_cast<uint4*>(p.y);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_words;
       i += int64_t{gridDim.x} * kThreads) {
    words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
}

// Blocks that add; the rest bring home.
__device__ int32_t NumProducers(const CombineParams& p) {
  if (p.layout == Layout::kToken || p.group.num_ranks == 1) return 0;
  return max(1, static_cast<int32_t>(gridDim.x) / 2);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    CombineKernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) char shared[];
  const uint64_t epoch = BeginOp(p.group);
  const void* payload = p.layout == Layout::kToken ? p.rows : p.partials;
  if (blockIdx.x == 0) Publish(p.group, epoch, {payload, p.values, nullptr});
  Adder<T> adder(p, shared);
  const int32_t num_producers = NumProducers(p);
  const int32_t block = blockIdx.x;
  const int32_t warp = threadIdx.x / 32;
  if (block < num_producers) {
    Produce<T>(p, epoch, adder, warp * num_producers + block, num_producers * kWarps);
    EndOp(p.group, epoch);
    return;
  }
  const int32_t num_consumers = gridDim.x - num_producers;
  const int32_t consumer = block - num_producers;
  bool ok = WaitArrivals(p.group, epoch);
  if (ok) {
    if (p.values != nullptr) {
      BringValues(p, epoch, consumer * kThreads + threadIdx.x, num_consumers * kThreads);
    }
    ok = BringHome<T>(p, epoch, adder, warp * num_consumers + consumer, num_consumers * kWarps);
  }
  if (!__syncthreads_and(ok)) Poison<T>(p);
  EndOp(p.group, epoch);
}

}  // namespace

cudaError_t LoadCombine() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [](auto element) {
      return cudaFuncSetAttribute(CombineKernel<decltype(element)>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    CombineKernel<decltype(element)><<<params.num_blocks, kThreads, kSharedBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
