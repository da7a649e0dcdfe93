// The parts of plan_test.cu: groups of ranks on one GPU, and plans with their right results.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "check_cuda.h"
#include "cuda/core/sync.cuh"
#include "cuda/plan/common.cuh"
#include "cuda/plan/plan.h"
#include "plan/build_plan.h"

namespace plan_test {

using namespace jax_ep;  // NOLINT: a test program
using cuda::PlanKernel;
using plan::Layout;

inline int num_wrong = 0;

__global__ void Spin(uint64_t ns) {
  const uint64_t begin = cuda::ptx::GlobalTimer();
  while (cuda::ptx::GlobalTimer() - begin < ns) {
  }
}

// wrong: the number of wrong words, and the lowest of them.
__global__ void CompareWords(const int32_t* got, const int32_t* expected, int count,
                             unsigned int* wrong) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    if (got[i] == expected[i]) continue;
    atomicAdd(&wrong[0], 1u);
    atomicMin(&wrong[1], static_cast<unsigned int>(i));
  }
}

// A usual op: peers read from an address, and all wait until that is done.
__global__ void OtherOp(cuda::GroupParams group, const int32_t* input, int32_t* sink) {
  __shared__ cuda::PeerInputs inputs;
  const cuda::OpNumbers op = cuda::BeginOp(group);
  if (blockIdx.x == 0) cuda::Publish(group, op, {input, nullptr, nullptr});
  if (cuda::WaitInputs(group, op, inputs) && threadIdx.x < group.num_ranks) {
    *sink = inputs.Of<int32_t>(threadIdx.x, 0)[0];
  }
  cuda::EndOp(group, op.epoch, [] {});
}

template <typename T>
T* Allocate(size_t count) {
  T* pointer;
  CHECK_CUDA(
      cudaMalloc(reinterpret_cast<void**>(&pointer), std::max<size_t>(count, 1) * sizeof(T)));
  return pointer;
}

// R ranks on this GPU.
struct Group {
  std::vector<cuda::GroupParams> params;
  std::vector<cudaStream_t> streams;
  int32_t* sink;

  explicit Group(int num_ranks, double timeout_s = 20) : params(num_ranks), streams(num_ranks) {
    sink = Allocate<int32_t>(1);
    std::vector<cuda::Channel*> channels(num_ranks);
    for (int r = 0; r < num_ranks; ++r) {
      CHECK_CUDA(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
      channels[r] = Allocate<cuda::Channel>(1);
      FillDevice(channels[r], 0, sizeof(cuda::Channel));
      std::vector<cuda::Region> regions(size_t(num_ranks) * cuda::kMaxRegions);
      for (size_t i = 0; i < regions.size(); ++i) {
        constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
        regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
      }
      CHECK_CUDA(cudaMemcpy(channels[r]->regions, regions.data(),
                            regions.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice));
    }
    for (int r = 0; r < num_ranks; ++r) {
      cuda::GroupParams& group = params[r];
      group = {};
      std::copy(channels.begin(), channels.end(), group.peers);
      CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&group.error), sizeof(cuda::ErrorRecord),
                               cudaHostAllocMapped));
      *group.error = {};
      group.rank = r;
      group.num_ranks = num_ranks;
      group.num_channels = 1;
      group.arrival_timeout_ns = group.op_timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
      group.op = cuda::OpKind::kPlan;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  // Streams, channels and records live until the program ends.

  void Other() {
    for (size_t r = 0; r < params.size(); ++r) {
      cuda::GroupParams group = params[r];
      group.tag = 999;
      group.op = cuda::OpKind::kDispatch;
      OtherOp<<<4, 128, 0, streams[r]>>>(group, sink, sink);
      CHECK_CUDA(cudaGetLastError());
    }
  }
  void Wait() {
    CHECK_CUDA(cudaDeviceSynchronize());
    for (const cuda::GroupParams& group : params) {
      if (group.error->set == 0) continue;
      std::printf("FAILED: kind %u rank %u peer %u word %u expected %llx seen %llx\n",
                  group.error->kind, group.error->rank, group.error->peer, group.error->word,
                  (unsigned long long)group.error->expected, (unsigned long long)group.error->seen);
      std::exit(1);
    }
  }
};

enum Routes { kUniform, kSkewed, kSparse, kWild };
enum Room { kExact, kHalf, kLossless };

struct Shape {
  int R, T, K, E;
  Layout layout;
  int alignment = 128;
  Room room = kExact;
  Routes routes = kUniform;
  int expert_capacity = INT32_MAX;
  int shift = 0;  // of all arrays, in int32: not aligned to 16 bytes
};

