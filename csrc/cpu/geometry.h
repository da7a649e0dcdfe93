// What all ranks of a group agree on in one data op, and the handle that routes it.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "cpu/numerics.h"
#include "cpu/status.h"
#include "plan/routing.h"

namespace jax_ep::cpu {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3FN };

constexpr int64_t ByteWidth(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kFloat8E4M3FN ? 1 : 2);
}

// Calls `visit` with a value of the C++ type of `dtype`, which must not be kFloat8E4M3FN: rows in
// that format are moved, never computed with.
template <typename Visitor>
auto VisitRowType(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Float16{});
    default:
      return visit(float{});
  }
}

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

inline bool operator==(const Geometry& a, const Geometry& b) {
  const auto fields = [](const Geometry& g) {
    return std::tie(g.num_ranks, g.num_experts, g.num_tokens, g.top_k, g.capacity, g.hidden,
                    g.layout, g.dtype);
  };
  return fields(a) == fields(b);
}

// One rank's handle, as made by the plan op. M is rows_per_source().
struct Handle {
  const int32_t* topk;        // [T, K]
  const int32_t* dest_row;    // [T, K]
  const int32_t* recv_rows;   // [R * T, M]
  const int32_t* recv_src;    // [C]
  const int32_t* expert_idx;  // [C, K] in layout "token", else empty
};

// The error for an entry of a handle that points outside of [-1, limit): handles are plain arrays,
// so one that was damaged on the way must not make an op read or write elsewhere.
Status BadHandleEntry(const char* op, const char* argument, int64_t rank, int64_t index,
                      int64_t limit, int32_t got);

}  // namespace jax_ep::cpu
