#include "ffi/decode.h"

#include <limits>
#include <string>
#include <type_traits>

#include "ffi/decode_parts.h"
#include "plan/routing.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

}  // namespace

void CheckGroup(Checker& check, const GroupAttrs& attrs) {
  check.Attribute("num_ranks", attrs.num_ranks > 0, "a positive number", attrs.num_ranks);
  if (!check.ok()) return;
  check.Attribute("num_experts", attrs.num_experts > 0 && attrs.num_experts % attrs.num_ranks == 0,
                  "a positive multiple of num_ranks", attrs.num_experts);
  check.Attribute("layout", attrs.layout == 0 || attrs.layout == 1, "0 (expert) or 1 (token)",
                  attrs.layout);
  check.Attribute("timeout_ms", attrs.timeout_ms > 0, "a positive number", attrs.timeout_ms);
  check.Attribute("ordinal", attrs.ordinal >= 0, "a count of calls", attrs.ordinal);
}

Coords CheckCoords(Checker& check, const GroupAttrs& attrs, ffi::AnyBuffer buffer) {
  check.Argument("coords", buffer, ffi::S32, {2});
  if (!check.ok()) return {};
  const auto* values = static_cast<const int32_t*>(buffer.untyped_data());
  const Coords coords{values[0], values[1]};
  if (coords.rank < 0 || coords.rank >= attrs.num_ranks) {
    check.Fail("argument coords", "a rank in [0, " + std::to_string(attrs.num_ranks) + ")",
               std::to_string(coords.rank));
  }
  return coords;
}

