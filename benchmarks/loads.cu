// Is the "aggressive" load, ld.global.nc.L1::no_allocate.L2::256B, worth having? This program times
// ways to bring rows from this GPU's memory or a peer's to registers or to other rows.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -Icsrc benchmarks/loads.cu -o build/cuda/loads
//   build/cuda/loads [--json benchmarks/results/loads.json]
//
// Movers: bulk copies as in csrc/cuda/node/dispatch.cu, with the same stages; the adder of combine;
// and loads of 16 bytes, 4 or 8 of them in flight in each of 1024 threads of a block. Uses: "copy"
// writes every row to a row here, as dispatch does; "sum" adds rows by fours in float32, as combine
// does, which has no float8 rows. Rows are gathered in random order out of two sources in turn,
// each some ten times the L2 cache. "peer": two GPUs read each other's memory at once. A figure is
// the median over launches on the slower GPU. GB/s count bytes read, once. All results are checked.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "loads_movers.cuh"

namespace {

using namespace loads;  // NOLINT
constexpr int kBlocks[] = {8, 24, 64, 132};
constexpr int kWarmups = 3;
constexpr int kLaunches = 25;
constexpr int kBuffers = 2;
constexpr int kSharedBytes = 227 << 10;

// Inputs and checks ------------------------------------------------------------------------------

// Two channels of bfloat16, whole numbers from -128 to 127, of word `word` of a source row.
__device__ uint32_t Word(uint32_t source, uint32_t row, uint32_t word) {
  uint32_t x = (row * 4096 + word) ^ source * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  x ^= x >> 16;
  const auto channel = [](uint32_t bits) {
    return __float_as_uint(static_cast<float>(static_cast<int8_t>(bits))) >> 16;
  };
  return channel(x) | channel(x >> 8) << 16;
}

__global__ void FillWords(uint32_t* words, int64_t count, int words_per_row, int first_word,
                          uint32_t source) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    words[i] = Word(source, i / words_per_row, first_word + i % words_per_row);
  }
}

// Compares `count` words of results, each a sum of `terms` rows, with the inputs.
__global__ void CountWrong(const uint32_t* words, int64_t count, int words_per_row, int first_word,
                           uint32_t source, const int32_t* order, int terms,
                           unsigned long long* num_wrong) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const int word = first_word + i % words_per_row;
    const int32_t* rows = order + i / words_per_row * terms;
    uint32_t expected = Word(source, rows[0], word);
    if (terms > 1) {
      float low = 0.0f, high = 0.0f;
      for (int t = 0; t < terms; ++t) {
        const uint32_t term = Word(source, rows[t], word);
        low += __uint_as_float(term << 16);
        high += __uint_as_float(term & 0xffff0000u);
      }
      expected = uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(high))} << 16 |
                 __bfloat16_as_ushort(__float2bfloat16_rn(low));
    }
    if (words[i] != expected) atomicAdd(num_wrong, 1ull);
  }
}

// Host -------------------------------------------------------------------------------------------

void Check(cudaError_t error, const char* call, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "loads.cu:%d: %s: %s\n", line, call, cudaGetErrorString(error));
  std::exit(2);
}
#define CHECK_CUDA(call) Check(call, #call, __LINE__)

struct Device {
  int id;
  cudaStream_t stream;
  cudaEvent_t events[kWarmups + kLaunches + 1];
  struct Buffer {
    char *payload, *scales, *out_payload, *out_scales;
    int32_t* order;
  } buffers[kBuffers];
  unsigned long long* num_wrong;
};

struct Mover {
  std::string name;
  int in_flight;  // loads of a thread; 0 for bulk copies
  void (*kernel)(Params);
  int threads;
  int shared_bytes;  // in addition to the list of rows
};

// A kind of rows with a use.
struct Workload {
  std::string use;
  int payload_bytes, scale_bytes;
  int terms;
  std::vector<Mover> movers;
  int RowBytes() const { return payload_bytes + scale_bytes; }
  // A number of rows that all movers can divide evenly among their warps.
  int NumRows(int blocks) const {
    const int unit = blocks * 192 * DenseRows::kPayloadBytes / payload_bytes;
    return kPayloadBytes / payload_bytes / unit * unit;
  }
  void AddLoads(const char* name, void (*four)(Params), void (*eight)(Params)) {
    movers.push_back({name, 4, four, kLoadWarps * 32, 0});
    movers.push_back({name, 8, eight, kLoadWarps * 32, 0});
  }
};

