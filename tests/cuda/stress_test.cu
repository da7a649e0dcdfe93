// Thousands of steps of plan, dispatch and combine. Everything changes from step to step and is
// overwritten in place as soon as an op has ended. The results are checked on the device.
//
//   stress_test [layout=expert|token] [plan=push|pull] [ranks=2] [tokens=64] [steps=500]
//               [hidden=256] [blocks=8] [timeout=5] [behind=0|1]
//
// With behind=1, a step makes its plan once, and once more with the dispatch launched behind it.
//
// Rows are stamped with (step, rank, token); outputs hold poison before each op. Built with
// JAX_EP_TEST_DELAYS, blocks wait at random; built with JAX_EP_MUTATION=n, one wait is missing, and
// the test must fail (tests/cuda/mutations.sh).

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "check_cuda.h"
#include "cuda/node/combine.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "plan/routing.h"

namespace {

using namespace jax_ep;  // NOLINT: a test program
using plan::Layout;

constexpr int kTopK = 4;

struct Shape {
  int ranks, tokens, experts, hidden, capacity;
  Layout layout;
  __host__ __device__ int NumLocal() const { return experts / ranks; }
};

__device__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 2146121005u;
  x ^= x >> 15;
  x *= 2221713035u;
  return x ^ x >> 16;
}

// The expert of an entry at a step, or -1. All ranks can compute it without communication.
__device__ int32_t Route(const Shape& s, int step, int rank, int token, int k) {
  const uint32_t x = Mix(step * 7919u + (rank * s.tokens + token) * 104729u);
  if (Mix(x + k) % 8 == 0) return -1;
  return static_cast<int32_t>((x + k * (1 + x / 64 % 3)) % s.experts);  // distinct, as 3 K < E
}

__device__ float Stamp(const Shape& s, int step, int rank, int token) {
  return static_cast<float>(step % 512 * s.ranks * s.tokens + rank * s.tokens + token + 1);
}

// Overwrites this rank's inputs with those of a step, and its outputs with poison.
__global__ void Begin(Shape s, int step, int rank, int32_t* topk_idx, float* x, float* rows,
                      float* y, int32_t* recv_src) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int num_threads = gridDim.x * blockDim.x;
  for (int i = thread; i < s.tokens * kTopK; i += num_threads) {
    topk_idx[i] = Route(s, step, rank, i / kTopK, i % kTopK);
  }
  for (int i = thread; i < s.tokens * s.hidden; i += num_threads) {
    x[i] = Stamp(s, step, rank, i / s.hidden);
    y[i] = -1.0f;
  }
  for (int i = thread; i < s.capacity * s.hidden; i += num_threads) rows[i] = -1.0f;
  for (int i = thread; i < s.capacity; i += num_threads) recv_src[i] = -7;
}

__device__ void Expect(bool holds, int what, int* wrong /*[4]*/) {
  if (!holds) atomicAdd(&wrong[what], 1);
}

// Checks that rows hold the stamps of the sources that the routes name.
__global__ void CheckRows(Shape s, int step, int rank, const float* rows, const int32_t* recv_src,
                          const int32_t* counts, int* wrong) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int num_threads = gridDim.x * blockDim.x;
  const bool by_expert = s.layout == Layout::kExpert;
  for (int i = thread; i < s.capacity * s.hidden; i += num_threads) {
    const int32_t encoded = recv_src[i / s.hidden];
    if (encoded < 0) {
      Expect(rows[i] == 0.0f && encoded == -1, 0, wrong);
      continue;
    }
    const plan::Source source = plan::DecodeSource(s.layout, encoded, s.tokens, kTopK);
    Expect(rows[i] == Stamp(s, step, source.rank, source.token), 1, wrong);
    if (i % s.hidden != 0) continue;
    bool is_mine = false;
    for (int k = 0; k < kTopK; ++k) {
      const int32_t expert = Route(s, step, source.rank, source.token, k);
      is_mine = is_mine ||
                ((!by_expert || k == source.k) && expert >= 0 && expert / s.NumLocal() == rank);
    }
    Expect(is_mine, 2, wrong);
  }
  // Checks the number of rows of each local expert.
  for (int l = thread; l < s.NumLocal(); l += num_threads) {
    int count = 0;
    for (int i = 0; i < s.ranks * s.tokens * kTopK; ++i) {
      count += Route(s, step, i / kTopK / s.tokens, i / kTopK % s.tokens, i % kTopK) ==
               rank * s.NumLocal() + l;
    }
    Expect(counts[l] == count, 2, wrong);
  }
}

// Checks that every token comes home once for each entry (layout "token": each rank) that it went
// to.
__global__ void CheckY(Shape s, int step, int rank, const float* y, int* wrong) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = thread; i < s.tokens * s.hidden; i += gridDim.x * blockDim.x) {
    const int token = i / s.hidden;
    uint32_t ranks = 0;
    int entries = 0;
    for (int k = 0; k < kTopK; ++k) {
      const int32_t expert = Route(s, step, rank, token, k);
      if (expert < 0) continue;
      ++entries;
      ranks |= 1u << (expert / s.NumLocal());
    }
    const int times = s.layout == Layout::kExpert ? entries : __popc(ranks);
    Expect(y[i] == times * Stamp(s, step, rank, token), 3, wrong);
  }
}