namespace {

// Checks what int32 indices need: T, K >= 1, and R * T * K and R * C below 2^31.
void CheckExtents(Checker& check, const GroupAttrs& attrs, int64_t num_tokens, int64_t top_k,
                  int64_t capacity) {
  const int64_t num_entries = attrs.num_ranks * num_tokens * top_k;
  if (num_tokens < 1 || top_k < 1 || num_entries > kMaxIndex) {
    check.Fail("argument topk", "at least one entry, and fewer than 2^31 over all ranks",
               std::to_string(num_entries));
  }
  if (attrs.num_ranks * capacity >= kMaxIndex) {
    check.Fail("argument recv_src", "fewer than 2^31 - 1 rows over all ranks",
               std::to_string(attrs.num_ranks * capacity));
  }
}

// Sets the pointers of `args` that have the names of the buffers in LIST.
#define JAX_EP_SET_POINTER(name) args.name = Ints(buffers.name);
#define JAX_EP_SET_POINTERS(LIST) LIST(JAX_EP_SET_POINTER)

// Checks what tells of a rank's routes, in a group on one host: operands of ops that move rows, or
// results of the plan, as `what` says.
template <typename Buffers>
void CheckRoutes(Checker& check, const char* what, const Buffers& buffers,
                 const ops::Geometry& geometry) {
  check.Buffer(what + std::string("dest_row"), buffers.dest_row, ffi::S32,
               {geometry.num_tokens, geometry.top_k});
  check.Buffer(what + std::string("recv_rows"), buffers.recv_rows, ffi::S32,
               {int64_t{geometry.num_ranks} * geometry.num_tokens, geometry.rows_per_source()});
}

// The same in a group that spans hosts.
template <typename Buffers>
void CheckEntries(Checker& check, const char* what, const Buffers& buffers,
                  const ops::Geometry& geometry) {
  check.Buffer(what + std::string("recv_start"), buffers.recv_start, ffi::S32,
               {geometry.num_ranks + 1});
  check.Buffer(what + std::string("recv_token"), buffers.recv_token, ffi::S32, {geometry.capacity});
  check.Buffer(what + std::string("recv_row"), buffers.recv_row, ffi::S32, {geometry.capacity});
}

template <typename Buffers, typename = void>
struct SpansHosts : std::false_type {};
template <typename Buffers>
struct SpansHosts<Buffers, std::void_t<decltype(Buffers::recv_start)>> : std::true_type {};

// Checks a handle, as operands or results.
template <typename Buffers>
void CheckHandleBuffers(Checker& check, const char* what, const Buffers& buffers,
                        const ops::Geometry& geometry) {
  const bool by_token = geometry.layout == plan::Layout::kToken;
  check.Buffer(what + std::string("topk"), buffers.topk, ffi::S32,
               {geometry.num_tokens, geometry.top_k});
  check.Buffer(what + std::string("recv_src"), buffers.recv_src, ffi::S32, {geometry.capacity});
  check.Buffer(what + std::string("expert_idx"), buffers.expert_idx, ffi::S32,
               {by_token ? geometry.capacity : 0, geometry.top_k});
  if constexpr (SpansHosts<Buffers>::value) {
    CheckEntries(check, what, buffers, geometry);
  } else {
    CheckRoutes(check, what, buffers, geometry);
  }
}

// Checks the operands that carry a handle, which all ops that move rows have, and fills `geometry`
// (all but hidden and dtype) from the attributes and their shapes.
template <typename Buffers>
ops::Handle CheckHandle(Checker& check, const GroupAttrs& attrs, const Buffers& buffers,
                        ops::Geometry& geometry) {
  const auto [num_tokens, top_k] = check.MatrixArgument("topk", buffers.topk);
  const int64_t capacity = static_cast<int64_t>(buffers.recv_src.element_count());
  CheckExtents(check, attrs, num_tokens, top_k, capacity);
  if (!check.ok()) return {};
  geometry.num_ranks = attrs.num_ranks;
  geometry.num_experts = attrs.num_experts;
  geometry.num_tokens = static_cast<int32_t>(num_tokens);
  geometry.top_k = static_cast<int32_t>(top_k);
  geometry.capacity = static_cast<int32_t>(capacity);
  geometry.layout = static_cast<plan::Layout>(attrs.layout);
  CheckHandleBuffers(check, "argument ", buffers, geometry);
  ops::Handle args{};
  if constexpr (SpansHosts<Buffers>::value) {
    JAX_EP_SET_POINTERS(JAX_EP_NETWORK_HANDLE_OPERANDS)
  } else {
    JAX_EP_SET_POINTERS(JAX_EP_HANDLE_OPERANDS)
  }
  return args;
}

// Checks that `x` is [num_rows, H] of a dtype that rows may have; sets geometry.hidden and
// geometry.dtype.
void CheckRows(Checker& check, const char* name, ffi::AnyBuffer x, int64_t num_rows,
               ops::Geometry& geometry) {
  const int64_t hidden = check.MatrixArgument(name, x).cols;
  const std::string what = std::string("argument ") + name;
  if (hidden > kMaxIndex) check.Fail(what, "a hidden size below 2^31", std::to_string(hidden));
  check.Buffer(what, x, x.element_type(), {num_rows, hidden});
  geometry.hidden = static_cast<int32_t>(hidden);
  switch (x.element_type()) {
    case ffi::F32:
      geometry.dtype = ops::DType::kFloat32;
      return;
    case ffi::BF16:
      geometry.dtype = ops::DType::kBFloat16;
      return;
    case ffi::F16:
      geometry.dtype = ops::DType::kFloat16;
      return;
    case ffi::F8E4M3FN:
      geometry.dtype = ops::DType::kFloat8E4M3FN;
      return;
    default:
      check.Fail(what, "dtype BF16, F16, F32 or F8E4M3FN", Describe(x));
  }
}

// The same for rows to compute with: bf16, f16 or f32.
void CheckSummableRows(Checker& check, const char* name, ffi::AnyBuffer x, int64_t num_rows,
                       ops::Geometry& geometry) {
  CheckRows(check, name, x, num_rows, geometry);
  if (geometry.dtype == ops::DType::kFloat8E4M3FN) {
    check.Fail(std::string("argument ") + name, "dtype BF16, F16 or F32", Describe(x));
  }
}

// Checks float32 values that belong to rows: [C] in layout "expert", [C, K] in layout "token".
// `what` is "argument name" or "result name".
void CheckRowValues(Checker& check, const char* what, ffi::AnyBuffer values,
                    const ops::Geometry& geometry) {
  if (geometry.layout == plan::Layout::kExpert) {
    check.Buffer(what, values, ffi::F32, {geometry.capacity});
  } else {
    check.Buffer(what, values, ffi::F32, {geometry.capacity, geometry.top_k});
  }
}

}  // namespace