using LoadIndices = std::make_index_sequence<std::size(kLoadNames)>;

template <typename Format, size_t... kLoad>
Workload Copies(std::index_sequence<kLoad...>) {
  using Ring = BulkCopy<Format>;
  Workload workload{"copy", Format::kPayloadBytes, Format::kScaleBytes, 1, {}};
  workload.movers.push_back({"bulk", 0, CopyByBulk<Format>, Ring::kThreads, Ring::kBytes});
  (workload.AddLoads(kLoadNames[kLoad], CopyByLoads<Load{kLoad}, 4, Format>,
                     CopyByLoads<Load{kLoad}, 8, Format>),
   ...);
  return workload;
}

template <size_t... kLoad>
Workload Sums(std::index_sequence<kLoad...>) {
  Workload workload{"sum", DenseRows::kPayloadBytes, DenseRows::kScaleBytes, kTerms, {}};
  workload.movers.push_back({"combine", kAdderLoads, SumByAdder, kAdderWarps * 32,
                             kAdderWarps * kTerms * int{sizeof(Term)}});
  (workload.AddLoads(kLoadNames[kLoad], SumByLoads<Load{kLoad}, 4>, SumByLoads<Load{kLoad}, 8>),
   ...);
  return workload;
}

// This GPU, and a second one if they reach each other's memory.
std::vector<Device> OpenDevices() {
  int count = 0;
  CHECK_CUDA(cudaGetDeviceCount(&count));
  std::vector<Device> devices(1);
  if (count > 1) {
    int there = 0, back = 0;
    CHECK_CUDA(cudaDeviceCanAccessPeer(&there, 0, 1));
    CHECK_CUDA(cudaDeviceCanAccessPeer(&back, 1, 0));
    if (there != 0 && back != 0) devices.resize(2);
  }
  for (size_t d = 0; d < devices.size(); ++d) {
    Device& device = devices[d];
    device.id = static_cast<int>(d);
    CHECK_CUDA(cudaSetDevice(device.id));
    if (devices.size() > 1) CHECK_CUDA(cudaDeviceEnablePeerAccess(1 - device.id, 0));
    CHECK_CUDA(cudaStreamCreate(&device.stream));
    for (cudaEvent_t& event : device.events) CHECK_CUDA(cudaEventCreate(&event));
    CHECK_CUDA(cudaMalloc(&device.num_wrong, sizeof(*device.num_wrong)));
    for (Device::Buffer& buffer : device.buffers) {
      CHECK_CUDA(cudaMalloc(&buffer.payload, kPayloadBytes));
      CHECK_CUDA(cudaMalloc(&buffer.out_payload, kPayloadBytes));
      CHECK_CUDA(cudaMalloc(&buffer.scales, kMaxRows * Float8Rows::kScaleBytes));
      CHECK_CUDA(cudaMalloc(&buffer.out_scales, kMaxRows * Float8Rows::kScaleBytes));
      CHECK_CUDA(cudaMalloc(&buffer.order, kMaxRows * sizeof(int32_t)));
    }
  }
  return devices;
}

void Synchronize(const std::vector<Device>& devices) {
  for (const Device& device : devices) {
    CHECK_CUDA(cudaSetDevice(device.id));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
}

// Rows of a workload in all sources, and the orders in which they are read.
void Fill(const std::vector<Device>& devices, const Workload& workload) {
  const int num_rows = static_cast<int>(kPayloadBytes / workload.payload_bytes);
  std::mt19937 generator(1);
  std::vector<int32_t> order(num_rows);
  std::iota(order.begin(), order.end(), 0);
  for (int b = 0; b < kBuffers; ++b) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const Device& device : devices) {
      const Device::Buffer& buffer = device.buffers[b];
      CHECK_CUDA(cudaSetDevice(device.id));
      CHECK_CUDA(cudaMemcpy(buffer.order, order.data(), num_rows * sizeof(int32_t),
                            cudaMemcpyHostToDevice));
      const auto fill = [&](char* words, int row_bytes, int first_word) {
        if (row_bytes == 0) return;
        FillWords<<<1024, 256, 0, device.stream>>>(reinterpret_cast<uint32_t*>(words),
                                                   int64_t{num_rows} * row_bytes / 4, row_bytes / 4,
                                                   first_word, device.id * kBuffers + b);
        CHECK_CUDA(cudaGetLastError());
      };
      fill(buffer.payload, workload.payload_bytes, 0);
      fill(buffer.scales, workload.scale_bytes, workload.payload_bytes / 4);
    }
  }
  Synchronize(devices);
}

