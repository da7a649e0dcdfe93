// Runs the plan's kernels without XLA, bit by bit against the CPU's plan, on one GPU: each rank has
// a stream. For development and for compute-sanitizer.
//
//   plan_test [check=1] [time=1] [failures=1] [repeat=200 (plans of each shape)] [max_ranks=32]
//             [small=0|1 (few tokens only)] [seed=1]
//
// Plans of two shapes, of both kernels, and another op follow each other in random order, with
// random delays and without waiting for the host. Every result is compared, on the GPU.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/plan.h"
#include "cuda/plan_common.cuh"
#include "cuda/sync.cuh"
#include "plan/build_plan.h"

#define CHECK_CUDA(call)                                                                          \
  do {                                                                                            \
    const cudaError_t check_error = (call);                                                       \
    if (check_error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(check_error)); \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (false)

#ifdef JAX_EP_PLAN_STAMPS
namespace jax_ep::cuda {
cudaError_t ReadPlanStamps(int64_t (&stamps)[8][16]);
}
#endif

namespace {

using namespace jax_ep;  // NOLINT: a test program
using cuda::PlanKernel;
using plan::Layout;

int num_wrong = 0;
std::map<std::string, int> options = {{"check", 1}, {"time", 1}, {"failures", 1},  {"repeat", 200},
                                      {"small", 0}, {"seed", 1}, {"max_ranks", 32}};

__global__ void Spin(uint64_t ns) {
  const uint64_t begin = cuda::ptx::GlobalTimer();
  while (cuda::ptx::GlobalTimer() - begin < ns) {
  }
}

// wrong: how many words, and the lowest of them.
__global__ void CompareWords(const int32_t* got, const int32_t* expected, int count,
                             unsigned int* wrong) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    if (got[i] == expected[i]) continue;
    atomicAdd(&wrong[0], 1u);
    atomicMin(&wrong[1], static_cast<unsigned int>(i));
  }
}

// An op of the usual kind: peers read an address, and all wait until that is done.
__global__ void OtherOp(cuda::GroupParams group, const int32_t* input, int32_t* sink) {
  __shared__ cuda::PeerInputs inputs;
  const uint64_t epoch = cuda::BeginOp(group);
  if (blockIdx.x == 0) cuda::Publish(group, epoch, {input, nullptr, nullptr});
  if (cuda::WaitInputs(group, epoch, inputs) && threadIdx.x < group.num_ranks) {
    *sink = inputs.Of<int32_t>(threadIdx.x, 0)[0];
  }
  cuda::EndOp(group, epoch);
}

// Ranks whose clusters this GPU can hold at once.
__global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(1024, 1) Cluster() {}
int MaxClusters() {
  cudaLaunchConfig_t config{};
  config.gridDim = 8;
  config.blockDim = 1024;
  config.dynamicSmemBytes = 200 << 10;
  CHECK_CUDA(cudaFuncSetAttribute(Cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
  int count = 0;
  CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, Cluster, &config));
  return count;
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
    std::vector<cuda::Workspace*> workspaces(num_ranks);
    for (int r = 0; r < num_ranks; ++r) {
      CHECK_CUDA(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
      workspaces[r] = Allocate<cuda::Workspace>(1);
      CHECK_CUDA(cudaMemset(workspaces[r], 0, sizeof(cuda::Workspace)));
      std::vector<cuda::Region> regions(size_t(num_ranks) * cuda::kMaxRegions);
      for (size_t i = 0; i < regions.size(); ++i) {
        constexpr uint64_t kSize = uint64_t{1} << cuda::kRegionShift;
        regions[i] = {i % cuda::kMaxRegions * kSize, kSize};
      }
      CHECK_CUDA(cudaMemcpy(workspaces[r]->regions, regions.data(),
                            regions.size() * sizeof(cuda::Region), cudaMemcpyHostToDevice));
    }
    for (int r = 0; r < num_ranks; ++r) {
      cuda::GroupParams& group = params[r];
      group = {};
      std::copy(workspaces.begin(), workspaces.end(), group.peers);
      CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&group.error), sizeof(cuda::ErrorRecord),
                               cudaHostAllocMapped));
      *group.error = {};
      group.rank = r;
      group.num_ranks = num_ranks;
      group.arrival_timeout_ns = group.op_timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
      group.op = cuda::OpKind::kPlan;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  // Streams, workspaces and records live until the program ends.

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
      std::printf("FAILED: kind %u rank %u peer %u phase %u expected %llx seen %llx\n",
                  group.error->kind, group.error->rank, group.error->peer, group.error->phase,
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

// A shape with its routes, and what should come of them.
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
    // Where all blocks of all ranks are not there at once, they wait for each other for ever.
    return cuda::FitsPullPlan(p) && s.R * std::min((s.T + 127) / 128, 32) <= 128;
  }
  // All ranks, compared with what should come.
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