constexpr const char* kArrays[] = {"topk",        "dest_row",    "recv_rows", "recv_src",
                                   "expert_idx",  "group_sizes", "counts",    "demand",
                                   "num_dropped", "num_invalid"};

// A shape with its routes and the right results.
struct Case {
  static constexpr int kVariants = 4;
  Shape s;
  Group* group;
  int C, L, M, total;
  uint32_t tag;
  std::vector<int> offsets, sizes;  // of the results, in one block of int32
  std::vector<int32_t*> topk_idx, expected, results;
  std::vector<int32_t*> scratch;
  std::vector<unsigned int*> wrong;

  Case(const Shape& shape, Group& of, uint32_t number, std::mt19937& random)
      : s(shape), group(&of), L(shape.E / shape.R), tag(number % 60000 + 1) {
    M = plan::RowsPerSource(s.layout, s.K, L);
    std::vector<std::vector<std::vector<int32_t>>> routes(kVariants);
    for (auto& variant : routes) {
      for (int r = 0; r < s.R; ++r) variant.push_back(MakeRoutes(random));
    }
    C = Capacity(routes[0]);
    const int64_t TK = int64_t{s.T} * s.K;
    sizes = {int(TK), int(TK), s.R * s.T * M, C, s.layout == Layout::kToken ? C * s.K : 0, L, L, L,
             1,       1};
    total = 4;
    for (const int size : sizes) {
      offsets.push_back(total + s.shift);
      total += (size + 3) / 4 * 4 + 4;
    }
    for (int v = 0; v < kVariants; ++v) {
      std::vector<std::vector<int32_t>> blocks(s.R, std::vector<int32_t>(total, 0xABABABAB));
      std::vector<plan::RankPlan> plans;
      for (int r = 0; r < s.R; ++r) {
        int32_t* b = blocks[r].data();
        const std::vector<int>& o = offsets;
        plans.push_back({routes[v][r].data(), b + o[0], b + o[1], b + o[2], b + o[3], b + o[4],
                         b + o[5], b + o[6], b + o[7], b + o[8], b + o[9]});
      }
      plan::BuildPlans({s.R, s.T, s.K, s.E, C, s.alignment, s.expert_capacity, s.layout}, plans);
      for (int r = 0; r < s.R; ++r) {
        topk_idx.push_back(Allocate<int32_t>(TK + 4) + s.shift);
        CHECK_CUDA(
            cudaMemcpy(topk_idx.back(), routes[v][r].data(), TK * 4, cudaMemcpyHostToDevice));
        expected.push_back(Allocate<int32_t>(total));
        CHECK_CUDA(
            cudaMemcpy(expected.back(), blocks[r].data(), total * 4, cudaMemcpyHostToDevice));
      }
    }
    for (int r = 0; r < s.R; ++r) {
      results.push_back(Allocate<int32_t>(total));
      scratch.push_back(Allocate<int32_t>(cuda::PullPlanScratchSize(s.E, s.R)));
      wrong.push_back(Allocate<unsigned int>(2));
      const unsigned int none[2] = {0, ~0u};
      CHECK_CUDA(cudaMemcpy(wrong[r], none, sizeof(none), cudaMemcpyHostToDevice));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  ~Case() {
    for (int32_t* pointer : topk_idx) cudaFree(pointer - s.shift);
    for (int32_t* pointer : expected) cudaFree(pointer);
    for (int32_t* pointer : results) cudaFree(pointer);
    for (int32_t* pointer : scratch) cudaFree(pointer);
    for (unsigned int* pointer : wrong) cudaFree(pointer);
  }

  std::vector<int32_t> MakeRoutes(std::mt19937& random) const {
    std::vector<int32_t> ids(size_t(s.T) * s.K);
    std::vector<int> experts(s.E);
    std::iota(experts.begin(), experts.end(), 0);
    for (int t = 0; t < s.T; ++t) {
      int32_t* token = &ids[size_t(t) * s.K];
      const int range = s.routes == kSkewed ? std::min(s.E, s.K + t % 2) : s.E;
      for (int k = 0; k < s.K; ++k) {
        std::swap(experts[k], experts[k + random() % (range - k)]);
        token[k] = experts[k];
        if (s.routes == kSparse && random() % 8 != 0) token[k] = -1;
        if (s.routes == kWild) token[k] = int(random() % (s.E + 8)) - 4;
      }
      if (s.routes != kUniform) continue;
      if (random() % 17 == 3) token[0] = -1;
      if (random() % 19 == 5 && s.K > 1) token[1] = token[0];
      if (random() % 23 == 7) token[random() % s.K] = random() % 2 ? s.E + 3 : -1000000;
    }
    return ids;
  }

  int Capacity(const std::vector<std::vector<int32_t>>& routes) const {
    const bool by_token = s.layout == Layout::kToken;
    const int unit = by_token ? 1 : s.alignment;
    int64_t lossless = int64_t{s.R} * s.T;
    if (!by_token) {
      lossless *= std::min(s.K, L);
      lossless += std::min<int64_t>(L, lossless) * (unit - 1);
      lossless = (lossless + unit - 1) / unit * unit;
    }
    if (s.room == kLossless) return int(lossless);
    std::vector<int64_t> demand(s.E, 0), tokens(s.R, 0);
    std::vector<int32_t> clean(s.K);
    for (const std::vector<int32_t>& ids : routes) {
      for (int t = 0; t < s.T; ++t) {
        plan::SanitizeToken(&ids[size_t(t) * s.K], s.K, s.E, clean.data());
        std::vector<bool> there(s.R, false);
        for (const int id : clean) {
          if (id < 0) continue;
          ++demand[id];
          if (!there[id / L]) ++tokens[id / L];
          there[id / L] = true;
        }
      }
    }
    int64_t most = 0;
    for (int r = 0; r < s.R; ++r) {
      int64_t rows = by_token ? tokens[r] : 0;
      for (int l = 0; l < L && !by_token; ++l) rows += (demand[r * L + l] + unit - 1) / unit * unit;
      most = std::max(most, rows);
    }
    if (s.room == kHalf) most = (most / 2 + unit - 1) / unit * unit;
    return int(std::max<int64_t>(most, unit));
  }

  cuda::PlanParams Params(int r, int variant) const {
    int32_t* b = results[r];
    const std::vector<int>& o = offsets;
    int32_t* topk = b + o[0];
    cuda::PlanParams p{group->params[r],
                       s.layout,
                       s.T,
                       s.K,
                       s.E,
                       C,
                       s.alignment,
                       s.expert_capacity,
                       topk_idx[variant * s.R + r],
                       topk,
                       topk,
                       b + o[1],
                       b + o[2],
                       b + o[3],
                       b + o[4],
                       b + o[5],
                       b + o[6],
                       b + o[7],
                       b + o[8],
                       b + o[9],
                       scratch[r]};
    p.group.tag = tag;
    return p;
  }
  void Launch(int r, int variant, PlanKernel kernel) const {
    CHECK_CUDA(cuda::LaunchPlan(Params(r, variant), kernel, group->streams[r]));
  }
  bool Fits(PlanKernel kernel) const {
    const cuda::PlanParams p = Params(0, 0);
    if (kernel == PlanKernel::kPush) return cuda::FitsPushPlan(p);
    // If the blocks of all ranks cannot run at once, they wait for each other without end.
    return cuda::FitsPullPlan(p) && s.R * std::min((s.T + 127) / 128, 32) <= 128;
  }
  // Runs all ranks, and compares with the right results.
  void Check(int variant, PlanKernel kernel, std::mt19937& random) const {
    for (int r = 0; r < s.R; ++r) {
      const cudaStream_t stream = group->streams[r];
      CHECK_CUDA(cudaMemsetAsync(results[r], 0xAB, total * 4, stream));
      if (random() % 3 == 0) Spin<<<1, 1, 0, stream>>>(random() % 20000);
      Launch(r, variant, kernel);
      CompareWords<<<8, 256, 0, stream>>>(results[r], expected[variant * s.R + r], total, wrong[r]);
      CHECK_CUDA(cudaGetLastError());
    }
  }
  void Report(const char* kernels) const {
    for (int r = 0; r < s.R; ++r) {
      unsigned int counts[2];
      CHECK_CUDA(cudaMemcpy(counts, wrong[r], sizeof(counts), cudaMemcpyDeviceToHost));
      if (counts[0] == 0) continue;
      ++num_wrong;
      int array = 0;
      while (array + 1 < int(offsets.size()) && int(counts[1]) >= offsets[array + 1]) ++array;
      std::printf("WRONG (%s) rank %d: %u words, first %s[%d]\n", kernels, r, counts[0],
                  kArrays[array], int(counts[1]) - offsets[array]);
      Print("");
    }
  }
  void Print(const char* end) const {
    std::printf("  R=%d T=%d K=%d E=%d %s A=%d C=%d room=%d routes=%d cap=%d shift=%d %s\n", s.R,
                s.T, s.K, s.E, s.layout == Layout::kToken ? "token" : "expert", s.alignment, C,
                s.room, s.routes, s.expert_capacity, s.shift, end);
  }
};

}  // namespace plan_test