template <typename T>
T* Allocate(size_t count) {
  T* memory = nullptr;
  CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&memory), count * sizeof(T)));
  FillDevice(memory, 0, count * sizeof(T));
  return memory;
}

struct Rank {
  int device;
  cudaStream_t stream;
  cuda::GroupParams group{};
  int32_t *topk_idx, *topk, *dest_row, *recv_rows, *recv_src, *expert_idx, *group_sizes, *counts,
      *demand, *num_dropped, *num_invalid, *scratch;
  float *x, *rows, *y;
  int* wrong;
};

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    given[argument.substr(0, argument.find('='))] = argument.substr(argument.find('=') + 1);
  }
  const auto number = [&](const char* name, int fallback) {
    return given.count(name) != 0 ? std::atoi(given[name].c_str()) : fallback;
  };
  Shape s{};
  s.ranks = number("ranks", 2);
  s.tokens = number("tokens", 64);
  s.experts = 16 * s.ranks;
  s.hidden = number("hidden", 256);
  s.layout = given["layout"] == "token" ? Layout::kToken : Layout::kExpert;
  s.capacity = s.ranks * s.tokens * (s.layout == Layout::kExpert ? kTopK : 1);
  const int steps = number("steps", 500), blocks = number("blocks", 8);
  const bool behind = number("behind", 0) != 0;
  const int num_rows = plan::RowsPerSource(s.layout, kTopK, s.NumLocal());
  const cuda::PlanKernel kernel =
      given["plan"] == "pull" ? cuda::PlanKernel::kPull : cuda::PlanKernel::kPush;
  int num_devices = 0;
  CHECK_CUDA(cudaGetDeviceCount(&num_devices));
  std::vector<Rank> ranks(s.ranks);
  for (int r = 0; r < s.ranks; ++r) {
    Rank& k = ranks[r];
    k.device = r % num_devices;
    CHECK_CUDA(cudaSetDevice(k.device));
    for (int peer = 0; peer < num_devices; ++peer) {
      if (peer != k.device && cudaDeviceEnablePeerAccess(peer, 0) != cudaSuccess)
        cudaGetLastError();
    }
    CHECK_CUDA(cudaStreamCreateWithFlags(&k.stream, cudaStreamNonBlocking));
    for (const cudaError_t error : {cuda::LoadPlan(), cuda::LoadDispatch(), cuda::LoadCombine()}) {
      CHECK_CUDA(error);
    }
    const size_t T = s.tokens, C = s.capacity;
    for (int32_t** ids : {&k.topk_idx, &k.topk, &k.dest_row}) *ids = Allocate<int32_t>(T * kTopK);
    k.recv_rows = Allocate<int32_t>(s.ranks * T * num_rows);
    k.recv_src = Allocate<int32_t>(C);
    k.expert_idx = Allocate<int32_t>(C * kTopK);
    for (int32_t** counts : {&k.group_sizes, &k.counts, &k.demand, &k.num_dropped, &k.num_invalid})
      *counts = Allocate<int32_t>(s.experts);
    k.scratch = Allocate<int32_t>(32 * (s.experts + s.ranks + 1));
    k.x = Allocate<float>(T * s.hidden);
    k.y = Allocate<float>(T * s.hidden);
    k.rows = Allocate<float>(C * s.hidden);
    k.wrong = Allocate<int>(4);
    k.group.peers[r] = Allocate<cuda::Channel>(1);
    CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&k.group.error), sizeof(cuda::ErrorRecord),
                             cudaHostAllocPortable | cudaHostAllocMapped));
    std::memset(k.group.error, 0, sizeof(cuda::ErrorRecord));
    k.group.rank = r;
    k.group.num_ranks = s.ranks;
    k.group.num_channels = 1;
    k.group.arrival_timeout_ns = k.group.op_timeout_ns =
        number("timeout", 5) * uint64_t{1'000'000'000};
    // Every address is valid everywhere, as transport/peer_access.h says.
    std::vector<cuda::Region> regions(size_t(s.ranks) * cuda::kMaxRegions);
    for (size_t i = 0; i < regions.size(); ++i) {
      constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
      regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
    }
    CHECK_CUDA(cudaMemcpy(k.group.peers[r]->regions, regions.data(),
                          regions.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  for (Rank& k : ranks) {
    for (int r = 0; r < s.ranks; ++r) k.group.peers[r] = ranks[r].group.peers[r];
  }
  // Loading a kernel may wait for a running kernel, which would wait for the new one.
  for (Rank& k : ranks) {
    Shape nothing = s;
    nothing.tokens = nothing.capacity = 0;
    CHECK_CUDA(cudaSetDevice(k.device));
    Begin<<<1, 32, 0, k.stream>>>(nothing, 0, 0, k.topk_idx, k.x, k.rows, k.y, k.recv_src);
    CheckRows<<<1, 32, 0, k.stream>>>(nothing, 0, 0, k.rows, k.recv_src, k.counts, k.wrong);
    CheckY<<<1, 32, 0, k.stream>>>(nothing, 0, 0, k.y, k.wrong);
    CHECK_CUDA(cudaMemsetAsync(k.x, 0xff, 16, k.stream));
    CHECK_CUDA(cudaStreamSynchronize(k.stream));
    FillDevice(k.wrong, 0, 4 * sizeof(int));
  }
  const auto run = [&](int r) {
    Rank& k = ranks[r];
    CHECK_CUDA(cudaSetDevice(k.device));
    cuda::GroupParams group = k.group;
    for (int step = 0; step < steps; ++step) {
      Begin<<<8, 256, 0, k.stream>>>(s, step, r, k.topk_idx, k.x, k.rows, k.y, k.recv_src);
      group.op = cuda::OpKind::kPlan;
      group.tag = 1;
      const cuda::PlanParams plan_params{group,
                                         s.layout,
                                         s.tokens,
                                         kTopK,
                                         s.experts,
                                         s.capacity,
                                         1,
                                         std::numeric_limits<int32_t>::max(),
                                         k.topk_idx,
                                         k.topk,
                                         k.topk,
                                         k.dest_row,
                                         k.recv_rows,
                                         k.recv_src,
                                         k.expert_idx,
                                         k.group_sizes,
                                         k.counts,
                                         k.demand,
                                         k.num_dropped,
                                         k.num_invalid,
                                         k.scratch};
      CHECK_CUDA(cuda::LaunchPlan(plan_params, kernel, k.stream));
      if (behind) {
        cuda::PlanParams followed = plan_params;
        followed.group.tag = 4;
        followed.is_followed = true;
        CHECK_CUDA(cudaMemsetAsync(k.recv_src, 0xab, s.capacity * sizeof(int32_t), k.stream));
        CHECK_CUDA(cuda::LaunchPlan(followed, kernel, k.stream));
      }
      group.op = cuda::OpKind::kDispatch;
      group.tag = 2;
      const int32_t row_bytes = s.hidden * 4;
      const cuda::DispatchParams dispatch_params{
          group,        s.layout,  s.tokens,  kTopK,       s.capacity,
          num_rows,     row_bytes, row_bytes, 0,           false,
          k.x,          nullptr,   nullptr,   k.recv_rows, k.recv_src,
          k.expert_idx, k.rows,    nullptr,   nullptr,     blocks,
          behind,       4};
      CHECK_CUDA(cuda::LaunchDispatch(dispatch_params, k.stream));
      // Like a donated input: no peer may read it any more.
      CHECK_CUDA(cudaMemsetAsync(k.x, 0xff, size_t(s.tokens) * row_bytes, k.stream));
      CheckRows<<<8, 256, 0, k.stream>>>(s, step, r, k.rows, k.recv_src, k.counts, k.wrong);
      group.op = cuda::OpKind::kCombine;
      group.tag = 3;
      const cuda::CombineParams combine_params{group,      s.layout,   cuda::RowType::kFloat32,
                                               s.tokens,   kTopK,      s.experts,
                                               s.capacity, num_rows,   s.hidden,
                                               k.rows,     nullptr,    nullptr,
                                               k.topk,     k.dest_row, k.recv_rows,
                                               k.y,        nullptr,    blocks};
      CHECK_CUDA(cuda::LaunchCombine(combine_params, k.stream));
      CHECK_CUDA(cudaMemsetAsync(k.rows, 0xff, size_t(s.capacity) * row_bytes, k.stream));
      CheckY<<<8, 256, 0, k.stream>>>(s, step, r, k.y, k.wrong);
    }
    CHECK_CUDA(cudaStreamSynchronize(k.stream));
  };
  std::vector<std::thread> threads;
  for (int r = 0; r < s.ranks; ++r) threads.emplace_back(run, r);
  for (std::thread& thread : threads) thread.join();
  int total = 0;
  for (int r = 0; r < s.ranks; ++r) {
    const Rank& k = ranks[r];
    int wrong[4];
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cudaMemcpy(wrong, k.wrong, sizeof(wrong), cudaMemcpyDeviceToHost));
    const bool failed = k.group.error->set != 0;
    total += wrong[0] + wrong[1] + wrong[2] + wrong[3] + failed;
    if (wrong[0] + wrong[1] + wrong[2] + wrong[3] + failed == 0) continue;
    if (failed) {
      const cuda::ErrorRecord& e = *k.group.error;
      std::printf("rank %d: kind %u peer %u op %u word %u expected %llx seen %llx\n", r, e.kind,
                  e.peer, e.op, e.word, (unsigned long long)e.expected, (unsigned long long)e.seen);
    }
    std::printf("rank %d: wrong: %d unused rows, %d rows, %d routes, %d results; %s\n", r, wrong[0],
                wrong[1], wrong[2], wrong[3], failed ? "the group failed" : "no failure");
  }
  std::printf(total == 0 ? "%d steps: all right\n" : "%d steps: WRONG\n", steps);
  return total == 0 ? 0 : 1;
}
