// Copies between the host and the GPU, in a CUDA context of the network's own.
//
// In the program's context, a call of the program that waits for a kernel (such as the first launch
// of another kernel, which loads it) would also hold up the copies that this kernel waits for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_ep::late {

class Driver {
 public:
  // Of the GPU of the calling thread's context. `library` is the name of the CUDA driver.
  explicit Driver(const std::string& library);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Makes host memory known to the GPU, so that copies need no staging; until the end.
  void Pin(void* memory, size_t bytes);
  void Unpin(void* memory);

 private:
  friend class Copies;
  void* context_ = nullptr;
  void* stream_ = nullptr;
};

// Copies of one thread that run one after the other, and are done when Wait returns.
class Copies {
 public:
  explicit Copies(Driver& driver) : driver_(driver) {}
  ~Copies();
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  void ToHost(void* host, uint64_t device, size_t bytes);
  void ToDevice(uint64_t device, const void* host, size_t bytes);
  void Wait();

 private:
  friend class Driver;
  void Enter();

  Driver& driver_;
  bool entered_ = false;  // the thread is in the network's context
  bool waiting_ = false;
};

}  // namespace jax_ep::late