std::vector<Shape> Shapes() {
  constexpr Layout kE = Layout::kExpert, kT = Layout::kToken;
  std::vector<Shape> shapes = {
      {1, 1, 1, 1, kE, 1},
      {1, 7, 2, 4, kT, 1, kHalf},
      {1, 333, 8, 300, kE, 16},
      {1, 64, 8, 4096, kE, 1},
      {2, 1, 1, 2, kT},
      {2, 5, 3, 8, kE, 8, kLossless, kWild},
      {2, 128, 8, 256, kE, 128, kLossless},
      {2, 131, 8, 256, kT, 1, kHalf},
      {2, 100, 6, 20, kE, 4, kHalf, kSkewed},
      {2, 257, 9, 64, kE, 32, kExact, kWild},
      {2, 61, 32, 64, kE, 1, kHalf},
      {2, 61, 32, 64, kT, 1, kHalf, kSkewed},
      {2, 300, 17, 600, kE, 1, kExact, kUniform, 3},
      {2, 300, 5, 600, kT, 1, kExact, kWild},
      {2, 200, 1, 2, kE, 128},
      {3, 77, 4, 12, kE, 8, kExact, kUniform, 20, 1},
      {3, 77, 4, 12, kT, 8, kHalf, kSparse, INT32_MAX, 3},
      {3, 1000, 8, 255, kE, 128, kHalf, kSparse},
      {4, 40, 2, 4, kE, 8, kHalf, kWild},
      {4, 40, 2, 4, kT},
      {8, 16, 8, 64, kE, 1, kExact, kSkewed},
      {8, 130, 8, 256, kT, 1, kHalf},
      {8, 128, 8, 256, kE, 128, kLossless},
      {12, 50, 4, 24, kE, 4, kHalf, kWild},
      {12, 50, 4, 24, kT},
      {16, 33, 8, 256, kE, 16},
      {16, 33, 8, 256, kT, 16, kHalf},
  };
  if (options["small"] != 0) return shapes;
  const std::vector<Shape> large = {
      {1, 4096, 8, 256, kE},
      {2, 4096, 8, 256, kE},
      {2, 4096, 8, 256, kT, 1, kHalf},
      {2, 4096, 8, 256, kE, 128, kLossless, kSkewed},
      {2, 4001, 6, 160, kE, 64, kHalf, kWild, INT32_MAX, 1},
      {2, 9000, 8, 64, kE, 128, kExact},
      {2, 4099, 4, 1024, kE, 1},
      {2, 4096, 16, 512, kE, 16},
      {4, 4096, 8, 256, kE, 128, kHalf},
      {4, 4096, 8, 256, kT},
      {8, 4096, 8, 256, kE, 128, kExact},
      {8, 4096, 8, 256, kT, 1, kHalf, kSkewed},
      {8, 2048, 8, 512, kE, 128, kLossless, kWild},
      {12, 2500, 6, 192, kE, 8, kExact},
      {12, 4096, 8, 192, kT, 8, kExact},
  };
  shapes.insert(shapes.end(), large.begin(), large.end());
  std::stable_sort(shapes.begin(), shapes.end(),
                   [](const Shape& a, const Shape& b) { return a.R < b.R; });
  return shapes;
}

void CheckShapes() {
  std::mt19937 random(options["seed"]);
  const int max_ranks = std::min(options["max_ranks"], MaxClusters());
  std::printf("up to %d ranks\n", max_ranks);
  std::map<int, std::unique_ptr<Group>> groups;
  std::unique_ptr<Case> last;
  int number = 0;
  for (const Shape& shape : Shapes()) {
    if (shape.R > max_ranks) continue;
    auto& group = groups[shape.R];
    if (group == nullptr) group = std::make_unique<Group>(shape.R);
    auto now = std::make_unique<Case>(shape, *group, ++number, random);
    int pushed = 0, pulled = 0;
    for (int i = 0; i < options["repeat"]; ++i) {
      const Case& one = last != nullptr && last->s.R == shape.R && random() % 3 == 0 ? *last : *now;
      if (random() % 8 == 0) group->Other();
      const bool can_push = one.Fits(PlanKernel::kPush), can_pull = one.Fits(PlanKernel::kPull);
      if (!can_push && !can_pull) continue;
      const bool pull = can_pull && (!can_push || random() % 4 == 0);
      (pull ? pulled : pushed) += 1;
      one.Check(random() % Case::kVariants, pull ? PlanKernel::kPull : PlanKernel::kPush, random);
    }
    group->Wait();
    const std::string kernels =
        std::to_string(pushed) + " push, " + std::to_string(pulled) + " pull";
    if (last != nullptr) last->Report("before");
    now->Report(kernels.c_str());
    now->Print(kernels.c_str());
    last = std::move(now);
  }
}

