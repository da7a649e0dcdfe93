// Combine between hosts: the rows of a token are added on each rank, then on each host, and each
// host sends one row home.
//
// In a block, *makers* add this rank's rows of each token into parts, one for each way and each
// other forwarder; *adders* add, as the forwarder, their own rows and the parts of the other ranks
// of the host, and send the sums home; *homes* add what came of all hosts, with their own host's
// rows and parts, which they read themselves. In such a team the first warp tells others what the
// team has done, and the rest take the tokens of a chunk in turn. A rank that is alone on its host
// has no makers.

#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/combine.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/sums.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/adder.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kWarps = 16;  // with more, whose rings are shorter, it is slower
constexpr int kThreads = kWarps * 32;
constexpr int kRings = kWarps - 2;  // at least two teams have a warp that adds nothing

// The warps of the teams. Homes move more bytes than adders.
struct Teams {
  int32_t makers, adders, homes;
  __device__ explicit Teams(const NetworkShape& shape)
      : makers(shape.host_ranks > 1 ? 5 : 0),
        adders(shape.host_ranks > 1 ? 5 : 7),
        homes(kWarps - makers - adders) {}
};

// Shared memory of a block.
struct CombineMemory {
  char rings[kRings][kStreamRingBytes];
  SumMember::Memory of_warp[kWarps];
  PeerInputs inputs;  // for WaitInputs, which gives nothing here
  uint32_t done[kWarps];
};

// Writes the k-th value from lane k, if there are any.
__device__ void StoreValues(uint32_t* values, int32_t top_k, uint32_t value) {
  const int32_t k = threadIdx.x % 32;
  if (values != nullptr && k < top_k) values[k] = value;
}

// Makers: this rank's sums for the other ranks of its host that the block's ways lead to.
template <typename T, bool kWeighted>
__device__ bool MakeParts(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          SumMember& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = ways.WindowTokens(shape, format.bytes, p.num_tokens);
  const int32_t lane = threadIdx.x % 32;
  EntryCursors cursors;
  const auto make = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t index = (network.node.rank + turn) % shape.host_ranks;
    if (index == network.node.rank) return true;  // adders and homes read those rows
    const int32_t first = window * window_tokens;
    const EntryRange entries =
        cursors.Find(p.routes, p.num_tokens, way.host * shape.host_ranks + index, turn, first,
                     first + window_tokens);
    const WindowRows rows(p.routes, entries, first, self.memory->starts);
    const SlotIndex at = way.Slot(n);
    bool ok = true;
    if (lane == 0 && kMutation != kWithoutPartDone) {
      const uint64_t before = WordBefore(network, epoch, way, n, own.part_sent(index, at));
      ok = WaitWord(network, own.part_done(index, at), before, WordKind::kPartDone, index);
    }
    if (!__shfl_sync(~0u, ok, 0)) return false;
    TestDelay(network.node.rank, epoch, 3, self.warp);
    char* const part = own.part(index, at);
    const int32_t num_tokens = __popc(rows.tokens()), nth_bit = PlaceOfNthBit(rows.tokens());
    for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_workers) {
      const int32_t bit = __shfl_sync(~0u, nth_bit, i);
      char* const sum = format.Of(part, rows.tokens(), bit);
      SumTerms of_rank(self.memory->terms);
      const uint32_t value = ListRows<kWeighted>(p, rows.Of(bit), of_rank);
      StoreSum<T, kWeighted>(p, self, of_rank, sum);
      StoreValues(format.ValuesOf(sum), p.top_k, value);
    }
    if (lane == 0 && self.warp == 0) *reinterpret_cast<ChunkHeader*>(part) = {rows.tokens()};
    if (self.IsTeller(network.node, ok) && lane == 0) {
      const uint64_t word = ChunkWord(epoch, network.node.tag, window);
      ptx::StoreRelaxedSystem(own.part_sent(index, at), word);
      ptx::StoreReleaseSystem(network.Of(index).part_ready(network.node.rank, at), word);
    }
    return ok;
  };
  return ForEachWindow(network, ways, p.num_tokens, window_tokens, shape.host_ranks, make);
}

