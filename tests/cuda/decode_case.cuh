// Shared by decode_test and decode_failures_test: the ops of latency mode on the ranks of
// kernels_case.cuh, with inboxes that just suffice.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/decode/combine.h"
#include "cuda/decode/dispatch.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"

namespace {

// What kernels_case.cuh does not know of the workload.
struct DecodeWorkload : Workload {
  bool has_weights, packed;
  int expert_capacity;
  bool fixed_places;
  int absent;  // a rank that takes no part, or -1

  explicit DecodeWorkload(const Options& options) : Workload(options) {
    has_weights = options.Int("weights", 1) != 0;
    packed = options.Int("packed", 0) != 0;
    expert_capacity = options.Int("expert_capacity", std::numeric_limits<int32_t>::max());
    fixed_places = options.Int("fixed_places", 0) != 0;
    absent = options.Int("absent", -1);
  }
  bool HasRowScales() const { return fp8 || (Casts() && !dense); }
  int PackedRows() const { return !packed ? 0 : fixed_places ? alignment : C; }
  size_t RowBytes() const { return size_t(C) * H * (HasRowScales() ? 1 : width); }
};

// Changes routes: none at all for some ranks, none from or to one that is absent, or all to the
// first experts.
inline void ChangeRoutes(const DecodeWorkload& w, const Options& options,
                         std::vector<Rank>& ranks) {
  const int masked = options.Int("masked", 0);  // of every so many ranks one has no tokens
  const std::string routes = options.Text("routes", "all");
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (int32_t& id : ranks[r].topk_idx.host) {
      if (masked != 0 && r % masked == 0) id = -1;
      if (w.absent >= 0 && (int(r) == w.absent || id / w.L == w.absent)) id = -1;
      if (routes == "first" && id >= 0) id %= w.L;
      if (routes == "few" && id >= 0) id = id % 2 == 0 ? 0 : id;
    }
    CHECK_CUDA(cudaSetDevice(ranks[r].device));
    ranks[r].topk_idx.ToDevice();
  }
}

inline ops::PlanArgs DecodePlanArgs(const DecodeWorkload& w, const Rank& k, bool on_host) {
  ops::PlanArgs args = on_host ? PlanArgsOf(w, k, OnHost()) : PlanArgsOf(w, k, OnDevice());
  args.shape.expert_capacity = w.expert_capacity;
  args.shape.masked = w.fixed_places;
  return args;
}

inline ops::DispatchArgs DecodeDispatchArgs(const DecodeWorkload& w, const Rank& k, bool on_host) {
  ops::DispatchArgs args =
      on_host ? DispatchArgsOf(w, k, OnHost()) : DispatchArgsOf(w, k, OnDevice());
  if (w.HasRowScales()) {
    args.row_scales = const_cast<float*>(on_host ? k.row_scales.host.data() : k.row_scales.device);
  }
  if (w.packed && !on_host) {
    args.packed_rows = w.PackedRows();
    args.row_scales = reinterpret_cast<float*>(k.packed_scales.device);
  }
  if (!w.has_weights) args.weights = args.row_weights = nullptr;
  return args;
}

inline ops::CombineArgs DecodeCombineArgs(const DecodeWorkload& w, const Rank& k, bool on_host) {
  ops::CombineArgs args = on_host ? CombineArgsOf(w, k, OnHost()) : CombineArgsOf(w, k, OnDevice());
  args.values = args.home = nullptr;
  if (w.weighted) {
    args.row_weights = on_host ? k.d_weights.host.data() : k.d_weights.device;
  }
  return args;
}

// What a launch of an op has in either case. Start calls have a block more, and done calls another
// tag: peers know the op by the tag of its start call.
template <typename Params>
void SetCalls(const DecodeWorkload& w, const Rank& k, const cuda::DecodeInboxes& inboxes,
              cuda::Calls calls, uint32_t kind, Params& params) {
  params.inboxes = inboxes;
  params.calls = calls;
  params.kind = kind;
  params.num_blocks = BlocksOf(w, k) + (calls == cuda::Calls::kStart);
  if (calls == cuda::Calls::kDone) params.group.tag += 8;
  if (w.absent < 0) return;
  // As transport/groups.cc says it. An access to memory of an absent rank ends the program.
  const uint32_t own = 1u << k.group.rank, absent = 1u << w.absent;
  params.group.absent = absent == own ? ~own : absent;
  for (int r = 0; r < w.R; ++r) {
    if (!cuda::IsAbsent(params.group, r)) continue;
    params.group.peers[r] = nullptr;
    params.inboxes.of[r] = nullptr;
  }
}