// The device whose memory `device` reads.
const Device& Owner(const std::vector<Device>& devices, const Device& device) {
  return devices[devices.size() - 1 - device.id];
}

struct Times {
  double us = 0, p10_us = 0, p90_us = 0;
};

// The time of `launch(device, buffer)`, which all devices repeat; that of the slower one.
template <typename Launch>
Times Measure(const std::vector<Device>& devices, Launch&& launch) {
  for (int i = -1; i < kWarmups + kLaunches; ++i) {
    for (const Device& device : devices) {
      CHECK_CUDA(cudaSetDevice(device.id));
      if (i >= 0) launch(device, i % kBuffers);
      CHECK_CUDA(cudaEventRecord(device.events[i + 1], device.stream));
    }
  }
  Synchronize(devices);
  Times slowest;
  for (const Device& device : devices) {
    std::vector<float> ms(kLaunches);
    for (int i = 0; i < kLaunches; ++i) {
      const cudaEvent_t* begin = &device.events[kWarmups + i];
      CHECK_CUDA(cudaEventElapsedTime(&ms[i], begin[0], begin[1]));
    }
    std::sort(ms.begin(), ms.end());
    const auto us = [&](int percent) { return 1e3 * ms[(kLaunches - 1) * percent / 100]; };
    if (us(50) > slowest.us) slowest = {us(50), us(10), us(90)};
  }
  return slowest;
}

// GB/s of cudaMemcpyAsync, from the memory that is read.
double Ceiling(const std::vector<Device>& devices) {
  const Times times = Measure(devices, [&](const Device& device, int b) {
    CHECK_CUDA(cudaMemcpyAsync(device.buffers[b].out_payload,
                               Owner(devices, device).buffers[b].payload, kPayloadBytes,
                               cudaMemcpyDefault, device.stream));
  });
  return kPayloadBytes / times.us / 1e3;
}

struct Result {
  Times times;
  double gbs;
  bool correct;
};

Result Run(const std::vector<Device>& devices, const Workload& workload, const Mover& mover,
           int blocks) {
  const int num_rows = workload.NumRows(blocks);
  const int shared_bytes = mover.shared_bytes + num_rows / blocks * int{sizeof(int32_t)};
  for (const Device& device : devices) {
    CHECK_CUDA(cudaSetDevice(device.id));
    CHECK_CUDA(cudaFuncSetAttribute(mover.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kSharedBytes));
    for (const Device::Buffer& buffer : device.buffers) {
      CHECK_CUDA(cudaMemsetAsync(buffer.out_payload, 0xff, kPayloadBytes, device.stream));
      CHECK_CUDA(cudaMemsetAsync(buffer.out_scales, 0xff, kMaxRows * Float8Rows::kScaleBytes,
                                 device.stream));
    }
    CHECK_CUDA(cudaMemsetAsync(device.num_wrong, 0, sizeof(*device.num_wrong), device.stream));
  }
  Synchronize(devices);
  const Times times = Measure(devices, [&](const Device& device, int b) {
    const Device::Buffer& source = Owner(devices, device).buffers[b];
    const Device::Buffer& own = device.buffers[b];
    const Params params{source.payload, source.scales,   own.order,
                        num_rows,       own.out_payload, own.out_scales};
    mover.kernel<<<blocks, mover.threads, shared_bytes, device.stream>>>(params);
    CHECK_CUDA(cudaGetLastError());
  });
  bool correct = true;
  for (const Device& device : devices) {
    CHECK_CUDA(cudaSetDevice(device.id));
    for (int b = 0; b < kBuffers; ++b) {
      const Device::Buffer& buffer = device.buffers[b];
      const uint32_t source = Owner(devices, device).id * kBuffers + b;
      const auto check = [&](const char* words, int row_bytes, int first_word) {
        if (row_bytes == 0) return;
        const int64_t count = int64_t{num_rows} / workload.terms * row_bytes / 4;
        CountWrong<<<1024, 256, 0, device.stream>>>(reinterpret_cast<const uint32_t*>(words), count,
                                                    row_bytes / 4, first_word, source, buffer.order,
                                                    workload.terms, device.num_wrong);
        CHECK_CUDA(cudaGetLastError());
      };
      check(buffer.out_payload, workload.payload_bytes, 0);
      check(buffer.out_scales, workload.scale_bytes, workload.payload_bytes / 4);
    }
    unsigned long long num_wrong = 0;
    CHECK_CUDA(cudaMemcpyAsync(&num_wrong, device.num_wrong, sizeof(num_wrong),
                               cudaMemcpyDeviceToHost, device.stream));
    CHECK_CUDA(cudaStreamSynchronize(device.stream));
    correct = correct && num_wrong == 0;
  }
  return {times, 1e-3 * num_rows * workload.RowBytes() / times.us, correct};
}

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

