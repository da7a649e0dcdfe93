#include "transport/copy_rate.h"

#include <cuda_runtime_api.h>

#include "transport/cuda_status.h"

namespace jax_ep::transport {
namespace {

cudaError_t Start(const cuda::CopyParams& params, cuda::Mover mover, cudaStream_t stream) {
  if (mover != cuda::Mover::kEngine) return cuda::LaunchCopy(params, mover, stream);
  return cudaMemcpyAsync(params.to, params.from, params.bytes, cudaMemcpyDefault, stream);
}

// A stream with two events; gone with its scope.
class Timer {
 public:
  explicit Timer(int device) : device_(device) {}
  Timer(Timer&& other) noexcept
      : device_(other.device_), stream_(other.stream_), begin_(other.begin_), end_(other.end_) {
    other.stream_ = nullptr;
    other.begin_ = other.end_ = nullptr;
  }
  ~Timer() {
    ScopedDevice scope(device_);
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  std::optional<std::string> Create() {
    ScopedDevice scope(device_);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                                device_);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaEventCreate(&begin_), device_);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaEventCreate(&end_), device_);
    return std::nullopt;
  }

  std::optional<std::string> Launch(const cuda::CopyParams& params, cuda::Mover mover, int count) {
    ScopedDevice scope(device_);
    for (int i = 0; i < 3 * count; ++i) {
      if (i == count) JAX_EP_RETURN_IF_CUDA_ERROR(cudaEventRecord(begin_, stream_), device_);
      JAX_EP_RETURN_IF_CUDA_ERROR(Start(params, mover, stream_), device_);
      if (i == 2 * count - 1) JAX_EP_RETURN_IF_CUDA_ERROR(cudaEventRecord(end_, stream_), device_);
    }
    return std::nullopt;
  }

  std::optional<std::string> Finish(double& seconds) {
    ScopedDevice scope(device_);
    float milliseconds = 0;
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_), device_);
    JAX_EP_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, begin_, end_), device_);
    seconds = milliseconds * 1e-3;
    return std::nullopt;
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

std::optional<std::string> FindRank(int64_t group_id, int device, const Member** member) {
  *member = FindMember(group_id, device);
  if (*member != nullptr) return std::nullopt;
  return "GPU " + std::to_string(device) + " is in no group of id " + std::to_string(group_id);
}

}  // namespace

std::optional<std::string> NamePlace(int64_t group_id, int device, uint64_t pointer, int64_t bytes,
                                     Place& place) {
  const Member* member = nullptr;
  if (auto error = FindRank(group_id, device, &member)) return error;
  const std::vector<cuda::Region>& own = member->regions[member->params.rank];
  for (size_t i = 0; i < own.size(); ++i) {
    if (pointer >= own[i].base && pointer + bytes <= own[i].base + own[i].size) {
      place = {static_cast<int>(i), pointer - own[i].base};
      return std::nullopt;
    }
  }
  return "the memory is outside of what the peers of GPU " + std::to_string(device) + " can read";
}

std::optional<std::string> TimeCopies(int64_t group_id, const std::vector<Copy>& copies,
                                      int64_t bytes, cuda::Mover mover, int blocks, int count,
                                      std::vector<double>& seconds) {
  std::vector<Timer> timers;
  std::vector<cuda::CopyParams> params;
  for (const Copy& copy : copies) {
    const Member* member = nullptr;
    if (auto error = FindRank(group_id, copy.device, &member)) return error;
    if (copy.rank < 0 || copy.rank >= member->params.num_ranks) {
      return "expected a rank of the group, got " + std::to_string(copy.rank);
    }
    const std::vector<cuda::Region>& regions = member->regions[copy.rank];
    const size_t region = copy.from.region;
    if (region >= regions.size() || copy.from.offset + bytes > regions[region].size) {
      return "expected a place in the memory of rank " + std::to_string(copy.rank);
    }
    params.push_back({reinterpret_cast<const void*>(regions[region].base + copy.from.offset),
                      reinterpret_cast<void*>(copy.to), bytes, blocks});
    timers.emplace_back(copy.device);
    if (auto error = timers.back().Create()) return error;
    ScopedDevice scope(copy.device);
    JAX_EP_RETURN_IF_CUDA_ERROR(cuda::LoadCopy(), copy.device);
  }
  for (size_t i = 0; i < timers.size(); ++i) {
    if (auto error = timers[i].Launch(params[i], mover, count)) return error;
  }
  seconds.assign(timers.size(), 0.0);
  for (size_t i = 0; i < timers.size(); ++i) {
    if (auto error = timers[i].Finish(seconds[i])) return error;
  }
  return std::nullopt;
}

}  // namespace jax_ep::transport
