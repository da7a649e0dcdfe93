#include "cpu/dispatch.h"

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "cpu/quantize.h"

namespace jax_ep::cpu {
namespace {

// Fills row `row` of `dest` from token `token` of `source`, or as an unused one where `source` is
// null.
void MoveRow(const ops::DispatchArgs& dest, int64_t row, const ops::DispatchArgs* source,
             int64_t token) {
  const ops::Geometry& geometry = dest.geometry;
  const int64_t hidden = geometry.hidden;
  const int64_t num_blocks = hidden / ops::kScaleBlock;
  const bool quantize = dest.quantization != ops::Quantization::kNone;
  const int64_t row_bytes = quantize && !dest.dense_output ? hidden : geometry.row_bytes();
  auto* out = static_cast<std::byte*>(dest.rows) + row * row_bytes;
  float* out_scales = dest.row_scales == nullptr ? nullptr : dest.row_scales + row * num_blocks;
  if (source == nullptr) {
    std::memset(out, ops::UnusedByte(dest.unused_rows), row_bytes);
    if (out_scales != nullptr) std::memset(out_scales, 0, num_blocks * sizeof(float));
    return;
  }
  const auto* in = static_cast<const std::byte*>(source->x) + token * geometry.row_bytes();
  if (!quantize) {
    std::memcpy(out, in, row_bytes);
    if (out_scales != nullptr) {
      std::memcpy(out_scales, source->scales + token * num_blocks, num_blocks * sizeof(float));
    }
    return;
  }
  VisitRowType(geometry.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = reinterpret_cast<const T*>(in);
    if (dest.dense_output) {
      RoundTripRow(x, geometry.hidden, dest.quantization, reinterpret_cast<T*>(out));
    } else {
      QuantizeRow(x, geometry.hidden, dest.quantization, reinterpret_cast<Float8E4M3FN*>(out),
                  out_scales);
    }
  });
}

// Fills the weights of row `row` of `dest`, with zeros where `weights` (of all ranks) is null.
void MoveWeights(const ops::DispatchArgs& dest, int64_t row, const ops::DispatchArgs* source_rank,
                 plan::Source source) {
  const int64_t top_k = dest.geometry.top_k;
  const float* weights =
      source_rank == nullptr ? nullptr : source_rank->weights + source.token * top_k;
  if (dest.geometry.layout == plan::Layout::kExpert) {
    dest.row_weights[row] = weights == nullptr ? 0.0f : weights[source.k];
    return;
  }
  for (int64_t k = 0; k < top_k; ++k) {
    const bool is_here = weights != nullptr && dest.handle.expert_idx[row * top_k + k] >= 0;
    dest.row_weights[row * top_k + k] = is_here ? weights[k] : 0.0f;
  }
}

Status DispatchRow(const std::vector<const ops::DispatchArgs*>& ranks, int64_t rank, int64_t row) {
  const ops::DispatchArgs& dest = *ranks[rank];
  const ops::Geometry& geometry = dest.geometry;
  const int32_t encoded = dest.handle.recv_src[row];
  if (encoded < plan::kNone || encoded >= geometry.num_sources()) {
    return BadHandleEntry("dispatch", "recv_src", rank, row, geometry.num_sources(), encoded);
  }
  plan::Source source{};
  const ops::DispatchArgs* source_rank = nullptr;
  if (encoded != plan::kNone) {
    source = plan::DecodeSource(geometry.layout, encoded, geometry.num_tokens, geometry.top_k);
    source_rank = ranks[source.rank];
  }
  MoveRow(dest, row, source_rank, source.token);
  if (dest.row_weights != nullptr) MoveWeights(dest, row, source_rank, source);
  return Status();
}

}  // namespace

RowWork DispatchWork(std::vector<const ops::DispatchArgs*> ranks) {
  if (const int64_t other = FindDisagreement(ranks); other != 0) {
    return RanksDisagree("dispatch", other);
  }
  const ops::Geometry& geometry = ranks[0]->geometry;
  const int64_t capacity = geometry.capacity;
  RowWork work;
  work.num_rows = geometry.num_ranks * capacity;
  work.bytes_per_row = geometry.row_bytes();
  work.run = [ranks = std::move(ranks), capacity](int64_t begin, int64_t end) {
    Status status;
    for (int64_t i = begin; i < end && status.ok(); ++i) {
      status = DispatchRow(ranks, i / capacity, i % capacity);
    }
    return status;
  };
  return work;
}

}  // namespace jax_ep::cpu
