// Combine between hosts: the rows of a token are added on each rank, then on each host, and each
// host sends one row home.
//
// In a block, *makers* add this rank's rows of each token into parts, one for each way and each
// forwarder; *adders* add, as the forwarder, the parts of all ranks of the host, and send the sums
// home; *homes* add what came of all hosts, their own too, whose parts they read themselves. The
// warps of such a team take the tokens of a chunk in turn; the last one to finish tells.

#include "cuda/core/sync.cuh"
#include "cuda/network/chunks.cuh"
#include "cuda/network/combine.h"
#include "cuda/network/entries.cuh"
#include "cuda/network/team.cuh"
#include "cuda/rows/adder.cuh"

namespace jax_ep::cuda {
namespace {

using plan::Layout;

constexpr int kTeamWarps = 5;  // more would leave AddTerms too few registers
constexpr int kTeams = 3;
constexpr int kThreads = kTeams * kTeamWarps * 32;

// A row in a chunk or a part, followed by the values that go home.
struct SumRow {
  int32_t values_at, bytes;
  __host__ __device__ explicit SumRow(const NetworkCombineParams& p) {
    values_at = p.row_bytes;
    bytes = values_at + (p.values != nullptr ? plan::RoundUp(p.top_k * 4, 16) : 0);
  }
  // The row of a token, the `bit`-th of the window, of those in `tokens`.
  __device__ char* Of(char* chunk, uint32_t tokens, int32_t bit) const {
    return chunk + sizeof(ChunkHeader) + __popc(tokens & ((1u << bit) - 1)) * bytes;
  }
};

// Shared memory of a block.
struct CombineMemory {
  PeerInputs inputs;  // for WaitInputs, which gives nothing here
  Term terms[kTeams * kTeamWarps][kMaxTerms];
  Term hosts[kTeamWarps][kMaxHosts];
  uint32_t done[kTeams][kTeamWarps];
};

// One warp of a team.
struct Member : TeamMember {
  Term* terms;  // [kMaxTerms]
  Term* hosts;  // [kMaxHosts], of a home
};

// The sum of `count` rows of a token, of which each lane has one, and their values.
template <typename T, bool kWeighted>
__device__ void MakeSum(const NetworkCombineParams& p, const SumRow& format, const Member& self,
                        int32_t row, int32_t count, char* sum) {
  const int32_t lane = threadIdx.x % 32;
  const bool has_row = lane < count;
  if (has_row) {
    const char* from = static_cast<const char*>(p.rows) + int64_t{row} * p.row_bytes;
    self.terms[lane] = {from, kWeighted ? p.row_weights[row] : 1.0f};
  }
  __syncwarp();
  AddTerms<T, kWeighted>(self.terms, count, 0, p.row_bytes, sum);
  if (p.values != nullptr) {
    float* const values = reinterpret_cast<float*>(sum + format.values_at);
    if (p.layout == Layout::kExpert) {
      for (int32_t k = lane; k < p.top_k; k += 32) values[k] = 0.0f;
      __syncwarp();
      if (has_row) {
        const plan::Source source =
            plan::DecodeSource(p.layout, p.recv_src[row], p.num_tokens, p.top_k);
        values[source.k] = p.values[row];
      }
    } else {
      const int64_t of_row = int64_t{__shfl_sync(~0u, row, 0)} * p.top_k;
      for (int32_t k = lane; k < p.top_k; k += 32) {
        values[k] = p.expert_idx[of_row + k] >= 0 ? p.values[of_row + k] : 0.0f;
      }
    }
  }
  __syncwarp();
}

// Makers: this rank's sums for the ranks that the block's ways lead to.
template <typename T, bool kWeighted>
__device__ bool MakeParts(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          Member& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  const int32_t* const tokens = p.routes.recv_token;
  const auto make = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t index = (network.node.rank + turn) % shape.host_ranks;
    const int32_t rank = way.host * shape.host_ranks + index;
    const int32_t first = window * window_tokens;
    const SlotIndex at = way.Slot(n);
    bool ok = true;
    if (lane == 0 && kMutation != kWithoutPartDone) {
      const uint64_t before = WordBefore(network, epoch, n, window, own.part_sent(index, at));
      ok = WaitWord(network, own.part_done(index, at), before, WordKind::kPartDone, index);
    }
    if (!__shfl_sync(~0u, ok, 0)) return false;
    TestDelay(network.node.rank, epoch, 3, self.warp);
    char* const part = own.part(index, at);
    EntryRange entries;
    entries.end = p.routes.recv_start[rank + 1];
    entries.begin = FirstEntry(tokens, p.routes.recv_start[rank], entries.end, first);
    entries.end = FirstEntry(tokens, entries.begin, entries.end, first + window_tokens);
    uint32_t made = 0;
    while (entries.begin < entries.end) {
      const EntryBatch batch(p.routes, entries);
      const int32_t num_tokens = __popc(batch.heads), head_of_nth = PlaceOfNthBit(batch.heads);
      for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_warps) {
        const int32_t head = __shfl_sync(~0u, head_of_nth, i);
        const int32_t next = __shfl_sync(~0u, head_of_nth, plan::Min(i + 1, 31));
        const int32_t count = (i + 1 < num_tokens ? next : batch.count) - head;
        const int32_t row = __shfl_sync(~0u, batch.row, plan::Min(head + lane, 31));
        char* const sum = format.Of(part, ~0u, __popc(made) + i);
        MakeSum<T, kWeighted>(p, format, self, row, count, sum);
      }
      const bool is_head = (batch.heads >> lane & 1) != 0;
      made |= __reduce_or_sync(~0u, is_head ? 1u << (batch.token - first) : 0u);
      entries.begin += batch.count;
    }
    if (lane == 0 && self.warp == 0) *reinterpret_cast<ChunkHeader*>(part) = {made};
    if (self.IsTeller(network.node, ok) && lane == 0) {
      const uint64_t word = ChunkWord(epoch, network.node.tag, window);
      ptx::StoreRelaxedSystem(own.part_sent(index, at), word);
      ptx::StoreReleaseSystem(network.Of(index).part_ready(network.node.rank, at), word);
    }
    return ok;
  };
  return ForEachWindow(network, ways, p.num_tokens, window_tokens, shape.host_ranks, make);
}

