#include "cpu/combine_vjp.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/numerics.h"

namespace jax_ep::cpu {
namespace {

constexpr int32_t kNumLanes = 256;

template <typename T>
float Dot(const T* a, const T* b, int32_t hidden) {
  float lanes[kNumLanes] = {};
  for (int32_t begin = 0; begin < hidden; begin += kNumLanes) {
    const int32_t count = std::min(kNumLanes, hidden - begin);
    for (int32_t j = 0; j < count; ++j) {
      lanes[j] += ToFloat(a[begin + j]) * ToFloat(b[begin + j]);
    }
  }
  for (int32_t stride = kNumLanes / 2; stride > 0; stride /= 2) {
    for (int32_t j = 0; j < stride; ++j) lanes[j] += lanes[j + stride];
  }
  return lanes[0];
}

template <typename T>
Status RowGradient(const std::vector<const ops::CombineVjpArgs*>& ranks, int64_t rank,
                   int64_t row) {
  const ops::CombineVjpArgs& args = *ranks[rank];
  const ops::Geometry& geometry = args.geometry;
  const int32_t hidden = geometry.hidden;
  const int32_t encoded = args.handle.recv_src[row];
  if (encoded < plan::kNone || encoded >= geometry.num_sources()) {
    return BadHandleEntry("combine_vjp", "recv_src", rank, row, geometry.num_sources(), encoded);
  }
  T* d_row = static_cast<T*>(args.d_rows) + row * hidden;
  if (encoded == plan::kNone) {
    std::memset(d_row, ops::UnusedByte(args.unused_rows), geometry.row_bytes());
    args.d_weights[row] = 0.0f;
    return Status();
  }
  const plan::Source source =
      plan::DecodeSource(geometry.layout, encoded, geometry.num_tokens, geometry.top_k);
  const T* dy = static_cast<const T*>(ranks[source.rank]->dy) + int64_t{source.token} * hidden;
  const float weight = args.row_weights[row];
  for (int32_t h = 0; h < hidden; ++h) d_row[h] = FromFloat<T>(weight * ToFloat(dy[h]));
  args.d_weights[row] = Dot(static_cast<const T*>(args.rows) + row * hidden, dy, hidden);
  return Status();
}

template <typename T>
Status RowGradients(const std::vector<const ops::CombineVjpArgs*>& ranks, int64_t begin,
                    int64_t end) {
  const int64_t capacity = ranks[0]->geometry.capacity;
  Status status;
  for (int64_t i = begin; i < end && status.ok(); ++i) {
    status = RowGradient<T>(ranks, i / capacity, i % capacity);
  }
  return status;
}

}  // namespace

RowWork CombineVjpWork(std::vector<const ops::CombineVjpArgs*> ranks) {
  if (const int64_t other = FindDisagreement(ranks); other != 0) {
    return RanksDisagree("combine_vjp", other);
  }
  const ops::Geometry& geometry = ranks[0]->geometry;
  RowWork work;
  work.num_rows = int64_t{geometry.num_ranks} * geometry.capacity;
  work.bytes_per_row = 3 * geometry.row_bytes();
  work.run = [ranks = std::move(ranks)](int64_t begin, int64_t end) {
    return VisitRowType(ranks[0]->geometry.dtype,
                        [&](auto type) { return RowGradients<decltype(type)>(ranks, begin, end); });
  };
  return work;
}

}  // namespace jax_ep::cpu