plan::PlanShape CheckPlanShape(Checker& check, const PlanAttrs& attrs, ffi::AnyBuffer topk_idx,
                               int64_t capacity) {
  const auto [num_tokens, top_k] = check.MatrixArgument("topk_idx", topk_idx);
  CheckExtents(check, attrs.group, num_tokens, top_k, capacity);
  const bool by_token = attrs.group.layout == static_cast<int32_t>(plan::Layout::kToken);
  check.Attribute("expert_capacity", attrs.expert_capacity >= 0, "a number of rows",
                  attrs.expert_capacity);
  check.Attribute("alignment", attrs.alignment > 0, "a positive number", attrs.alignment);
  check.Attribute("masked", attrs.masked == 0 || (attrs.masked == 1 && !by_token),
                  "0, or 1 in layout 'expert'", attrs.masked);
  if (!check.ok()) return {};
  check.Attribute("alignment", by_token || capacity % attrs.alignment == 0,
                  "a divisor of the capacity", attrs.alignment);
  const int64_t num_local = attrs.group.num_experts / attrs.group.num_ranks;
  check.Attribute("alignment", attrs.masked == 0 || capacity == num_local * attrs.alignment,
                  "the rows of a masked expert", attrs.alignment);
  check.Argument("topk_idx", topk_idx, ffi::S32, {num_tokens, top_k});
  return {attrs.group.num_ranks,
          static_cast<int32_t>(num_tokens),
          static_cast<int32_t>(top_k),
          attrs.group.num_experts,
          static_cast<int32_t>(capacity),
          attrs.alignment,
          attrs.expert_capacity,
          static_cast<plan::Layout>(attrs.group.layout),
          attrs.masked != 0};
}

namespace {

// Checks a plan, and gives its shape.
template <typename Buffers>
plan::PlanShape CheckPlan(Checker& check, const PlanAttrs& attrs, const Buffers& buffers) {
  const plan::PlanShape shape = CheckPlanShape(
      check, attrs, buffers.topk_idx, static_cast<int64_t>(buffers.recv_src.element_count()));
  if (!check.ok()) return {};
  const ops::Geometry geometry = ops::GeometryOf(shape);
  const int64_t num_local_experts = shape.num_local_experts();
  CheckHandleBuffers(check, "result ", buffers, geometry);
  check.Result("group_sizes", buffers.group_sizes, ffi::S32, {num_local_experts});
  check.Result("counts", buffers.counts, ffi::S32, {num_local_experts});
  check.Result("demand", buffers.demand, ffi::S32, {num_local_experts});
  check.Result("num_dropped", buffers.num_dropped, ffi::S32, {1});
  check.Result("num_invalid", buffers.num_invalid, ffi::S32, {1});
  return shape;
}

}  // namespace

void Decode(Checker& check, const PlanAttrs& attrs, const PlanBuffers& buffers,
            ops::PlanArgs& plan_args) {
  plan_args.shape = CheckPlan(check, attrs, buffers);
  plan::RankPlan& args = plan_args.buffers;
  args.topk_idx = Ints(buffers.topk_idx);
  JAX_EP_SET_POINTERS(JAX_EP_PLAN_RESULTS)
}

void Decode(Checker& check, const PlanAttrs& attrs, const NetworkPlanBuffers& buffers,
            ops::NetworkPlanArgs& args) {
  args.shape = CheckPlan(check, attrs, buffers);
  args.topk_idx = Ints(buffers.topk_idx);
  JAX_EP_SET_POINTERS(JAX_EP_NETWORK_PLAN_RESULTS)
}