// The parts of all ranks of this host for this rank, once they have arrived. Lane d has the tokens
// of rank d.
__device__ bool WaitParts(const NetworkParams& network, SlotIndex at, uint64_t word,
                          uint32_t& tokens) {
  const int32_t lane = threadIdx.x % 32;
  bool ok = true;
  tokens = 0;
  if (lane < network.shape.host_ranks) {
    if (kMutation != kWithoutPart) {
      ok = WaitWord(network, network.Own().part_ready(lane, at), word, WordKind::kPart, lane);
    }
    if (ok) {
      const char* part = network.Of(lane).part(network.node.rank, at);
      tokens = __ldcg(reinterpret_cast<const uint32_t*>(part));
    }
  }
  return __all_sync(~0u, ok);
}

// Tells the ranks of this host that their parts have been read. By the lanes of one warp.
__device__ void TellPartsDone(const NetworkParams& network, SlotIndex at, uint64_t word) {
  const int32_t lane = threadIdx.x % 32;
  if (lane >= network.shape.host_ranks) return;
  ptx::StoreReleaseSystem(network.Of(lane).part_done(network.node.rank, at), word);
}

// The sum of the parts that have a token, and its values, unchanged from the part that has them.
template <typename T>
__device__ void AddParts(const NetworkCombineParams& p, const SumRow& format, const Member& self,
                         SlotIndex at, uint32_t tokens_of_lane, int32_t bit, char* sum,
                         uint32_t* values) {
  const NetworkParams& network = p.network;
  const int32_t lane = threadIdx.x % 32;
  const uint32_t have = __ballot_sync(~0u, tokens_of_lane >> bit & 1);
  if ((have >> lane & 1) != 0) {
    char* const part = network.Of(lane).part(network.node.rank, at);
    self.terms[__popc(have & ((1u << lane) - 1))] = {format.Of(part, tokens_of_lane, bit), 1.0f};
  }
  __syncwarp();
  AddTerms<T, false>(self.terms, __popc(have), 0, p.row_bytes, sum);
  for (int32_t k = lane; values != nullptr && k < p.top_k; k += 32) {
    uint32_t bits = 0;
    for (int32_t d = 0; d < __popc(have); ++d) {
      bits |= __ldcg(reinterpret_cast<const uint32_t*>(self.terms[d].row + format.values_at) + k);
    }
    values[k] = bits;
  }
  __syncwarp();
}

