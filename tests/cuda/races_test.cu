// Races that a delay at the right place brings to light. In most, a rank fails and its peers may or
// may not notice in time. Their results must be right in both cases.
//
//   races_test race=close|reuse|wrap [tries=20] and what kernels_test takes for its workload
//
//   close  Rank 0 gives up its wait for the peers' end at once, and its inputs are overwritten. A
//          peer has either the right rows and no record of a failure, or poison and a record.
//   reuse  Rank 1 finds that it is misplaced and ends. Then its counts for its peers' plans are
//          overwritten, while rank 2 keeps these plans from going on. They must not write outside
//          their own memory.
//   wrap   No rank fails. Between two dispatches that read different buffers there are 65535 ops
//          that publish no address, so the lower 16 bits of the epoch are the same again. Built
//          with JAX_EP_TEST_DELAYS, addresses may come after the arrival flag.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/core/ptx.cuh"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "outcome.cuh"

namespace {

constexpr uint64_t kLong = 5'000'000'000;  // ns
constexpr size_t kGuard = 4096;            // elements after a result that nobody may write

__global__ void Spin(uint64_t ns) {
  const uint64_t begin = cuda::ptx::GlobalTimer();
  while (cuda::ptx::GlobalTimer() - begin < ns) {
  }
}

void Synchronize(std::vector<Rank>& ranks) {
  for (Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cudaStreamSynchronize(k.stream));
  }
}

// Resets the group to its first state.
void Reset(std::vector<Rank>& ranks) {
  for (Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    std::vector<cuda::Region> regions(cuda::kMaxRanks * cuda::kMaxRegions);
    const size_t size = regions.size() * sizeof(regions[0]);
    CHECK_CUDA(cudaMemcpy(regions.data(), k.channel->regions, size, cudaMemcpyDeviceToHost));
    FillDevice(k.channel, 0, sizeof(cuda::Channel));
    CHECK_CUDA(cudaMemcpy(k.channel->regions, regions.data(), size, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::memset(k.error, 0, sizeof(*k.error));
    k.group.op_timeout_ns = kLong;
    k.group.coords = nullptr;
  }
}

void LaunchPlans(const Workload& w, std::vector<Rank>& ranks) {
  for (Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cuda::LaunchPlan(PlanParamsOf(w, k), cuda::PlanKernel::kPull, k.stream));
  }
}

// Which read copy `launch` of x.
void LaunchDispatches(const Workload& w, std::vector<Rank>& ranks, int launch = 0) {
  for (Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cudaMemsetAsync(k.rows.device, 0, k.rows.host.size(), k.stream));
    CHECK_CUDA(cuda::LaunchDispatch(DispatchParamsOf(w, k, launch), k.stream));
  }
}

void RaceForTheClose(const Workload& w, std::vector<Rank>& ranks) {
  LaunchPlans(w, ranks);
  Synchronize(ranks);
  LaunchDispatches(w, ranks);
  Synchronize(ranks);
  std::vector<std::vector<char>> rows;
  for (Rank& k : ranks) rows.push_back(k.rows.FromDevice());

  Rank& hasty = ranks[0];
  hasty.group.op_timeout_ns = 1;
  LaunchDispatches(w, ranks);
  CHECK_CUDA(cudaSetDevice(hasty.device));
  CHECK_CUDA(cudaMemsetAsync(hasty.x.device, 0x77, hasty.x.host.size(), hasty.stream));
  Synchronize(ranks);
  hasty.x.ToDevice();
  for (Rank& k : ranks) {
    const int r = k.group.rank;
    if (r == hasty.group.rank) continue;
    const std::vector<char> got = k.rows.FromDevice();
    const auto is_poison = [](char byte) { return static_cast<unsigned char>(byte) == 0xff; };
    if (k.error->set != 0) {
      Expect(std::all_of(got.begin(), got.end(), is_poison), r, "a record and no poison");
    } else {
      Expect(got == rows[r], r, "neither a record nor the right rows");
    }
  }
}

