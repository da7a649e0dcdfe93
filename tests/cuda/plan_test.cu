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
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "phases.cuh"
#include "plan_case.cuh"

namespace {

using namespace plan_test;  // NOLINT

std::map<std::string, int> options = {{"check", 1}, {"time", 1}, {"failures", 1},  {"repeat", 200},
                                      {"small", 0}, {"seed", 1}, {"max_ranks", 32}};

// The number of ranks whose clusters this GPU can run at once.
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

#ifdef JAX_EP_CLOCK_STAMPS
// When the last warp of a block has passed each phase of the plan that pushes: means over ops.
void PrintPhases(const std::vector<StampedOp>& ops) {
  for (const int block : {0, 5}) {
    std::printf("    us from the launch at the end of each phase, block %d:", block);
    for (int phase = 1; phase < cuda::kStampedPhases; ++phase) {
      double sum = 0;
      int count = 0;
      for (const StampedOp& op : ops) {
        const PhaseOfOp::OfBlock* passed = op.phases[phase].Of(block);
        if (passed == nullptr) continue;
        sum += static_cast<double>(passed->last - op.phases[0].Of(block)->first) / 1e3;
        ++count;
      }
      if (count != 0) std::printf(" %d: %.2f", phase, sum / count);
    }
    std::printf("\n");
  }
}
#endif

// Microseconds of a plan, in a chain of them without gaps from the host.
void Time(const Shape& shape, PlanKernel kernel) {
  constexpr int kChain = 50, kRounds = 7;
  std::mt19937 random(options["seed"]);
  Group group(shape.R);
#ifdef JAX_EP_CLOCK_STAMPS
  cuda::ClockStamps* const stamps = MakeStamps();
  group.params[0].stamps = stamps;
#endif
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
#ifdef JAX_EP_CLOCK_STAMPS
    FillDevice(stamps, 0, sizeof(*stamps));  // those of the last round stay
    CHECK_CUDA(cudaDeviceSynchronize());
#endif
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
#ifdef JAX_EP_CLOCK_STAMPS
  if (kernel == PlanKernel::kPush) PrintPhases(ReadStamps(stamps));
  CHECK_CUDA(cudaFree(stamps));
#endif
}

// Whether rank r of `ran` failed in one of these ways, and its results say so.
void CheckFailed(const char* what, const Group& group, const Case& ran, int r,
                 std::vector<cuda::ErrorKind> kinds) {
  int32_t count;
  CHECK_CUDA(cudaMemcpy(&count, ran.results[r] + ran.offsets[6], sizeof(count), cudaMemcpyDefault));
  const cuda::ErrorRecord& error = *group.params[r].error;
  const auto kind = static_cast<cuda::ErrorKind>(error.kind);
  const bool right =
      error.set == 1 && count == -1 && std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  if (!right) ++num_wrong;
  std::printf("  %s, rank %d: kind %u, count %d: %s\n", what, r, error.kind, count,
              right ? "right" : "WRONG");
}

// A rank is at another op or does not come: errors, and no endless waits.
void CheckFailures() {
  using Kind = cuda::ErrorKind;
  constexpr double kLong = 60;  // seconds, longer than anything here takes, also in emulated time
  std::mt19937 random(1);
  const Shape shape{2, 500, 8, 256, Layout::kExpert};
  // The last rank has all messages that it waits for, from a peer that waits for more.
  for (const Shape& another :
       {Shape{2, 300, 8, 64, Layout::kExpert}, Shape{2, 4096, 8, 256, Layout::kExpert}}) {
    Group group(2, kLong);
    Case one(shape, group, 1, random), other(another, group, 2, random);
    one.Launch(0, 0, PlanKernel::kPush);
    other.Launch(1, 0, PlanKernel::kPush);
    CHECK_CUDA(cudaDeviceSynchronize());
    CheckFailed("another op", group, one, 0, {Kind::kMismatch, Kind::kAborted});
    CheckFailed("another op", group, other, 1, {Kind::kMismatch, Kind::kAborted});
  }
  for (const PlanKernel kernel : {PlanKernel::kPush, PlanKernel::kPull}) {
    {
      Group group(2, 0.3);
      Case one(shape, group, 1, random);
      one.Launch(0, 0, kernel);
      CHECK_CUDA(cudaDeviceSynchronize());
      CheckFailed("peer absent", group, one, 0, {Kind::kTimeout});
    }
    {  // although its peer does all that it waits for
      Group group(2, kLong);
      Case one(shape, group, 1, random);
      FillDevice(&group.params[0].peers[0]->failed, 1, 1);
      CHECK_CUDA(cudaDeviceSynchronize());  // streams do not wait for it
      for (int r = 0; r < 2; ++r) one.Launch(r, 0, kernel);
      CHECK_CUDA(cudaDeviceSynchronize());
      CheckFailed("failed before", group, one, 0, {Kind::kAborted});
    }
    {
      Group group(2, kLong);
      int32_t* coords = Allocate<int32_t>(2);
      FillDevice(coords, 0, 2 * sizeof(int32_t));
      CHECK_CUDA(cudaDeviceSynchronize());
      for (cuda::GroupParams& params : group.params) params.coords = coords;
      Case one(shape, group, 1, random);
      for (int r = 0; r < 2; ++r) one.Launch(r, 0, kernel);
      CHECK_CUDA(cudaDeviceSynchronize());
      CheckFailed("rank 0 elsewhere", group, one, 1, {Kind::kMisplaced});
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
