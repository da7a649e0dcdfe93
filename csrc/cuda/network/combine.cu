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

constexpr int kWarps = 16;  // with 32, of half as many registers each, it is slower
constexpr int kThreads = kWarps * 32;
constexpr int kMaxHomes = 9;  // warps

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
  PeerInputs inputs;  // for WaitInputs, which gives nothing here
  Term terms[kWarps][kMaxTerms];
  Term hosts[kMaxHomes][kMaxHosts];
  HostSum sums[kMaxHomes][kMaxWindow];
  int32_t starts[kWarps][kMaxWindow];
  uint32_t done[kWarps];
};

// Makers: this rank's sums for the other ranks of its host that the block's ways lead to.
template <typename T, bool kWeighted>
__device__ bool MakeParts(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          SumMember& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  EntryCursors cursors;
  const auto make = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t index = (network.node.rank + turn) % shape.host_ranks;
    if (index == network.node.rank) return true;  // adders and homes read those rows
    const int32_t first = window * window_tokens;
    const EntryRange entries = cursors.Find(p.routes, way.host * shape.host_ranks + index, turn,
                                            first, first + window_tokens);
    const WindowRows rows(p.routes, entries, first, self.starts);
    const SlotIndex at = way.Slot(n);
    bool ok = true;
    if (lane == 0 && kMutation != kWithoutPartDone) {
      const uint64_t before = WordBefore(network, epoch, n, window, own.part_sent(index, at));
      ok = WaitWord(network, own.part_done(index, at), before, WordKind::kPartDone, index);
    }
    if (!__shfl_sync(~0u, ok, 0)) return false;
    TestDelay(network.node.rank, epoch, 3, self.warp);
    char* const part = own.part(index, at);
    const int32_t num_tokens = __popc(rows.tokens()), nth_bit = PlaceOfNthBit(rows.tokens());
    for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_workers) {
      const int32_t bit = __shfl_sync(~0u, nth_bit, i);
      char* const sum = format.Of(part, rows.tokens(), bit);
      const EntryRange of_token = rows.Of(bit);
      TakeRows<kWeighted>(p, self, of_token, format.ValuesOf(sum));
      AddTerms<T, kWeighted>(self.terms, of_token.end - of_token.begin, 0, p.row_bytes, sum);
      __syncwarp();
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
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  EntryCursors cursors;
  const auto send = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    if (way.host == network.host) return true;  // homes read those parts
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex at = way.Slot(n);
    const int32_t first = window * window_tokens;
    const int32_t counterpart = way.host * network.shape.host_ranks + network.node.rank;
    const WindowRows rows(p.routes,
                          cursors.Find(p.routes, counterpart, turn, first, first + window_tokens),
                          first, self.starts);
    const ChunkSender sender(network, way, epoch);
    uint32_t tokens_of_lane;
    if (!WaitParts(network, at, word, rows.tokens(), tokens_of_lane)) return false;
    if (!sender.WaitSlot(n, window)) return false;
    TestDelay(network.node.rank, epoch, 4, self.warp);
    const uint32_t tokens = __reduce_or_sync(~0u, tokens_of_lane);
    char* const chunk = sender.Memory(n);
    const int32_t num_tokens = __popc(tokens), nth_bit = PlaceOfNthBit(tokens);
    const TokenSum<T, kWeighted, false> token_sum(p, format, self, rows, at, tokens_of_lane);
    for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_workers) {
      const int32_t bit = __shfl_sync(~0u, nth_bit, i);
      char* const sum = format.Of(chunk, tokens, bit);
      token_sum.AddHere(bit, sum, format.ValuesOf(sum));
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

// Homes: this rank's tokens. The blocks that serve a lane share its windows.
template <typename T, bool kWeighted>
__device__ bool AddAtHome(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          SumMember& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  const int32_t num_shares = ways.count / ways.num_lanes;
  EntryCursors cursors;
  const auto add = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t number = blockIdx.x + turn * gridDim.x;
    if (n % num_shares != number / ways.num_lanes) return true;  // another block's
    const int32_t first = window * window_tokens;
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex here{network.host, way.lane, n % kChunkSlots};
    const int32_t this_rank = network.host * shape.host_ranks + network.node.rank;
    const WindowRows rows(p.routes,
                          cursors.Find(p.routes, this_rank, turn, first, first + window_tokens),
                          first, self.starts);
    uint32_t tokens_of_lane;
    if (!WaitParts(network, here, word, rows.tokens(), tokens_of_lane)) return false;
    TestDelay(network.node.rank, epoch, 5, self.warp);
    const int32_t count = plan::Min(window_tokens, p.num_tokens - first);
    const TokenSum<T, kWeighted, true> token_sum(p, format, self, rows, here, tokens_of_lane);
    const auto values_of = [&](int64_t token) {
      return p.values != nullptr ? reinterpret_cast<uint32_t*>(p.home) + token * p.top_k : nullptr;
    };
    // Each lane waits for some of the other hosts.
    static_assert(kMaxHosts == 64);
    uint32_t sent[2] = {};
    bool ok = true;
    const auto wait_hosts = [&] {
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const SlotIndex at{lane + 32 * i, way.lane, here.slot};
        if (at.host >= shape.num_hosts || at.host == network.host) continue;
        if (kMutation != kWithoutHome) {
          ok = ok && WaitWord(network, own.arrived(at), word, WordKind::kChunkArrived,
                              network.Peer(at.host, network.node.rank));
          if (ok) Accept(network, at, word);
        }
        if (ok) sent[i] = __ldcg(reinterpret_cast<const uint32_t*>(own.in(at)));
      }
      return __all_sync(~0u, ok);
    };
    // Where there is much to add here, that comes first, while chunks of others are under way.
    const bool adds_first = p.layout == Layout::kExpert;
    if (!adds_first && !wait_hosts()) return false;
    const int32_t first_bit = self.TakeShare(count);
    for (int32_t bit = first_bit; bit < count; bit += self.num_workers) {
      const int64_t token = first + bit;
      const HostSum sum =
          token_sum.AddHere(bit, static_cast<char*>(p.y) + token * p.row_bytes, values_of(token));
      if (lane == 0) self.sums[bit] = sum;
    }
    __syncwarp();
    if (adds_first && !wait_hosts()) return false;
    for (int32_t bit = first_bit; bit < count; bit += self.num_workers) {
      const int64_t token = first + bit;
      token_sum.AddHosts(self.sums[bit], static_cast<char*>(p.y) + token * p.row_bytes,
                         values_of(token), [&](int32_t host) -> const char* {
                           const uint32_t of_host = host < 32 ? sent[0] : sent[1];
                           if ((of_host >> bit & 1) == 0) return nullptr;
                           return format.Of(own.in({host, way.lane, here.slot}), of_host, bit);
                         });
    }
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
__global__ void __launch_bounds__(kThreads)
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
    self.terms = shared.terms[warp];
    self.hosts = shared.hosts[self.warp % kMaxHomes];
    self.starts = shared.starts[warp];
    self.sums = shared.sums[self.warp % kMaxHomes];
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
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, kernel);
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

bool FitsNetworkCombine(const NetworkCombineParams& params) {
  return WindowTokens(params.network.shape, SumRow(params).bytes) > 0;
}

cudaError_t LaunchNetworkCombine(const NetworkCombineParams& params, cudaStream_t stream) {
  return VisitKernel(params.type, params.row_weights != nullptr, [&](auto* kernel) {
    kernel<<<params.num_blocks, kThreads, sizeof(CombineMemory), stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