// Adders: the sums of this host for this rank's counterparts.
template <typename T>
__device__ bool SendSums(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                         Member& self) {
  const NetworkParams& network = p.network;
  const SumRow format(p);
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  const auto send = [&](const Way& way, int32_t, int32_t n, int32_t window) {
    if (way.host == network.host) return true;  // homes read those parts
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex at = way.Slot(n);
    const ChunkSender sender(network, way, epoch);
    uint32_t tokens_of_lane;
    if (!WaitParts(network, at, word, tokens_of_lane) || !sender.WaitSlot(n, window)) return false;
    TestDelay(network.node.rank, epoch, 4, self.warp);
    const uint32_t tokens = __reduce_or_sync(~0u, tokens_of_lane);
    char* const chunk = sender.Memory(n);
    const int32_t num_tokens = __popc(tokens), nth_bit = PlaceOfNthBit(tokens);
    for (int32_t i = self.TakeShare(num_tokens); i < num_tokens; i += self.num_warps) {
      const int32_t bit = __shfl_sync(~0u, nth_bit, i);
      char* const sum = format.Of(chunk, tokens, bit);
      uint32_t* values = reinterpret_cast<uint32_t*>(sum + format.values_at);
      if (p.values == nullptr) values = nullptr;
      AddParts<T>(p, format, self, at, tokens_of_lane, bit, sum, values);
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
template <typename T>
__device__ bool AddAtHome(const NetworkCombineParams& p, const Ways& ways, uint64_t epoch,
                          Member& self) {
  const NetworkParams& network = p.network;
  const NetworkShape& shape = network.shape;
  const NetworkMemory own = network.Own();
  const SumRow format(p);
  const int32_t window_tokens = WindowTokens(network.shape, format.bytes), lane = threadIdx.x % 32;
  const auto add = [&](const Way& way, int32_t turn, int32_t n, int32_t window) {
    const int32_t number = blockIdx.x + turn * gridDim.x;
    if (n % shape.num_hosts != number / ways.num_lanes) return true;  // another block's
    const int32_t first = window * window_tokens;
    const uint64_t word = ChunkWord(epoch, network.node.tag, window);
    const SlotIndex here{network.host, way.lane, n % kChunkSlots};
    // Each lane waits for some of the other hosts.
    uint32_t sent[kMaxHosts / 32] = {};
    bool ok = true;
#pragma unroll
    for (int32_t i = 0; i < kMaxHosts / 32; ++i) {
      const SlotIndex at{lane + 32 * i, way.lane, here.slot};
      if (at.host >= shape.num_hosts || at.host == network.host) continue;
      if (kMutation != kWithoutHome) {
        ok = ok && WaitWord(network, own.arrived(at), word, WordKind::kChunkArrived,
                            network.Peer(at.host, network.node.rank));
        if (ok) net::Accept(own.arrived(at), word);
      }
      if (ok) sent[i] = __ldcg(reinterpret_cast<const uint32_t*>(own.in(at)));
    }
    uint32_t tokens_of_lane;
    if (!__all_sync(~0u, ok) || !WaitParts(network, here, word, tokens_of_lane)) return false;
    TestDelay(network.node.rank, epoch, 5, self.warp);
    const uint32_t tokens_here = __reduce_or_sync(~0u, tokens_of_lane);
    const int32_t count = plan::Min(window_tokens, p.num_tokens - first);
    for (int32_t bit = self.TakeShare(count); bit < count; bit += self.num_warps) {
      const int64_t token = first + bit;
      char* const y = static_cast<char*>(p.y) + token * p.row_bytes;
      uint32_t* values = nullptr;
      if (p.values != nullptr) {
        values = reinterpret_cast<uint32_t*>(p.home) + token * p.top_k;
      }
      // The sum of this host comes first, into y, from where it is added again in its turn; but
      // where one rank has a part alone, that is the sum.
      const uint32_t parts = __ballot_sync(~0u, tokens_of_lane >> bit & 1);
      char* sum_here = y;
      if (__popc(parts) == 1) {
        const int32_t d = __ffs(static_cast<int>(parts)) - 1;
        const uint32_t tokens_of_part = __shfl_sync(~0u, tokens_of_lane, d);
        sum_here = format.Of(network.Of(d).part(network.node.rank, here), tokens_of_part, bit);
      } else {
        AddParts<T>(p, format, self, here, tokens_of_lane, bit, y, values);
      }
      int32_t num_hosts = 0;
      for (int32_t i = 0; i < (shape.num_hosts + 31) / 32; ++i) {
        const int32_t host = lane + 32 * i;
        const bool is_here = host == network.host;
        const uint32_t of_host = is_here ? tokens_here : sent[i];
        const bool has = host < shape.num_hosts && (of_host >> bit & 1) != 0;
        const uint32_t have = __ballot_sync(~0u, has);
        if (has) {
          const SlotIndex at{host, way.lane, here.slot};
          char* const row = is_here ? sum_here : format.Of(own.in(at), of_host, bit);
          self.hosts[num_hosts + __popc(have & ((1u << lane) - 1))] = {row, 1.0f};
        }
        num_hosts += __popc(have);
      }
      __syncwarp();
      AddTerms<T, false>(self.hosts, num_hosts, 0, p.row_bytes, y);
      for (int32_t k = lane; values != nullptr && k < p.top_k; k += 32) {
        uint32_t bits = sum_here == y ? values[k] : 0;
        for (int32_t h = 0; h < num_hosts; ++h) {
          if (self.hosts[h].row == y) continue;
          bits |=
              __ldcg(reinterpret_cast<const uint32_t*>(self.hosts[h].row + format.values_at) + k);
        }
        values[k] = bits;
      }
      __syncwarp();
    }
    if (!self.IsTeller(network.node, ok)) return ok;
    TellPartsDone(network, here, word);
    for (int32_t host = lane; host < shape.num_hosts; host += 32) {
      if (host == network.host) continue;
      const SlotIndex there{network.host, way.lane, here.slot};
      net::Signal(own.credit(there), word, network.counterparts[host].pe);
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
  extern __shared__ __align__(128) char memory[];
  CombineMemory& shared = *reinterpret_cast<CombineMemory*>(memory);
  const GroupParams& node = p.network.node;
  const OpNumbers op = BeginNetworkOp(p.network);
  if (blockIdx.x == 0) Publish(node, op, {nullptr, nullptr, nullptr});
  if (threadIdx.x < kTeams * kTeamWarps) (&shared.done[0][0])[threadIdx.x] = 0;
  const bool ok = WaitInputs(node, op, shared.inputs);  // and the numbers of chunks are zero
  const int32_t warp = threadIdx.x / 32, team = warp / kTeamWarps;
  Member self{TeamMember(warp % kTeamWarps, kTeamWarps, shared.done[team])};
  self.terms = shared.terms[warp];
  self.hosts = shared.hosts[self.warp];
  const Ways ways(p.network.shape, p.network.shape.num_hosts, gridDim.x);
  if (ok && team == 0) MakeParts<T, kWeighted>(p, ways, op.epoch, self);
  if (ok && team == 1) SendSums<T>(p, ways, op.epoch, self);
  if (ok && team == 2) AddAtHome<T>(p, ways, op.epoch, self);
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
