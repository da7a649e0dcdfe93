// Stands in for libcuda.so.1: memory of the GPU is memory of the process.
//
// A copy reads and writes only when its stream is waited for. Of the copies that wait, the last one
// comes first, so whoever needs an order has to wait. It refuses what CUDA would refuse or do
// somewhere else: copies outside the context of their stream, and memory of the host that was not
// registered.
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

extern "C" {
// Called after each copy to the GPU, if set.
void (*fake_driver_written)(uint64_t device, size_t bytes) = nullptr;
// Copies from the GPU so far.
int fake_driver_reads = 0;
}

namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotPermitted = 800;

struct Context {};
struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool to_device;
};
struct Stream {
  Context* context;
  std::vector<Copy> copies;
};

Context program_context;
int num_contexts = 0;  // besides that one
thread_local std::vector<Context*> contexts = {&program_context};
std::map<uintptr_t, size_t> registered;  // in the network's context

bool IsRegistered(const void* memory, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(memory);
  auto next = registered.upper_bound(at);
  if (next == registered.begin()) return false;
  --next;
  return at + bytes <= next->first + next->second;
}

int Enqueue(Copy copy, const void* host, void* handle) {
  Stream& stream = *static_cast<Stream*>(handle);
  if (contexts.back() != stream.context) return kInvalidContext;
  if (!IsRegistered(host, copy.bytes)) return kNotPermitted;
  stream.copies.push_back(copy);
  return 0;
}

}  // namespace

extern "C" {

int cuGetErrorName(int error, const char** name) {
  *name = error == kInvalidContext ? "FAKE_INVALID_CONTEXT"
          : error == kNotPermitted ? "FAKE_NOT_PERMITTED"
                                   : "FAKE_ERROR";
  return 0;
}

int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cuCtxCreate_v2(void** context, unsigned, int) {
  Context* const made = new Context;
  ++num_contexts;
  contexts.push_back(made);
  *context = made;
  return 0;
}

int cuCtxDestroy_v2(void* context) {
  delete static_cast<Context*>(context);
  --num_contexts;
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<Context*>(context));
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  if (contexts.size() < 2) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

int cuStreamCreate(void** stream, unsigned) {
  if (contexts.back() == &program_context) return kInvalidContext;
  *stream = new Stream{contexts.back(), {}};
  return 0;
}

int cuStreamSynchronize(void* handle) {
  Stream& stream = *static_cast<Stream*>(handle);
  if (contexts.back() != stream.context) return kInvalidContext;
  for (; !stream.copies.empty(); stream.copies.pop_back()) {
    const Copy copy = stream.copies.back();
    std::memcpy(copy.to, copy.from, copy.bytes);
    fake_driver_reads += !copy.to_device;
    if (copy.to_device && fake_driver_written != nullptr) {
      fake_driver_written(reinterpret_cast<uint64_t>(copy.to), copy.bytes);
    }
  }
  return 0;
}

int cuMemcpyDtoHAsync_v2(void* host, unsigned long long device, size_t bytes, void* stream) {
  const auto from = reinterpret_cast<const char*>(device);
  return Enqueue({static_cast<char*>(host), from, bytes, false}, host, stream);
}

int cuMemcpyHtoDAsync_v2(unsigned long long device, const void* host, size_t bytes, void* stream) {
  const auto to = reinterpret_cast<char*>(device);
  return Enqueue({to, static_cast<const char*>(host), bytes, true}, host, stream);
}

int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  if (contexts.back() == &program_context) return kInvalidContext;
  const bool is_new = registered.emplace(reinterpret_cast<uintptr_t>(memory), bytes).second;
  return is_new ? 0 : kInvalidValue;
}

// Of both kinds, how many there are.
int fake_driver_contexts() { return num_contexts; }
int fake_driver_registrations() { return static_cast<int>(registered.size()); }

int cuMemHostUnregister(void* memory) {
  return registered.erase(reinterpret_cast<uintptr_t>(memory)) == 1 ? 0 : kInvalidValue;
}
}