// Waits for the parts of the other ranks of this host for this rank. Lane d gets the tokens of rank
// d; this rank's are `own_tokens`.
__device__ bool WaitParts(const NetworkParams& network, SlotIndex at, uint64_t word,
                          uint32_t own_tokens, uint32_t& tokens_of_lane) {
  const int32_t lane = threadIdx.x % 32;
  bool ok = true;
  tokens_of_lane = lane == network.node.rank ? own_tokens : 0;
  if (lane < network.shape.host_ranks && lane != network.node.rank) {
    if (kMutation != kWithoutPart) {
      ok = WaitWord(network, network.Own().part_ready(lane, at), word, WordKind::kPart, lane);
    }
    if (ok) {
      const char* part = network.Of(lane).part(network.node.rank, at);
      tokens_of_lane = __ldcg(reinterpret_cast<const uint32_t*>(part));
    }
  }
  return __all_sync(~0u, ok);
}

// Tells the other ranks of this host that their parts have been read. By the lanes of one warp.
__device__ void TellPartsDone(const NetworkParams& network, SlotIndex at, uint64_t word) {
  const int32_t lane = threadIdx.x % 32;
  if (lane >= network.shape.host_ranks || lane == network.node.rank) return;
  ptx::StoreReleaseSystem(network.Of(lane).part_done(network.node.rank, at), word);
}

// Adders: the sums of this host for this rank's counterparts.
template <typename T, bool kWeighted>
__device__ bool SendSums(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                         SumMember& self) {
  const NetworkParams& network = p.network;
  const SumRow format(p);
  const int32_t window_tokens = ways.WindowTokens(network.shape, format.bytes, p.num_tokens);
  const int32_t lane = threadIdx.x % 32;
  EntryCursors cursors;
  const auto send = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    if (way.host == network.host) return true;  // homes read those parts
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex at = way.Slot(n);
    const int32_t first = window * window_tokens;
    const int32_t counterpart = way.host * network.shape.host_ranks + network.node.rank;
    const WindowRows rows(
        p.routes,
        cursors.Find(p.routes, p.num_tokens, counterpart, turn, first, first + window_tokens),
        first, self.memory->starts);
    const ChunkSender sender(network, way, epoch);
    uint32_t tokens_of_lane;
    if (!WaitParts(network, at, word, rows.tokens(), tokens_of_lane)) return false;
    if (!sender.WaitSlot(n)) return false;
    TestDelay(network.node.rank, epoch, 4, self.warp);
    const uint32_t tokens = __reduce_or_sync(~0u, tokens_of_lane);
    char* const chunk = sender.Memory(n);
    const int32_t num_tokens = __popc(tokens), nth_bit = PlaceOfNthBit(tokens);
    const WindowSums<T, kWeighted> sums(p, format, self, rows, at, tokens_of_lane);
    for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_workers) {
      const int32_t bit = __shfl_sync(~0u, nth_bit, i);
      char* const sum = format.Of(chunk, tokens, bit);
      uint32_t value;
      SumTerms here = sums.ListHere(bit, value);
      sums.Store(here, sum);
      StoreValues(format.ValuesOf(sum), p.top_k, value);
    }
    if (lane == 0 && self.warp == 0) *reinterpret_cast<ChunkHeader*>(chunk) = {tokens};
    bool ok = true;
    if (self.IsTeller(network.node, ok)) {
      sender.Send(n, window,
                  static_cast<int32_t>(sizeof(ChunkHeader)) + __popc(tokens) * format.bytes);
      TellPartsDone(network, at, word);
    }
    return ok;
  };
  return ForEachWindow(network, ways, p.num_tokens, window_tokens, 1, send);
}

// The chunks of a window that come home from the other hosts. Each lane has those of two. By one
// warp.
class HostChunks {
 public:
  __device__ HostChunks(const NetworkParams& network, SlotIndex here, uint64_t word)
      : network_(network), here_(here), word_(word) {}

  // Whether all of them are there, or something else that Wait has to see.
  __device__ bool AreHere() const {
    bool are = true;
    ForEach([&](int32_t, SlotIndex at) {
      uint64_t seen;
      are = are && LookAt(network_.Own().arrived(at), word_, seen) != Seen::kNot;
    });
    return __all_sync(~0u, are);
  }