inline cuda::DecodeDispatchParams DecodeDispatchOf(const DecodeWorkload& w, const Rank& k,
                                                   const cuda::DecodeInboxes& inboxes,
                                                   cuda::Calls calls = cuda::Calls::kOne) {
  cuda::DecodeDispatchParams params =
      cuda::ParamsOf(DecodePlanArgs(w, k, false), DecodeDispatchArgs(w, k, false));
  params.group = GroupOf(k, cuda::OpKind::kDispatch);
  SetCalls(w, k, inboxes, calls, 1, params);
  if (calls == cuda::Calls::kStart) {  // which has no results
    const int32_t* const topk_idx = params.plan.topk_idx;
    params.plan = {};
    params.plan.topk_idx = topk_idx;
    params.rows = nullptr;
    params.row_scales = params.row_weights = nullptr;
    params.packed_scales = nullptr;
  }
  return params;
}

inline cuda::DecodeCombineParams DecodeCombineOf(const DecodeWorkload& w, const Rank& k,
                                                 const cuda::DecodeInboxes& inboxes,
                                                 cuda::Calls calls = cuda::Calls::kOne) {
  cuda::DecodeCombineParams params = cuda::ParamsOfDecode(DecodeCombineArgs(w, k, false));
  params.group = GroupOf(k, cuda::OpKind::kCombine);
  ++params.group.tag;
  SetCalls(w, k, inboxes, calls, 2, params);
  if (calls == cuda::Calls::kStart) params.y = nullptr;
  return params;
}

// The inboxes of all ranks, zeros; the kernels are loaded.
inline cuda::DecodeInboxes MakeInboxes(const DecodeWorkload& w, const std::vector<Rank>& ranks) {
  cuda::DecodeInboxes inboxes{};
  inboxes.half_words = std::max(DecodeDispatchOf(w, ranks[0], inboxes).slots.NumWords(),
                                DecodeCombineOf(w, ranks[0], inboxes).slots.NumWords());
  const size_t bytes =
      sizeof(cuda::DecodeInbox) + 2 * inboxes.half_words * sizeof(cuda::StampedWord);
  for (const Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    void* memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, bytes));
    FillDevice(memory, 0, bytes);
    inboxes.of[k.group.rank] = static_cast<cuda::DecodeInbox*>(memory);
    CHECK_CUDA(cuda::LoadDecodeDispatch());
    CHECK_CUDA(cuda::LoadDecodeCombine());
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  return inboxes;
}

// Memory for the rows that a combine takes, which are random.
inline void FillCombine(const DecodeWorkload& w, Rank& k, std::mt19937& generator) {
  CHECK_CUDA(cudaSetDevice(k.device));
  for (size_t i = 0; i < k.d_rows.host.size() / w.width; ++i) {
    const uint32_t bits = generator();
    if (w.width == 4) {
      const float value = float(bits) / 4e9f - 0.5f;
      std::memcpy(&k.d_rows.host[4 * i], &value, 4);
    } else {
      const uint16_t value = (w.dtype == "bf16" ? 0x3F00 : 0x3800) | (bits & 0x80FF);
      std::memcpy(&k.d_rows.host[2 * i], &value, 2);
    }
  }
  k.d_rows.ToDevice();
  for (float& weight : k.d_weights.host) weight = float(generator()) / 4e9f;
  k.d_weights.ToDevice();
  if (w.HasRowScales() && !w.fp8) k.row_scales.Resize(size_t(w.C) * w.H / 128);
  if (w.packed) {
    const ops::PackedScales packed = ops::PackedScalesOf(DecodeDispatchArgs(w, k, false));
    k.packed_scales.Resize(packed.At(w.C / packed.rows, 0, 0));
  }
}

// Packs the scales that the host has.
inline void PackScales(const DecodeWorkload& w, Rank& k) {
  const ops::PackedScales packed = ops::PackedScalesOf(DecodeDispatchArgs(w, k, false));
  const int num_blocks = w.H / ops::kScaleBlock;
  for (int row = 0; row < w.C; ++row) {
    for (int block = 0; block < num_blocks; ++block) {
      uint32_t bits;
      std::memcpy(&bits, &k.row_scales.host[size_t(row) * num_blocks + block], 4);
      const int64_t at = packed.At(row / packed.rows, block / 4, row % packed.rows);
      k.packed_scales.host[at] |= (bits >> 23 & 0xff) << 8 * (block % 4);
    }
  }
}

// Calls `visit` with the name and the buffer of each leaf of a handle.
template <typename OfRank, typename Visit>
void VisitHandle(const DecodeWorkload& w, OfRank& k, Visit&& visit) {
  visit("topk", k.topk);
  visit("dest_row", k.dest_row);
  visit("recv_rows", k.recv_rows);
  visit("recv_src", k.recv_src);
  if (!w.by_expert) visit("expert_idx", k.expert_idx);
  visit("group_sizes", k.group_sizes);
  visit("counts", k.counts);
  visit("demand", k.demand);
  visit("num_dropped", k.num_dropped);
  visit("num_invalid", k.num_invalid);
}

}  // namespace
