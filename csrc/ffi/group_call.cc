#include "ffi/group_call.h"

#include <functional>
#include <limits>

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

void CheckExtents(Checker& check, const GroupAttrs& attrs, int64_t num_tokens, int64_t top_k,
                  int64_t capacity) {
  const int64_t num_entries = attrs.num_ranks * num_tokens * top_k;
  if (num_tokens < 1 || top_k < 1 || num_entries > kMaxIndex) {
    check.Fail("argument topk", "at least one entry, and fewer than 2^31 over all ranks",
               std::to_string(num_entries));
  }
  if (attrs.num_ranks * capacity > kMaxIndex) {
    check.Fail("argument recv_src", "fewer than 2^31 rows over all ranks",
               std::to_string(attrs.num_ranks * capacity));
  }
}

cpu::Handle CheckHandle(Checker& check, const GroupAttrs& attrs, const HandleBuffers& buffers,
                        cpu::Geometry& geometry) {
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
  const bool by_token = geometry.layout == plan::Layout::kToken;
  check.Argument("topk", buffers.topk, ffi::S32, {num_tokens, top_k});
  check.Argument("dest_row", buffers.dest_row, ffi::S32, {num_tokens, top_k});
  check.Argument("recv_rows", buffers.recv_rows, ffi::S32,
                 {attrs.num_ranks * num_tokens, geometry.rows_per_source()});
  check.Argument("recv_src", buffers.recv_src, ffi::S32, {capacity});
  check.Argument("expert_idx", buffers.expert_idx, ffi::S32, {by_token ? capacity : 0, top_k});
  const auto data = [](ffi::AnyBuffer buffer) {
    return static_cast<const int32_t*>(buffer.untyped_data());
  };
  return {data(buffers.topk), data(buffers.dest_row), data(buffers.recv_rows),
          data(buffers.recv_src), data(buffers.expert_idx)};
}

void CheckRows(Checker& check, const char* name, ffi::AnyBuffer x, int64_t num_rows,
               cpu::Geometry& geometry) {
  const int64_t hidden = check.MatrixArgument(name, x).cols;
  const std::string what = std::string("argument ") + name;
  if (hidden > kMaxIndex) check.Fail(what, "a hidden size below 2^31", std::to_string(hidden));
  check.Buffer(what, x, x.element_type(), {num_rows, hidden});
  geometry.hidden = static_cast<int32_t>(hidden);
  switch (x.element_type()) {
    case ffi::F32:
      geometry.dtype = cpu::DType::kFloat32;
      return;
    case ffi::BF16:
      geometry.dtype = cpu::DType::kBFloat16;
      return;
    case ffi::F16:
      geometry.dtype = cpu::DType::kFloat16;
      return;
    case ffi::F8E4M3FN:
      geometry.dtype = cpu::DType::kFloat8E4M3FN;
      return;
    default:
      check.Fail(what, "dtype BF16, F16, F32 or F8E4M3FN", Describe(x));
  }
}

void CheckSummableRows(Checker& check, const char* name, ffi::AnyBuffer x, int64_t num_rows,
                       cpu::Geometry& geometry) {
  CheckRows(check, name, x, num_rows, geometry);
  if (geometry.dtype == cpu::DType::kFloat8E4M3FN) {
    check.Fail(std::string("argument ") + name, "dtype BF16, F16 or F32", Describe(x));
  }
}

void CheckRowValues(Checker& check, const char* what, ffi::AnyBuffer values,
                    const cpu::Geometry& geometry) {
  if (geometry.layout == plan::Layout::kExpert) {
    check.Buffer(what, values, ffi::F32, {geometry.capacity});
  } else {
    check.Buffer(what, values, ffi::F32, {geometry.capacity, geometry.top_k});
  }
}

cpu::ThreadPool PoolFrom(ffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

ffi::Error ToError(const cpu::Status& status) {
  switch (status.code()) {
    case cpu::StatusCode::kOk:
      return ffi::Error::Success();
    case cpu::StatusCode::kInvalidArgument:
      return ffi::Error::InvalidArgument(status.message());
    case cpu::StatusCode::kDeadlineExceeded:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, status.message());
    case cpu::StatusCode::kInternal:
      return ffi::Error::Internal(status.message());
  }
  return ffi::Error::Internal(status.message());
}

}  // namespace jax_ep
