// The ops of a rank of kernels_case.cuh: their arguments, for the CPU backend and for the kernels.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/node/cast.h"
#include "cuda/node/combine.h"
#include "cuda/node/combine_vjp.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "kernels_case.cuh"
#include "ops/combine.h"
#include "ops/combine_vjp.h"
#include "ops/dispatch.h"
#include "ops/plan.h"

namespace {

// The n-th launch of an op reads the n-th set of its inputs.

inline cuda::GroupParams GroupOf(const Rank& k, cuda::OpKind op) {
  cuda::GroupParams group = k.group;
  group.op = op;
  return group;
}

inline int BlocksOf(const Workload& w, const Rank& k) {
  return w.blocks + k.group.rank * w.more_blocks;
}

// Where the arguments of an op lie: on the host, for the CPU backend, or on the GPU.
struct OnHost {
  template <typename T>
  T* operator()(const Buffer<T>& buffer) const {
    return const_cast<T*>(buffer.host.data());
  }
  template <typename T>
  T* Input(const Buffer<T>& buffer) const {
    return (*this)(buffer);
  }
};
struct OnDevice {
  int launch = 0;
  template <typename T>
  T* operator()(const Buffer<T>& buffer) const {
    return buffer.device;
  }
  template <typename T>
  T* Input(const Buffer<T>& buffer) const {
    return buffer.Of(launch);
  }
};

inline ops::Geometry GeometryOf(const Workload& w, ops::DType dtype) {
  return {w.R, w.E, w.T, w.K, w.C, w.H, w.layout, dtype};
}

template <typename Place>
ops::Handle HandleOf(const Rank& k, Place at) {
  return {at(k.topk), at(k.dest_row), at(k.recv_rows), at(k.recv_src), at(k.expert_idx)};
}

template <typename Place>
ops::PlanArgs PlanArgsOf(const Workload& w, const Rank& k, Place at) {
  constexpr int32_t kUnbounded = std::numeric_limits<int32_t>::max();
  return {{w.R, w.T, w.K, w.E, w.C, w.alignment, kUnbounded, w.layout},
          {at(k.topk_idx), at(k.topk), at(k.dest_row), at(k.recv_rows), at(k.recv_src),
           at(k.expert_idx), at(k.group_sizes), at(k.counts), at(k.demand), at(k.num_dropped),
           at(k.num_invalid)}};
}

template <typename Place>
ops::DispatchArgs DispatchArgsOf(const Workload& w, const Rank& k, Place at) {
  return {GeometryOf(w, w.fp8 ? ops::DType::kFloat8E4M3FN : w.row_dtype),
          w.quantization,
          w.dense,
          w.unused_rows,
          at.Input(k.x),
          w.fp8 ? at(k.scales) : nullptr,
          at(k.weights),
          HandleOf(k, at),
          at(k.rows),
          w.fp8 ? at(k.row_scales) : nullptr,
          at(k.row_weights)};
}

template <typename Place>
ops::CombineArgs CombineArgsOf(const Workload& w, const Rank& k, Place at) {
  return {GeometryOf(w, w.row_dtype),
          at.Input(k.d_rows),
          w.weighted ? at(k.row_weights) : nullptr,
          at(w.by_expert ? k.d_weights : k.row_weights),
          HandleOf(k, at),
          at(k.y),
          at(k.home)};
}

template <typename Place>
ops::CombineVjpArgs CombineVjpArgsOf(const Workload& w, const Rank& k, Place at) {
  return {GeometryOf(w, w.row_dtype), w.unused_rows,   at.Input(k.dy), at(k.rows),
          at(k.row_weights),          HandleOf(k, at), at(k.d_rows),   at(k.d_weights)};
}

inline cuda::PlanParams PlanParamsOf(const Workload& w, const Rank& k) {
  cuda::PlanParams params = cuda::ParamsOf(PlanArgsOf(w, k, OnDevice()));
  params.group = GroupOf(k, cuda::OpKind::kPlan);
  params.shared_topk = params.topk;
  params.scratch = k.scratch.device;
  return params;
}

// An op that moves rows.
template <typename Args>
auto ParamsOf(const Workload& w, const Rank& k, cuda::OpKind op, const Args& args) {
  auto params = cuda::ParamsOf(args);
  params.group = GroupOf(k, op);
  params.num_blocks = BlocksOf(w, k);
  return params;
}

inline cuda::DispatchParams DispatchParamsOf(const Workload& w, const Rank& k, int launch) {
  auto params = ParamsOf(w, k, cuda::OpKind::kDispatch, DispatchArgsOf(w, k, OnDevice{launch}));
  if (w.Casts()) {
    params.x = k.cast_values.device;
    params.scales = k.cast_scales.device;
    params.scales_per_row = w.H / ops::kScaleBlock;
    params.row_bytes = w.H;
    params.behind_cast = params.dense = true;
    params.cast_chunk = cuda::TokensOfChunk(w.T);
    params.dense_type = w.type;
  }
  return params;
}

// The cast of rows of w.type beside the dispatch that is launched next: of `dense`, into x and
// scales, or in a workload that casts, of x.
inline void LaunchCastOf(const Workload& w, const Rank& k, int launch, const void* dense,
                         bool behind_plan) {
  cuda::QuantizeParams rows{w.type, w.quantization == ops::Quantization::kFp8Ue8m0, w.T, w.H};
  rows.x = w.Casts() ? k.x.Of(launch) : dense;
  rows.values = w.Casts() ? k.cast_values.device : k.x.Of(launch);
  rows.scales = w.Casts() ? k.cast_scales.device : k.scales.device;
  CHECK_CUDA(cuda::LaunchCast(
      {GroupOf(k, cuda::OpKind::kDispatch), rows, w.cast_blocks, behind_plan}, k.stream));
}

// A dispatch along the rank's plan.
inline void LaunchDispatchOf(const Workload& w, const Rank& k, int launch) {
  if (w.Casts()) LaunchCastOf(w, k, launch, nullptr, /*behind_plan=*/false);
  CHECK_CUDA(cuda::LaunchDispatch(DispatchParamsOf(w, k, launch), k.stream));
}

// A plan, and a dispatch that is launched behind it. With `dense`, or in a workload that casts, a
// cast is between the two.
inline void LaunchPlanAndDispatch(const Workload& w, const Rank& k, int launch, const void* dense) {
  cuda::PlanParams plan = PlanParamsOf(w, k);
  plan.is_followed = true;
  CHECK_CUDA(cuda::LaunchPlan(plan, cuda::PlanKernel::kPush, k.stream));
  const bool casts = w.Casts() || dense != nullptr;
  if (casts) LaunchCastOf(w, k, launch, dense, /*behind_plan=*/true);
  cuda::DispatchParams dispatch = DispatchParamsOf(w, k, launch);
  dispatch.behind_plan = true;
  dispatch.plan_tag = plan.group.tag;
  dispatch.behind_cast = casts;
  dispatch.cast_chunk = cuda::TokensOfChunk(w.T);
  CHECK_CUDA(cuda::LaunchDispatch(dispatch, k.stream));
}

inline cuda::CombineParams CombineParamsOf(const Workload& w, const Rank& k, int launch) {
  return ParamsOf(w, k, cuda::OpKind::kCombine, CombineArgsOf(w, k, OnDevice{launch}));
}

inline cuda::CombineVjpParams CombineVjpParamsOf(const Workload& w, const Rank& k, int launch) {
  return ParamsOf(w, k, cuda::OpKind::kCombineVjp, CombineVjpArgsOf(w, k, OnDevice{launch}));
}

}  // namespace