namespace {

ops::UnusedRows CheckUnusedRows(Checker& check, int32_t unused_rows) {
  check.Attribute("unused_rows", unused_rows == 0 || unused_rows == 1, "0 (zeros) or 1 (undefined)",
                  unused_rows);
  return static_cast<ops::UnusedRows>(unused_rows);
}

}  // namespace

void CheckSent(Checker& check, const DispatchAttrs& attrs, ffi::AnyBuffer x, ffi::AnyBuffer scales,
               ffi::AnyBuffer weights, ops::DispatchArgs& args) {
  ops::Geometry& geometry = args.geometry;
  CheckRows(check, "x", x, geometry.num_tokens, geometry);
  check.Attribute("quantization", attrs.quantization >= 0 && attrs.quantization <= 2,
                  "0 (none), 1 (float32 scales) or 2 (ue8m0 scales)", attrs.quantization);
  args.quantization = static_cast<ops::Quantization>(attrs.quantization);
  args.dense_output = attrs.dense_output != 0;
  args.unused_rows = CheckUnusedRows(check, attrs.unused_rows);

  const bool quantize = args.quantization != ops::Quantization::kNone;
  const bool quantized_input = geometry.dtype == ops::DType::kFloat8E4M3FN;
  const int64_t num_blocks = geometry.hidden / ops::kScaleBlock;
  if (quantize && quantized_input)
    check.Argument("x", x, ffi::BF16, {geometry.num_tokens, geometry.hidden});
  if ((quantize || quantized_input) && geometry.hidden % ops::kScaleBlock != 0) {
    check.Fail("argument x", "a hidden size that is a multiple of 128",
               std::to_string(geometry.hidden));
  }
  if (quantized_input) {
    check.Argument("scales", scales, ffi::F32, {geometry.num_tokens, num_blocks});
  } else {
    check.Argument("scales", scales, ffi::F32, {0});
  }
  args.x = x.untyped_data();
  args.scales = quantized_input ? static_cast<const float*>(scales.untyped_data()) : nullptr;
  if (IsPresent(weights)) {
    check.Argument("weights", weights, ffi::F32, {geometry.num_tokens, geometry.top_k});
    args.weights = static_cast<const float*>(weights.untyped_data());
  } else {
    check.Argument("weights", weights, ffi::F32, {0});
  }
}

namespace {

template <typename Buffers>
void DecodeDispatch(Checker& check, const DispatchAttrs& attrs, const Buffers& buffers,
                    ops::DispatchArgs& args) {
  args.handle = CheckHandle(check, attrs.group, buffers, args.geometry);
  if (!check.ok()) return;
  CheckSent(check, attrs, buffers.x, buffers.scales, buffers.weights, args);
  const ops::Geometry& geometry = args.geometry;
  const bool quantized = args.scales != nullptr ||
                         (args.quantization != ops::Quantization::kNone && !args.dense_output);
  check.Result("rows", buffers.rows, quantized ? ffi::F8E4M3FN : buffers.x.element_type(),
               {geometry.capacity, geometry.hidden});
  args.rows = buffers.rows.untyped_data();
  if (quantized) {
    CheckRowScales(check, buffers.row_scales, args);
  } else {
    check.Result("row_scales", buffers.row_scales, ffi::F32, {0});
  }
  if (args.weights != nullptr) {
    CheckRowValues(check, "result row_weights", buffers.row_weights, geometry);
    args.row_weights = static_cast<float*>(buffers.row_weights.untyped_data());
  } else {
    check.Result("row_weights", buffers.row_weights, ffi::F32, {0});
  }
}

}  // namespace