  __device__ bool Wait() {
    bool ok = true;
    ForEach([&](int32_t i, SlotIndex at) {
      if (kMutation != kWithoutHome) {
        ok = ok && WaitWord(network_, network_.Own().arrived(at), word_, WordKind::kChunkArrived,
                            network_.Peer(at.host, network_.node.rank));
        if (ok) Accept(network_, at, word_);
      }
      if (ok) tokens_[i] = __ldcg(reinterpret_cast<const uint32_t*>(network_.Own().in(at)));
    });
    return __all_sync(~0u, ok);
  }

  // The row of the `bit`-th token from another host, or null. By lane host % 32, after Wait.
  __device__ const char* RowOf(int32_t host, int32_t bit, const SumRow& format) const {
    const uint32_t tokens = host < 32 ? tokens_[0] : tokens_[1];
    if ((tokens >> bit & 1) == 0) return nullptr;
    return format.Of(network_.Own().in({host, here_.lane, here_.slot}), tokens, bit);
  }

 private:
  template <typename Visit>
  __device__ __forceinline__ void ForEach(Visit&& visit) const {
    static_assert(kMaxHosts == 64);
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t host = static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
      if (host >= network_.shape.num_hosts || host == network_.host) continue;
      visit(i, SlotIndex{host, here_.lane, here_.slot});
    }
  }

  const NetworkParams& network_;
  SlotIndex here_;
  uint64_t word_;
  uint32_t tokens_[2] = {};
};

// Homes: this rank's tokens. The blocks that serve a lane share its windows.
template <typename T, bool kWeighted>
__device__ bool AddAtHome(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          SumMember& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = ways.WindowTokens(shape, format.bytes, p.num_tokens);
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_shares = ways.count / ways.num_lanes;
  EntryCursors cursors;
  const auto add = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t number = blockIdx.x + turn * gridDim.x;
    if (n % num_shares != number / ways.num_lanes) return true;  // another block's
    const int32_t first = window * window_tokens;
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex here{network.host, way.lane, n % kChunkSlots};
    const int32_t this_rank = network.host * shape.host_ranks + network.node.rank;
    const WindowRows rows(
        p.routes,
        cursors.Find(p.routes, p.num_tokens, this_rank, turn, first, first + window_tokens), first,
        self.memory->starts);
    uint32_t tokens_of_lane;
    if (!WaitParts(network, here, word, rows.tokens(), tokens_of_lane)) return false;
    TestDelay(network.node.rank, epoch, 5, self.warp);
    const int32_t count = plan::Min(window_tokens, p.num_tokens - first);
    const WindowSums<T, kWeighted> sums(p, format, self, rows, here, tokens_of_lane);
    HostChunks chunks(network, here, word);
    const int32_t first_bit = self.TakeShare(count);
    const auto for_tokens = [&](auto&& visit) {
      for (int32_t bit = first_bit; bit < count; bit += self.num_workers) {
        const int64_t token = first + bit;
        visit(bit, static_cast<char*>(p.y) + token * p.row_bytes,
              p.home != nullptr ? reinterpret_cast<uint32_t*>(p.home) + token * p.top_k : nullptr);
      }
    };
    const auto finish = [&](int32_t bit, SumTerms& sum, uint32_t value, char* y, uint32_t* values) {
      sums.ListHosts(sum, value, [&](int32_t host) { return chunks.RowOf(host, bit, format); });
      if (sum.row() != y) sums.Store(sum, y);
      StoreValues(values, p.top_k, value);
    };
    if (p.layout == Layout::kToken || chunks.AreHere()) {
      if (!chunks.Wait()) return false;
      for_tokens([&](int32_t bit, char* y, uint32_t* values) {
        uint32_t value;
        SumTerms sum = sums.ListHere(bit, value);
        finish(bit, sum, value, y, values);
      });
    } else {
      // There is much to add here while chunks are under way.
      for_tokens([&](int32_t bit, char* y, uint32_t* values) {
        uint32_t value;
        SumTerms sum = sums.ListHere(bit, value);
        const char* row = sum.row();
        if (row == nullptr && !sum.is_empty()) {
          sums.Store(sum, y);
          row = y;
        }
        StoreValues(values, p.top_k, value);
        if (lane == 0) self.memory->sums[bit] = row;
      });
      __syncwarp();
      if (!chunks.Wait()) return false;
      for_tokens([&](int32_t bit, char* y, uint32_t* values) {
        const uint32_t value = values != nullptr && lane < p.top_k ? values[lane] : 0;
        SumTerms sum(self.memory->terms);
        sum.BeginWith(self.memory->sums[bit]);
        finish(bit, sum, value, y, values);
      });
    }
    bool ok = true;
    if (!self.IsTeller(network.node, ok)) return ok;
    TellPartsDone(network, here, word);
    for (int32_t host = lane; host < shape.num_hosts; host += 32) {
      if (host == network.host) continue;
      GiveCredit(network, {host, way.lane, here.slot}, word);
    }
    __syncwarp();
    return true;
  };
  return ForEachWindow(network, ways, p.num_tokens, window_tokens, 1, add);
}