// Microseconds of a plan, in a chain of them without gaps from the host.
void Time(const Shape& shape, PlanKernel kernel) {
  constexpr int kChain = 50, kRounds = 7;
  std::mt19937 random(options["seed"]);
  Group group(shape.R);
  const Case one(shape, group, 1, random);
  if (!one.Fits(kernel)) return;
  std::vector<cudaGraphExec_t> graphs(shape.R);
  std::vector<cudaEvent_t> begin(shape.R), end(shape.R);
  for (int r = 0; r < shape.R; ++r) {
    CHECK_CUDA(cudaEventCreate(&begin[r]));
    CHECK_CUDA(cudaEventCreate(&end[r]));
    CHECK_CUDA(cudaStreamBeginCapture(group.streams[r], cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kChain; ++i) one.Launch(r, i % Case::kVariants, kernel);
    cudaGraph_t graph;
    CHECK_CUDA(cudaStreamEndCapture(group.streams[r], &graph));
    CHECK_CUDA(cudaGraphInstantiate(&graphs[r], graph, 0));
    CHECK_CUDA(cudaGraphUpload(graphs[r], group.streams[r]));
  }
  group.Wait();
  std::vector<double> us;
  for (int round = 0; round < kRounds; ++round) {
    for (int r = 0; r < shape.R; ++r) {
      Spin<<<1, 1, 0, group.streams[r]>>>(200000);
      CHECK_CUDA(cudaEventRecord(begin[r], group.streams[r]));
      CHECK_CUDA(cudaGraphLaunch(graphs[r], group.streams[r]));
      CHECK_CUDA(cudaEventRecord(end[r], group.streams[r]));
    }
    group.Wait();
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin[0], end[0]));
    us.push_back(ms * 1e3 / kChain);
  }
  std::sort(us.begin(), us.end());
  std::printf("  R=%d T=%d K=%d E=%d %-6s C=%-6d %s %6.2f us (%.2f to %.2f)\n", shape.R, shape.T,
              shape.K, shape.E, shape.layout == Layout::kToken ? "token" : "expert", one.C,
              kernel == PlanKernel::kPush ? "push" : "pull", us[kRounds / 2], us[0], us.back());
#ifdef JAX_EP_PLAN_STAMPS
  if (kernel != PlanKernel::kPush) return;
  int64_t stamps[8][16];
  CHECK_CUDA(cuda::ReadPlanStamps(stamps));
  for (const int b : {0, 5}) {
    std::printf("    cycles at the end of each step, block %d:", b);
    for (int i = 1; i <= 14; ++i) {
      std::printf(" %d", stamps[b][i] == 0 ? -1 : int(stamps[b][i] - stamps[b][0]));
    }
    std::printf("\n");
  }
#endif
}

// A rank at another op, and one that does not come: errors, not waits for ever.
void CheckFailures() {
  std::mt19937 random(1);
  for (const bool absent : {false, true}) {
    Group group(2, 0.3);
    Case one({2, 500, 8, 256, Layout::kExpert}, group, 1, random);
    Case other({2, 300, 8, 64, Layout::kExpert}, group, 2, random);
    one.Launch(0, 0, PlanKernel::kPush);
    if (!absent) other.Launch(1, 0, PlanKernel::kPush);
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < (absent ? 1 : 2); ++r) {
      const Case& ran = r == 0 ? one : other;
      std::vector<int32_t> results(ran.total);
      CHECK_CUDA(cudaMemcpy(results.data(), ran.results[r], ran.total * 4, cudaMemcpyDeviceToHost));
      const cuda::ErrorRecord& error = *group.params[r].error;
      const auto kind = static_cast<cuda::ErrorKind>(error.kind);
      const bool right =
          error.set == 1 && results[ran.offsets[6]] == -1 &&
          (absent ? kind == cuda::ErrorKind::kTimeout
                  : kind == cuda::ErrorKind::kMismatch || kind == cuda::ErrorKind::kAborted);
      if (!right) ++num_wrong;
      std::printf("  %s, rank %d: kind %u, count %d: %s\n", absent ? "peer absent" : "another op",
                  r, error.kind, results[ran.offsets[6]], right ? "right" : "WRONG");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that wait for each other
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    options[argument.substr(0, equals)] = std::atoi(argument.c_str() + equals + 1);
  }
  CHECK_CUDA(cuda::LoadPlan());
  if (options["time"] != 0) {
    for (const int R : {2, 4, 8}) {
      for (const Layout layout : {Layout::kExpert, Layout::kToken}) {
        for (const PlanKernel kernel : {PlanKernel::kPush, PlanKernel::kPull}) {
          Time({R, 4096, 8, 256, layout}, kernel);
        }
      }
    }
    for (const PlanKernel kernel : {PlanKernel::kPush, PlanKernel::kPull}) {
      Time({2, 4096, 8, 256, Layout::kExpert, 128, kLossless}, kernel);
      Time({2, 128, 8, 256, Layout::kExpert, 128, kLossless}, kernel);
      Time({2, 8192, 8, 256, Layout::kExpert}, kernel);
      Time({1, 4096, 8, 256, Layout::kExpert}, kernel);
    }
  }
  if (options["check"] != 0) CheckShapes();
  if (options["failures"] != 0) CheckFailures();
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
