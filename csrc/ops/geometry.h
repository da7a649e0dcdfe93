// The numbers that all ranks of a group agree on in one data op, and the handle that routes it.
#pragma once

#include <array>
#include <cstdint>

#include "plan/routing.h"

namespace jax_ep::ops {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3FN };

constexpr int64_t ByteWidth(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kFloat8E4M3FN ? 1 : 2);
}

// What rows without a source become. kUndefined: their bytes say nothing, so that kernels need not
// write them; the CPU backend makes them NaN, to show who reads them. Their weights and scales are
// zeros all the same.
enum class UnusedRows : int32_t { kZero = 0, kUndefined = 1 };

// Every byte of such a row on CPU; 0xff is NaN in every dtype of rows.
constexpr int UnusedByte(UnusedRows rows) { return rows == UnusedRows::kZero ? 0 : 0xff; }

// Symbols as in plan/routing.h; H is the hidden size.
struct Geometry {
  int32_t num_ranks;    // R
  int32_t num_experts;  // E, a multiple of R
  int32_t num_tokens;   // T
  int32_t top_k;        // K
  int32_t capacity;     // C
  int32_t hidden;       // H
  plan::Layout layout;
  DType dtype;  // of the rows

  int32_t num_local_experts() const { return num_experts / num_ranks; }
  int32_t rows_per_source() const {
    return plan::RowsPerSource(layout, top_k, num_local_experts());
  }
  int32_t num_sources() const { return plan::NumSources(layout, num_ranks, num_tokens, top_k); }
  int64_t row_bytes() const { return hidden * ByteWidth(dtype); }
};

// The numbers of a call that all ranks must agree on. The CPU backend compares them where ranks
// meet. GPUs compare a digest of them, which is part of their flags (ffi/cuda/op_tag.h).
using AgreedNumbers = std::array<int64_t, 12>;

// Those of the geometry, then `more`, at most four.
template <typename... More>
AgreedNumbers AgreedOn(const Geometry& geometry, More... more) {
  return {geometry.num_tokens,
          geometry.top_k,
          geometry.capacity,
          geometry.hidden,
          static_cast<int64_t>(geometry.dtype),
          static_cast<int64_t>(geometry.layout),
          geometry.num_ranks,
          geometry.num_experts,
          static_cast<int64_t>(more)...};
}

// One rank's handle, as made by the plan op. M is rows_per_source(). A group on one host has
// dest_row and recv_rows, one that spans hosts has entries (cuda/network/routes.h); the others are
// null.
struct Handle {
  const int32_t* topk;        // [T, K]
  const int32_t* dest_row;    // [T, K]
  const int32_t* recv_rows;   // [R * T, M]
  const int32_t* recv_src;    // [C]
  const int32_t* expert_idx;  // [C, K] in layout "token", else empty
  const int32_t* recv_start;  // [R + 1]
  const int32_t* recv_token;  // [C]
  const int32_t* recv_row;    // [C]
};

}  // namespace jax_ep::ops
