// network_traffic.h for Python (tests/support/network_traffic.py). Results are written to `out`:
// puts, their bytes, signals.
#include "network_traffic.h"

#include <cstdint>

namespace {

void Write(const jax_ep::traffic::Traffic& traffic, int64_t* out) {
  out[0] = traffic.puts;
  out[1] = traffic.put_bytes;
  out[2] = traffic.signals;
}

}  // namespace

extern "C" int64_t Crossings(const int32_t* topk, int num_tokens, int top_k, int experts_per_host,
                             int host) {
  return jax_ep::traffic::Crossings(topk, num_tokens, top_k, experts_per_host, host);
}

extern "C" int DispatchRowBytes(int row_bytes, int num_scales, int top_k) {
  return jax_ep::traffic::DispatchRowBytes(row_bytes, num_scales, top_k);
}

extern "C" int CombineRowBytes(int row_bytes, int top_k) {
  return jax_ep::traffic::CombineRowBytes(row_bytes, top_k);
}

// Of a group that uses so many lanes between two hosts.
extern "C" void OfRows(int chunk_bytes, int num_lanes, int num_tokens, int row_bytes,
                       int64_t num_rows, int64_t* out) {
  const jax_ep::cuda::NetworkShape shape{2, 1, num_lanes, chunk_bytes};
  Write(jax_ep::traffic::OfRows(shape, num_lanes, num_tokens, row_bytes, num_rows), out);
}

extern "C" void OfPlan(int num_tokens, int top_k, int64_t* out) {
  Write(jax_ep::traffic::OfPlan(num_tokens, top_k), out);
}
