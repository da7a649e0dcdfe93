#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace jax_ep::late {
namespace {

// The driver's functions by the names that its library exports. We declare the few that we need, so
// that the network builds without CUDA's headers.
struct Functions {
  int (*cuGetErrorName)(int, const char**);
  int (*cuCtxGetDevice)(int* device);
  int (*cuCtxCreate_v2)(void** context, unsigned flags, int device);
  int (*cuCtxDestroy_v2)(void* context);
  int (*cuCtxPushCurrent_v2)(void* context);
  int (*cuCtxPopCurrent_v2)(void** context);
  int (*cuStreamCreate)(void** stream, unsigned flags);
  int (*cuStreamSynchronize)(void* stream);
  int (*cuMemcpyDtoHAsync_v2)(void*, unsigned long long, size_t, void* stream);
  int (*cuMemcpyHtoDAsync_v2)(unsigned long long, const void*, size_t, void* stream);
  int (*cuMemHostRegister_v2)(void*, size_t, unsigned flags);
  int (*cuMemHostUnregister)(void*);
};

Functions functions;
constexpr unsigned kNonBlockingStream = 1;

void Load(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW);
  if (handle == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  const auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) throw std::runtime_error(library + " has no " + name);
  };
#define JAX_EP_LATE_FIND(name) find(#name, functions.name)
  JAX_EP_LATE_FIND(cuGetErrorName);
  JAX_EP_LATE_FIND(cuCtxGetDevice);
  JAX_EP_LATE_FIND(cuCtxCreate_v2);
  JAX_EP_LATE_FIND(cuCtxDestroy_v2);
  JAX_EP_LATE_FIND(cuCtxPushCurrent_v2);
  JAX_EP_LATE_FIND(cuCtxPopCurrent_v2);
  JAX_EP_LATE_FIND(cuStreamCreate);
  JAX_EP_LATE_FIND(cuStreamSynchronize);
  JAX_EP_LATE_FIND(cuMemcpyDtoHAsync_v2);
  JAX_EP_LATE_FIND(cuMemcpyHtoDAsync_v2);
  JAX_EP_LATE_FIND(cuMemHostRegister_v2);
  JAX_EP_LATE_FIND(cuMemHostUnregister);
#undef JAX_EP_LATE_FIND
}

template <typename... Parameters, typename... Arguments>
void Call(const char* name, int (*function)(Parameters...), Arguments... arguments) {
  const int error = function(arguments...);
  if (error == 0) return;
  const char* text = nullptr;
  if (functions.cuGetErrorName(error, &text) != 0 || text == nullptr) text = "unknown error";
  throw std::runtime_error(std::string(name) + ": " + text + " (" + std::to_string(error) + ")");
}
#define JAX_EP_LATE_CALL(name, ...) Call(#name, functions.name, __VA_ARGS__)

}  // namespace

Driver::Driver(const std::string& library) {
  Load(library);
  int device = 0;
  JAX_EP_LATE_CALL(cuCtxGetDevice, &device);
  JAX_EP_LATE_CALL(cuCtxCreate_v2, &context_, 0u, device);  // and enters it
  try {
    JAX_EP_LATE_CALL(cuStreamCreate, &stream_, kNonBlockingStream);
  } catch (...) {
    functions.cuCtxDestroy_v2(context_);
    throw;
  }
  void* popped = nullptr;
  JAX_EP_LATE_CALL(cuCtxPopCurrent_v2, &popped);
}

// The process may be at its end, where the driver refuses calls. That does no harm.
Driver::~Driver() { functions.cuCtxDestroy_v2(context_); }

void Driver::Pin(void* memory, size_t bytes) {
  Copies here(*this);
  here.Enter();
  JAX_EP_LATE_CALL(cuMemHostRegister_v2, memory, bytes, 0u);
}

void Driver::Unpin(void* memory) {
  if (functions.cuCtxPushCurrent_v2(context_) != 0) return;
  functions.cuMemHostUnregister(memory);
  void* popped = nullptr;
  functions.cuCtxPopCurrent_v2(&popped);
}

Copies::~Copies() {
  void* popped = nullptr;
  if (entered_) functions.cuCtxPopCurrent_v2(&popped);
}

void Copies::Enter() {
  if (entered_) return;
  JAX_EP_LATE_CALL(cuCtxPushCurrent_v2, driver_.context_);
  entered_ = true;
}

void Copies::ToHost(void* host, uint64_t device, size_t bytes) {
  Enter();
  JAX_EP_LATE_CALL(cuMemcpyDtoHAsync_v2, host, device, bytes, driver_.stream_);
  waiting_ = true;
}

void Copies::ToDevice(uint64_t device, const void* host, size_t bytes) {
  Enter();
  JAX_EP_LATE_CALL(cuMemcpyHtoDAsync_v2, device, host, bytes, driver_.stream_);
  waiting_ = true;
}

void Copies::Wait() {
  if (!waiting_) return;
  JAX_EP_LATE_CALL(cuStreamSynchronize, driver_.stream_);
  waiting_ = false;
}

}  // namespace jax_ep::late