void CheckSummed(Checker& check, ffi::AnyBuffer rows, ffi::AnyBuffer row_weights,
                 ops::CombineArgs& args) {
  ops::Geometry& geometry = args.geometry;
  CheckSummableRows(check, "rows", rows, geometry.capacity, geometry);
  args.rows = rows.untyped_data();
  if (IsPresent(row_weights)) {
    check.Argument("row_weights", row_weights, ffi::F32, {geometry.capacity});
    args.row_weights = static_cast<const float*>(row_weights.untyped_data());
  } else {
    check.Argument("row_weights", row_weights, ffi::F32, {0});
  }
}

ops::Handle CheckHandleOperands(Checker& check, const GroupAttrs& attrs,
                                const LatencyCombineStartBuffers& buffers,
                                ops::Geometry& geometry) {
  return CheckHandle(check, attrs, buffers, geometry);
}

namespace {

template <typename Buffers>
void DecodeCombine(Checker& check, const CombineAttrs& attrs, const Buffers& buffers,
                   ops::CombineArgs& args) {
  ops::Geometry& geometry = args.geometry;
  args.handle = CheckHandle(check, attrs.group, buffers, geometry);
  if (!check.ok()) return;
  CheckSummed(check, buffers.rows, buffers.row_weights, args);
  check.Result("y", buffers.y, buffers.rows.element_type(), {geometry.num_tokens, geometry.hidden});
  args.y = buffers.y.untyped_data();
  if (IsPresent(buffers.home)) {
    CheckRowValues(check, "argument values", buffers.values, geometry);
    check.Result("home", buffers.home, ffi::F32, {geometry.num_tokens, geometry.top_k});
    args.values = static_cast<const float*>(buffers.values.untyped_data());
    args.home = static_cast<float*>(buffers.home.untyped_data());
  } else {
    check.Argument("values", buffers.values, ffi::F32, {0});
    check.Result("home", buffers.home, ffi::F32, {0});
  }
}

template <typename Buffers>
void DecodeCombineVjp(Checker& check, const CombineVjpAttrs& attrs, const Buffers& buffers,
                      ops::CombineVjpArgs& args) {
  ops::Geometry& geometry = args.geometry;
  check.Attribute("layout", attrs.group.layout == 0, "0 (expert)", attrs.group.layout);
  args.unused_rows = CheckUnusedRows(check, attrs.unused_rows);
  args.handle = CheckHandle(check, attrs.group, buffers, geometry);
  if (!check.ok()) return;
  CheckSummableRows(check, "rows", buffers.rows, geometry.capacity, geometry);
  check.Argument("dy", buffers.dy, buffers.rows.element_type(),
                 {geometry.num_tokens, geometry.hidden});
  check.Argument("row_weights", buffers.row_weights, ffi::F32, {geometry.capacity});
  check.Result("d_rows", buffers.d_rows, buffers.rows.element_type(),
               {geometry.capacity, geometry.hidden});
  check.Result("d_weights", buffers.d_weights, ffi::F32, {geometry.capacity});
  args.dy = buffers.dy.untyped_data();
  args.rows = buffers.rows.untyped_data();
  args.row_weights = static_cast<const float*>(buffers.row_weights.untyped_data());
  args.d_rows = buffers.d_rows.untyped_data();
  args.d_weights = static_cast<float*>(buffers.d_weights.untyped_data());
}

}  // namespace

#define JAX_EP_DECODE(Op, Buffers)                                            \
  void Decode(Checker& check, const Op##Attrs& attrs, const Buffers& buffers, \
              ops::Op##Args& args) {                                          \
    Decode##Op(check, attrs, buffers, args);                                  \
  }
JAX_EP_DECODE(Dispatch, DispatchBuffers)
JAX_EP_DECODE(Dispatch, NetworkDispatchBuffers)
JAX_EP_DECODE(Combine, CombineBuffers)
JAX_EP_DECODE(Combine, LatencyCombineBuffers)
JAX_EP_DECODE(Combine, NetworkCombineBuffers)
JAX_EP_DECODE(CombineVjp, CombineVjpBuffers)
JAX_EP_DECODE(CombineVjp, NetworkCombineVjpBuffers)
#undef JAX_EP_DECODE

}  // namespace jax_ep
