// Rows to float8_e4m3fn and back, on one GPU. The kernels here are for groups that span hosts.
// Within a host, rows are cast beside a dispatch (node/cast.h) and become dense on their way
// (rows/dense.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/rows/row_type.h"
#include "ops/dispatch.h"

namespace jax_ep::cuda {

struct QuantizeParams {
  RowType type;
  bool ue8m0;  // scales are rounded up to powers of two
  int64_t num_rows;
  int32_t hidden;  // a multiple of 128
  const void* x;   // [num_rows, hidden]
  void* values;    // [num_rows, hidden] float8_e4m3fn
  float* scales;   // [num_rows, hidden / 128]
};

// Rows in float8 with their scales, in one piece of memory.
struct QuantizedRows {
  char* values;
  float* scales;

  // Bytes that `num_rows` rows take, with every part aligned for bulk copies.
  static int64_t Bytes(int64_t num_rows, int32_t hidden) {
    return Align(num_rows * hidden) + Align(num_rows * (hidden / ops::kScaleBlock) * 4);
  }

  static QuantizedRows At(char* memory, int64_t num_rows, int32_t hidden) {
    return {memory, reinterpret_cast<float*>(memory + Align(num_rows * hidden))};
  }

 private:
  static int64_t Align(int64_t bytes) { return (bytes + 127) / 128 * 128; }
};

cudaError_t LaunchQuantize(const QuantizeParams& params, cudaStream_t stream);

// In place: the last `hidden` bytes of each row hold its channels as float8_e4m3fn.
struct DequantizeParams {
  RowType type;
  int64_t num_rows;
  int32_t hidden;
  const float* scales;  // [num_rows, hidden / 128]
  void* rows;           // [num_rows, hidden]

  // Bytes of `scales`.
  static int64_t ScaleBytes(int64_t num_rows, int32_t hidden) {
    return num_rows * (hidden / ops::kScaleBlock) * static_cast<int64_t>(sizeof(float));
  }
};

cudaError_t LaunchDequantize(const DequantizeParams& params, cudaStream_t stream);

cudaError_t LoadQuantize();

}  // namespace jax_ep::cuda
