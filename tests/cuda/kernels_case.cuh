// Shared by kernels_test, failures_test and races_test: the workload of the command line, and the
// ranks with their memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check_cuda.h"
#include "cpu/numerics.h"
#include "cuda/core/workspace.h"
#include "cuda/node/cast.h"
#include "cuda/node/combine.h"
#include "cuda/node/combine_vjp.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "cuda/rows/quantize.h"
#include "ops/geometry.h"
#include "plan/routing.h"

namespace {

using namespace jax_ep;  // NOLINT: a test program
using plan::Layout;

// The options of the command line: name=value.
struct Options {
  std::map<std::string, std::string> given;
  Options(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equals = argument.find('=');
      given[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
  }
  int Int(const char* name, int fallback) const {
    const auto it = given.find(name);
    return it == given.end() ? fallback : std::atoi(it->second.c_str());
  }
  std::string Text(const char* name, const char* fallback) const {
    const auto it = given.find(name);
    return it == given.end() ? fallback : it->second;
  }
};

// The same memory on the host and on a GPU.
template <typename T>
struct Buffer {
  std::vector<T> host;
  T* device = nullptr;
  std::vector<T*> copies;
  void Resize(size_t count, bool poison = true) {
    host.assign(std::max<size_t>(count, 1), T{});
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&device), host.size() * sizeof(T)));
    if (poison) FillDevice(device, 0xAB, host.size() * sizeof(T));
  }
  void ToDevice() {
    CHECK_CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  // Makes Of give one of `count` equal copies in turn.
  void MakeCopies(int count) {
    copies = {device};
    const size_t bytes = host.size() * sizeof(T);
    for (int i = 1; i < count; ++i) {
      CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&copies.emplace_back()), bytes));
      CHECK_CUDA(cudaMemcpy(copies.back(), device, bytes, cudaMemcpyDeviceToDevice));
    }
  }
  T* Of(int launch) const { return copies.empty() ? device : copies[launch % copies.size()]; }
  std::vector<T> FromDevice() const {
    std::vector<T> out(host.size());
    CHECK_CUDA(cudaMemcpy(out.data(), device, out.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

// Two ops may be in flight at once.
constexpr int kNumChannels = 2;

struct Rank {
  int device;
  cudaStream_t stream, second_stream;
  cudaEvent_t begin, end;
  cuda::Channel* channel;  // the first of kNumChannels
  cuda::ErrorRecord* error;
  Buffer<int32_t> topk_idx, topk, dest_row, recv_rows, recv_src, expert_idx, group_sizes, counts,
      demand, num_dropped, num_invalid, scratch;
  Buffer<char> x, rows, y, dy, d_rows, cast_values;
  Buffer<float> scales, weights, row_scales, row_weights, home, d_weights, cast_scales;
  Buffer<uint32_t> packed_scales;
  cuda::GroupParams group;
};

// Symbols as in plan/routing.h.
struct Workload {
  Layout layout;
  int R, T, K, E, H, L, M, C;
  int alignment, blocks, more_blocks, cast_blocks, sets;
  std::string dtype;
  bool fp8, by_expert, weighted;
  ops::Quantization quantization;
  bool dense;  // then rows are received in x's dtype
  cuda::RowType type;
  ops::DType row_dtype;
  int width;  // bytes of an element of a row
  ops::UnusedRows unused_rows;

  // C is 0 unless it is given.
  explicit Workload(const Options& options) {
    by_expert = options.Text("layout", "token") == "expert";
    layout = by_expert ? Layout::kExpert : Layout::kToken;
    R = options.Int("ranks", 2);
    T = options.Int("tokens", 4096);
    K = options.Int("topk", 8);
    E = options.Int("experts", 256);
    H = options.Int("hidden", 7168);
    C = options.Int("capacity", 0);
    L = E / R;
    M = plan::RowsPerSource(layout, K, L);
    alignment = options.Int("alignment", 128);
    blocks = options.Int("blocks", 24);
    more_blocks = options.Int("more_blocks", 0);
    cast_blocks = options.Int("cast_blocks", 100);
    sets = options.Int("sets", 1);
    dtype = options.Text("dtype", "bf16");
    fp8 = options.Int("fp8", 0) != 0;
    const std::string cast = options.Text("cast", "");
    quantization = cast.empty()      ? ops::Quantization::kNone
                   : cast == "ue8m0" ? ops::Quantization::kFp8Ue8m0
                                     : ops::Quantization::kFp8;
    dense = options.Int("dense", 0) != 0;
    weighted = by_expert && options.Int("weighted", 0) != 0;
    row_dtype = dtype == "f32"   ? ops::DType::kFloat32
                : dtype == "f16" ? ops::DType::kFloat16
                                 : ops::DType::kBFloat16;
    type = cuda::RowTypeOf(row_dtype);
    width = cuda::ByteWidth(type);
    unused_rows =
        options.Int("keeps_unused", 0) != 0 ? ops::UnusedRows::kUndefined : ops::UnusedRows::kZero;
  }

  // Fills rows that an op will write, with what the CPU backend puts into those that it may leave
  // out.
  template <typename Rows>
  void Poison(Rows& rows) const {
    const int byte = unused_rows == ops::UnusedRows::kUndefined ? 0xFF : 0xAB;
    FillDevice(rows.device, byte, rows.host.size());
  }

  bool Casts() const { return quantization != ops::Quantization::kNone; }

  bool HasVjp() const {
    return by_expert && !fp8 && int64_t{H} * width <= cuda::MaxCombineVjpRowBytes();
  }
};

// Each rank's device, stream and routes, some of them invalid.
inline std::vector<Rank> MakeRanks(const Workload& w, std::mt19937& generator) {
  const int R = w.R, T = w.T, K = w.K, E = w.E;
  int num_devices = 0;
  CHECK_CUDA(cudaGetDeviceCount(&num_devices));
  std::vector<Rank> ranks(R);
  for (int r = 0; r < R; ++r) {
    Rank& rank = ranks[r];
    rank.device = r % num_devices;
    CHECK_CUDA(cudaSetDevice(rank.device));
    CHECK_CUDA(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaStreamCreateWithFlags(&rank.second_stream, cudaStreamNonBlocking));
    rank.topk_idx.Resize(size_t(T) * K);
    std::vector<int> experts(E);
    std::iota(experts.begin(), experts.end(), 0);
    for (int t = 0; t < T; ++t) {
      for (int k = 0; k < K; ++k) {
        std::swap(experts[k], experts[k + generator() % (E - k)]);
        rank.topk_idx.host[size_t(t) * K + k] = experts[k];
      }
      if (t % 17 == 3) rank.topk_idx.host[size_t(t) * K] = -1;
      if (t % 19 == 5 && K > 1) rank.topk_idx.host[size_t(t) * K + 1] = experts[0];
      if (t % 23 == 7) rank.topk_idx.host[size_t(t) * K] = E + 3;
    }
    rank.topk_idx.ToDevice();
  }
  return ranks;
}

// Rows that the fullest rank receives, with their padding.
inline int NeededCapacity(const Workload& w, const std::vector<Rank>& ranks) {
  const int R = w.R, T = w.T, K = w.K, E = w.E, L = w.L;
  std::vector<int> needed(R, 0);
  for (int d = 0; d < R; ++d) {
    std::vector<int> demand(L, 0);
    for (int s = 0; s < R; ++s) {
      for (int t = 0; t < T; ++t) {
        std::vector<int32_t> clean(K);
        plan::SanitizeToken(&ranks[s].topk_idx.host[size_t(t) * K], K, E, clean.data());
        bool any = false;
        for (int k = 0; k < K; ++k) {
          if (clean[k] < 0 || clean[k] / L != d) continue;
          any = true;
          ++demand[clean[k] % L];
        }
        needed[d] += !w.by_expert && any;
      }
    }
    if (w.by_expert) {
      for (int l = 0; l < L; ++l) needed[d] += plan::RoundUp(demand[l], w.alignment);
    }
  }
  return *std::max_element(needed.begin(), needed.end());
}

// Memory for an op's arguments, and its inputs.
inline void FillRank(const Workload& w, Rank& rank, std::mt19937& generator) {
  const int R = w.R, T = w.T, K = w.K, E = w.E, H = w.H, L = w.L, M = w.M, C = w.C;
  const int width = w.width;
  const bool fp8 = w.fp8, by_expert = w.by_expert;
  const size_t row = size_t(H) * width;
  rank.topk.Resize(size_t(T) * K);
  rank.dest_row.Resize(size_t(T) * K);
  rank.recv_rows.Resize(size_t(R) * T * M);
  rank.recv_src.Resize(C);
  rank.expert_idx.Resize(by_expert ? 0 : size_t(C) * K, false);
  for (Buffer<int32_t>* counts : {&rank.group_sizes, &rank.counts, &rank.demand}) counts->Resize(L);
  rank.num_dropped.Resize(1);
  rank.num_invalid.Resize(1);
  rank.scratch.Resize(size_t{32} * (E + R + 1));  // for either kernel
  rank.x.Resize(T * (fp8 ? size_t(H) : row));
  rank.rows.Resize(C * (fp8 ? size_t(H) : row));
  rank.scales.Resize(fp8 ? size_t(T) * H / 128 : 0);
  rank.row_scales.Resize(fp8 ? size_t(C) * H / 128 : 0, false);
  rank.cast_values.Resize(w.Casts() ? size_t(T) * H : 0);
  rank.cast_scales.Resize(w.Casts() ? plan::RoundUp(T * (H / 128), 4) : 0);  // for bulk loads
  rank.weights.Resize(size_t(T) * K);
  rank.row_weights.Resize(by_expert ? size_t(C) : size_t(C) * K);
  rank.y.Resize(T * row);
  rank.home.Resize(size_t(T) * K);
  rank.dy.Resize(T * row);
  rank.d_rows.Resize(C * row);
  rank.d_weights.Resize(C);
  // Some channels are negative zeros in all rows. Their sum is a positive zero.
  const auto is_zero = [&](size_t i) { return i % H % 29 == 5; };
  const auto fill = [&](Buffer<char>& buffer, bool bytes) {
    if (bytes) {
      for (char& byte : buffer.host) byte = static_cast<char>(generator());
    } else if (width == 4) {
      auto* values = reinterpret_cast<float*>(buffer.host.data());
      for (size_t i = 0; i < buffer.host.size() / 4; ++i)
        values[i] = is_zero(i) ? -0.0f : float(generator()) / 4e9f - 0.5f;
    } else {  // 16-bit floats of moderate size
      auto* values = reinterpret_cast<uint16_t*>(buffer.host.data());
      const uint16_t exponent = w.dtype == "bf16" ? 0x3F00 : 0x3800;
      for (size_t i = 0; i < buffer.host.size() / 2; ++i) {
        values[i] = is_zero(i) ? 0x8000 : exponent | (generator() & 0x80FF);
      }
    }
    buffer.ToDevice();
  };
  fill(rank.x, fp8);
  fill(rank.dy, false);
  for (float& weight : rank.weights.host) weight = float(generator()) / 4e9f;
  rank.weights.ToDevice();
  for (float& scale : rank.scales.host) scale = float(generator()) / 4e9f;
  rank.scales.ToDevice();
  rank.x.MakeCopies(w.sets);
  rank.dy.MakeCopies(w.sets);
}

// Memory, inputs and channels; the kernels are loaded.
inline void Prepare(const Workload& w, const Options& options, std::vector<Rank>& ranks,
                    std::mt19937& generator) {
  const int R = w.R;
  int num_devices = 0;
  CHECK_CUDA(cudaGetDeviceCount(&num_devices));
  for (int r = 0; r < R; ++r) {
    Rank& rank = ranks[r];
    CHECK_CUDA(cudaSetDevice(rank.device));
    for (int peer = 0; peer < num_devices; ++peer) {
      if (peer != rank.device && cudaDeviceEnablePeerAccess(peer, 0) != cudaSuccess)
        cudaGetLastError();
    }
    constexpr size_t kBytes = kNumChannels * sizeof(cuda::Channel);
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&rank.channel), kBytes));
    FillDevice(rank.channel, 0, kBytes);
    CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&rank.error), sizeof(cuda::ErrorRecord),
                             cudaHostAllocPortable | cudaHostAllocMapped));
    std::memset(rank.error, 0, sizeof(cuda::ErrorRecord));
    // A stream's first launch sets things up, and that must not wait for kernels that wait for this
    // rank.
    for (cudaStream_t stream : {rank.second_stream, rank.stream}) {
      CHECK_CUDA(cudaMemsetAsync(rank.channel, 0, kBytes, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
    }
    CHECK_CUDA(cudaEventCreate(&rank.begin));
    CHECK_CUDA(cudaEventCreate(&rank.end));
    CHECK_CUDA(cudaEventRecord(rank.begin, rank.stream));
    CHECK_CUDA(cudaEventRecord(rank.end, rank.stream));
    CHECK_CUDA(cudaStreamSynchronize(rank.stream));
    CHECK_CUDA(cuda::LoadPlan());
    CHECK_CUDA(cuda::LoadDispatch());
    CHECK_CUDA(cuda::LoadCombine());
    CHECK_CUDA(cuda::LoadCombineVjp());
    CHECK_CUDA(cuda::LoadQuantize());
    CHECK_CUDA(cuda::LoadCast());
    FillRank(w, rank, generator);
  }
  for (int r = 0; r < R; ++r) {
    cuda::GroupParams& group = ranks[r].group;
    group = {};
    for (int p = 0; p < R; ++p) group.peers[p] = ranks[p].channel;
    group.error = ranks[r].error;
    group.rank = r;
    group.num_ranks = R;
    group.num_channels = kNumChannels;
    group.arrival_timeout_ns = group.op_timeout_ns =
        options.Int("timeout", 5) * uint64_t{1'000'000'000};
    group.tag = 7;
    // All addresses are valid everywhere, as transport/peer_access.h says.
    std::vector<cuda::Region> regions(size_t(R) * cuda::kMaxRegions);
    for (size_t i = 0; i < regions.size(); ++i) {
      constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
      regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
    }
    for (int channel = 0; channel < kNumChannels; ++channel) {
      CHECK_CUDA(cudaMemcpy(ranks[r].channel[channel].regions, regions.data(),
                            regions.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice));
    }
  }
}

}  // namespace
