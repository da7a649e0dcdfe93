// The CUDA runtime: streams, graphs and events, whose work the device's thread does in order.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "device.h"
#include "memory.h"

namespace emulator {
namespace {

// A piece of work of a stream: a kernel, or a function that is called at once.
struct Work {
  Config config;
  std::function<void()> thread;  // of the kernel
  std::function<void()> at_once;
};

struct Stream {
  std::deque<Work> queue;
  int num_running = 0;             // grids
  std::shared_ptr<Progress> last;  // of the grid that began last
  std::vector<Work>* capture = nullptr;
};

// Never destroyed, because the device's thread does not end before the process.
std::mutex& mutex = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;
std::vector<Stream*>& streams = *new std::vector<Stream*>;
Stream default_stream;
std::map<const void*, size_t> allowed_shared;
thread_local cudaError_t last_error = cudaSuccess;

Stream* Of(cudaStream_t stream) {
  return stream == nullptr ? &default_stream : reinterpret_cast<Stream*>(stream);
}

bool CanBegin(const Stream& stream, const Work& work) {
  if (stream.num_running == 0) return true;
  return work.config.early && stream.last->num_let_go == stream.last->num_blocks;
}

// Starts all work that can start; true if a stream has work left.
bool AdvanceStreams() {
  bool any = false;
  for (Stream* stream : streams) {
    while (!stream->queue.empty() && CanBegin(*stream, stream->queue.front())) {
      Work work = std::move(stream->queue.front());
      stream->queue.pop_front();
      if (work.at_once != nullptr) {
        work.at_once();
        changed.notify_all();
        continue;
      }
      auto grid = std::make_unique<Grid>();
      grid->config = work.config;
      grid->thread = std::move(work.thread);
      grid->progress = std::make_shared<Progress>();
      grid->progress->num_blocks = work.config.grid.x;
      if (work.config.early) grid->before = stream->last;
      stream->last = grid->progress;
      grid->finished = [stream] {
        const std::lock_guard<std::mutex> lock(mutex);
        --stream->num_running;
        changed.notify_all();
      };
      ++stream->num_running;
      StartGrid(std::move(grid));
    }
    any = any || stream->num_running != 0;
  }
  return any;
}

[[noreturn]] void RunDevice() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      while (!AdvanceStreams()) changed.wait(lock);
    }
    for (int i = 0; i < 8; ++i) RunTurn();
  }
}

void Add(Stream* stream, Work work) {
  static const bool started = [] {
    const std::lock_guard<std::mutex> lock(mutex);
    streams.push_back(&default_stream);
    std::thread(RunDevice).detach();
    return true;
  }();
  (void)started;
  const std::lock_guard<std::mutex> lock(mutex);
  if (stream->capture != nullptr) {
    stream->capture->push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
    changed.notify_all();
  }
}

void AddAtOnce(cudaStream_t stream, std::function<void()> work) {
  Add(Of(stream), {{}, nullptr, std::move(work)});
}

bool IsIdle(const Stream& stream) { return stream.num_running == 0 && stream.queue.empty(); }

}  // namespace

cudaError_t AllowShared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxSharedBytes) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(mutex);
  allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

void Enqueue(const Config& config, const void* kernel, std::function<void()> thread) {
  size_t allowed = 48 << 10;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto it = allowed_shared.find(kernel);
    if (it != allowed_shared.end()) allowed = std::max(allowed, it->second);
  }
  if (config.shared_bytes > allowed || config.grid.x == 0 || config.block.x == 0 ||
      config.block.x > 1024) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  Add(Of(config.stream), {config, std::move(thread), nullptr});
}

}  // namespace emulator

using emulator::Of;

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulator";
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaMalloc(void** pointer, size_t size) {
  *pointer = emulator::Allocate(size);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFree(void* pointer) {
  cudaDeviceSynchronize();
  emulator::Free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  emulator::Fill(to, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  emulator::AddAtOnce(stream, [=] { emulator::Fill(to, value, size); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  auto* created = new emulator::Stream;
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  emulator::streams.push_back(created);
  *stream = reinterpret_cast<cudaStream_t>(created);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr) return cudaSuccess;  // what it has was done when it was called
  std::unique_lock<std::mutex> lock(emulator::mutex);
  emulator::changed.wait(lock, [=] { return IsIdle(*Of(stream)); });
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  std::unique_lock<std::mutex> lock(emulator::mutex);
  emulator::changed.wait(lock, [] {
    return std::all_of(emulator::streams.begin(), emulator::streams.end(),
                       [](const emulator::Stream* stream) { return IsIdle(*stream); });
  });
  return cudaSuccess;
}

// An event is the time at which it was recorded last.
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new std::chrono::steady_clock::time_point);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  emulator::AddAtOnce(stream, [=] {
    *reinterpret_cast<std::chrono::steady_clock::time_point*>(event) =
        std::chrono::steady_clock::now();
  });
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const auto time = [](cudaEvent_t event) {
    return *reinterpret_cast<std::chrono::steady_clock::time_point*>(event);
  };
  *ms = std::chrono::duration<float, std::milli>(time(end) - time(begin)).count();
  return cudaSuccess;
}

// A graph is a list of work, of one stream.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  Of(stream)->capture = new std::vector<emulator::Work>;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(std::exchange(Of(stream)->capture, nullptr));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const auto& works = *reinterpret_cast<std::vector<emulator::Work>*>(executable);
  for (const emulator::Work& work : works) emulator::Add(Of(stream), work);
  return cudaSuccess;
}

}  // extern "C"