// The result of a failed combine: NaN in every row.
__device__ void Poison(const NetworkCombineParams& p) {
  const auto fill = [](void* memory, int64_t num_words) {
    for (int64_t i = threadIdx.x; i < num_words; i += blockDim.x) {
      static_cast<uint32_t*>(memory)[i] = ~0u;
    }
  };
  fill(p.y, int64_t{p.num_tokens} * p.row_bytes / 4);
  if (p.home != nullptr) fill(p.home, int64_t{p.num_tokens} * p.top_k);
}

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1)
    NetworkCombineKernel(const __grid_constant__ NetworkCombineParams p) {
  extern __shared__ __align__(16) char memory[];
  CombineMemory& shared = *reinterpret_cast<CombineMemory*>(memory);
  const GroupParams& node = p.network.node;
  const OpNumbers op = BeginNetworkOp(p.network);
  if (blockIdx.x == 0) Publish(node, op, {nullptr, nullptr, nullptr});
  if (threadIdx.x < kWarps) shared.done[threadIdx.x] = 0;
  const bool ok = WaitInputs(node, op, shared.inputs);  // and the numbers of chunks are zero
  const NetworkShape& shape = p.network.shape;
  // Ways to the own host are for parts of other ranks.
  const Ways ways(shape, shape.num_hosts - (shape.host_ranks > 1 ? 0 : 1), gridDim.x);
  const Teams teams(shape);
  const int32_t warp = threadIdx.x / 32, adders = teams.makers, homes = adders + teams.adders;
  const auto member_of = [&](int32_t first, int32_t num_warps) {
    SumMember self{TeamMember(warp - first, num_warps, shared.done + first, true)};
    self.memory = &shared.of_warp[warp];
    // The first warp of each team adds nothing.
    const int32_t tellers = 1 + (first > 0) + (first > adders && adders > 0);
    self.ring = shared.rings[plan::Min(max(warp - tellers, 0), kRings - 1)];
    return self;
  };
  if (!ok) {
    // The group has failed.
  } else if (warp < adders) {
    SumMember self = member_of(0, teams.makers);
    MakeParts<T, kWeighted>(p, ways, op.epoch, self);
  } else if (warp < homes) {
    SumMember self = member_of(adders, teams.adders);
    SendSums<T, kWeighted>(p, ways, op.epoch, self);
  } else {
    SumMember self = member_of(homes, teams.homes);
    AddAtHome<T, kWeighted>(p, ways, op.epoch, self);
  }
  EndOp(node, op.epoch, [&] {
    if (threadIdx.x == 0) TellHosts(p.network);
    Poison(p);
  });
}

// Calls `visit` with the kernel for these arguments.
template <typename Visitor>
cudaError_t VisitKernel(RowType type, bool is_weighted, Visitor&& visit) {
  return VisitRowType(type, [&](auto value) {
    using T = decltype(value);
    return visit(is_weighted ? NetworkCombineKernel<T, true> : NetworkCombineKernel<T, false>);
  });
}

}  // namespace

cudaError_t LoadNetworkCombine() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    for (const bool is_weighted : {false, true}) {
      const cudaError_t error = VisitKernel(type, is_weighted, [](auto* kernel) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(sizeof(CombineMemory)));
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

bool FitsNetworkCombine(const NetworkCombineParams& params) {
  return MostWindowTokens(params.network.shape, SumRow(params).bytes) > 0;
}

cudaError_t LaunchNetworkCombine(const NetworkCombineParams& params, cudaStream_t stream) {
  return VisitKernel(params.type, params.row_weights != nullptr, [&](auto* kernel) {
    kernel<<<params.num_blocks, kThreads, sizeof(CombineMemory), stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