void RaceForReuse(const Workload& w, std::vector<Rank>& ranks, const int32_t* wrong_coords,
                  std::mt19937& generator) {
  ranks[1].group.coords = wrong_coords;
  for (Rank& k : ranks) {
    const int r = k.group.rank;
    CHECK_CUDA(cudaSetDevice(k.device));
    CHECK_CUDA(cudaMemsetAsync(k.recv_src.device, 0xab, k.recv_src.host.size() * 4, k.stream));
    if (r == 2) Spin<<<1, 1, 0, k.stream>>>(generator() % 20'000'000);
    CHECK_CUDA(cuda::LaunchPlan(PlanParamsOf(w, k), cuda::PlanKernel::kPull, k.stream));
    if (r != 1) continue;
    CHECK_CUDA(cudaMemsetAsync(k.scratch.device, 0x80, k.scratch.host.size() * 4, k.stream));
  }
  Synchronize(ranks);
  for (Rank& k : ranks) {
    const std::vector<int32_t> got = k.recv_src.FromDevice();
    Expect(std::all_of(got.end() - kGuard, got.end(),
                       [](int32_t source) { return source == int32_t(0xabababab); }),
           k.group.rank, "written past the end");
  }
}

// Sets the epoch of the op that ended last.
void SetEpoch(Rank& k, uint64_t epoch) {
  CHECK_CUDA(cudaSetDevice(k.device));
  CHECK_CUDA(cudaMemcpy(&k.channel->last.epoch, &epoch, sizeof(epoch), cudaMemcpyHostToDevice));
  CHECK_CUDA(cudaDeviceSynchronize());
}

void RaceForTheAddress(const Workload& w, std::vector<Rank>& ranks, uint64_t first_epoch) {
  for (Rank& k : ranks) SetEpoch(k, first_epoch);
  LaunchPlans(w, ranks);
  Synchronize(ranks);
  LaunchDispatches(w, ranks, 0);
  Synchronize(ranks);
  std::vector<std::vector<char>> rows;
  for (Rank& k : ranks) {
    rows.push_back(k.rows.FromDevice());
    SetEpoch(k, first_epoch + 2 + 65535);
    FillDevice(k.x.Of(0), 0x77, k.x.host.size());
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  LaunchDispatches(w, ranks, 1);
  Synchronize(ranks);
  for (Rank& k : ranks) {
    k.x.ToDevice();
    Expect(k.error->set == 0, k.group.rank, "a failure");
    Expect(k.rows.FromDevice() == rows[k.group.rank], k.group.rank, "rows of the old buffer");
  }
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that wait for each other
  const Options options(argc, argv);
  Workload w(options);
  const std::string race = options.Text("race", "close");
  if (race == "reuse" && w.R < 3) {
    std::printf("race=reuse: expected 3 ranks or more\n");
    return 2;
  }
  std::mt19937 generator(options.Int("seed", 1));
  std::vector<Rank> ranks = MakeRanks(w, generator);
  if (w.C == 0) w.C = NeededCapacity(w, ranks);
  Prepare(w, options, ranks, generator);
  CHECK_CUDA(cudaSetDevice(ranks[1].device));
  Buffer<int32_t> wrong_coords;
  wrong_coords.Resize(2);
  wrong_coords.host = {5, 5};
  wrong_coords.ToDevice();
  for (Rank& k : ranks) {
    CHECK_CUDA(cudaSetDevice(k.device));
    k.recv_src.Resize(k.recv_src.host.size() + kGuard);
    k.x.MakeCopies(2);
    Spin<<<1, 1, 0, k.stream>>>(1);  // loads it before kernels wait for each other
  }
  Synchronize(ranks);
  for (int i = 0; i < options.Int("tries", 20) && num_wrong == 0; ++i) {
    Reset(ranks);
    if (race == "wrap") {
      RaceForTheAddress(w, ranks, i);
    } else if (race == "reuse") {
      RaceForReuse(w, ranks, wrong_coords.device, generator);
    } else {
      RaceForTheClose(w, ranks);
    }
  }
  std::printf(num_wrong == 0 ? "all right\n" : "%d WRONG\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