template <typename... Values>
std::string Printed(const char* format, Values... values) {
  char text[1024];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  std::string json_path, command = argv[0];
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  if (argc == 3 && std::string(argv[1]) == "--json") {
    json_path = argv[2];
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: %s [--json FILE]\n", argv[0]);
    return 2;
  }
  const std::vector<Device> devices = OpenDevices();
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  int runtime = 0, driver = 0;
  CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
  CHECK_CUDA(cudaDriverGetVersion(&driver));
  std::printf("%s, CUDA %d, driver's CUDA %d\n", properties.name, runtime, driver);
  if (devices.size() == 1) std::printf("no second GPU with peer access: local memory only\n");

  std::string records;
  bool correct = true;
  for (const Workload& workload :
       {Copies<DenseRows>(LoadIndices()), Copies<Float8Rows>(LoadIndices()), Sums(LoadIndices())}) {
    Fill(devices, workload);
    for (size_t ranks = 1; ranks <= devices.size(); ++ranks) {
      const std::vector<Device> taking_part(devices.begin(), devices.begin() + ranks);
      const char* memory = ranks == 1 ? "local" : "peer";
      const double ceiling = Ceiling(taking_part);
      std::printf("\n%s of rows of %d B, %s memory: GB/s; cudaMemcpyAsync %.0f\n%-38s %9s",
                  workload.use.c_str(), workload.RowBytes(), memory, ceiling, "mover", "in flight");
      for (const int blocks : kBlocks) std::printf(" %5d blocks", blocks);
      std::printf("  p10 to p90\n");
      for (const Mover& mover : workload.movers) {
        std::printf("%-38s %9d", mover.name.c_str(), mover.in_flight);
        double spread = 0;
        for (const int blocks : kBlocks) {
          const Result result = Run(taking_part, workload, mover, blocks);
          const Times& times = result.times;
          std::printf(" %6.0f%-6s", result.gbs, result.correct ? "" : " WRONG");
          spread = std::max(spread, (times.p90_us - times.p10_us) / times.us);
          correct = correct && result.correct;
          records += Printed(
              "%s{\"op\": \"loads\", \"mover\": \"%s\", \"in_flight\": %d, \"use\": \"%s\", "
              "\"memory\": \"%s\", \"row_bytes\": %d, \"blocks\": %d, \"rows\": %d, \"us\": %.1f, "
              "\"p10_us\": %.1f, \"p90_us\": %.1f, \"gbs\": %.1f, \"ceiling_gbs\": %.1f, "
              "\"correct\": %s, \"device\": \"%s\", \"versions\": {\"cuda\": %d, \"driver\": %d}, "
              "\"command\": ",
              records.empty() ? "" : ",\n", mover.name.c_str(), mover.in_flight,
              workload.use.c_str(), memory, workload.RowBytes(), blocks, workload.NumRows(blocks),
              times.us, times.p10_us, times.p90_us, result.gbs, ceiling,
              result.correct ? "true" : "false", properties.name, runtime, driver);
          records += Quoted(command) + "}";
        }
        std::printf("  %9.1f%%\n", 100 * spread);
        std::fflush(stdout);
      }
    }
  }
  if (!json_path.empty()) {
    std::FILE* file = std::fopen(json_path.c_str(), "w");
    if (file == nullptr || std::fprintf(file, "[\n%s\n]\n", records.c_str()) < 0 ||
        std::fclose(file) != 0) {
      std::perror(json_path.c_str());
      return 2;
    }
  }
  return correct ? 0 : 1;
}
