// Processes that are PEs: they load the network as NVSHMEM does, and have what NVSHMEM would have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../abi.h"

namespace jax_ep::late::check {

constexpr int kPes = 2;
constexpr size_t kHeapBytes = 4 << 20;
constexpr size_t kWordsAt = kHeapBytes / 2;  // offset of words for signals and atomics

// One of them, after a fork. All calls fail the program if the network reports an error, unless
// they return it.
class Pe {
 public:
  Pe(const char* plugin, int index);
  void Finalize();  // and sees to it that nothing is left

  int index() const { return index_; }
  int peer() const { return 1 - index_; }
  char* heap() const { return heap_; }
  uint64_t* words() const { return reinterpret_cast<uint64_t*>(heap_ + kWordsAt); }

  // Towards the peer; offsets count from the start of both heaps.
  void Put(size_t to, size_t from, size_t bytes, bool is_nonblocking = true);
  void PutValue(size_t to, uint64_t value, int bytes);
  void Get(size_t to, size_t from, size_t bytes, bool is_nonblocking = true);
  void Atomic(int operation, size_t word, uint64_t value, uint64_t compare = 0, int bytes = 8,
              size_t result_word = 0, uint64_t flag = 0);
  void Signal(size_t word, uint64_t value) { Atomic(abi::kSignalSet, word, value); }
  void Fence();
  int Quiet();
  void Progress();
  int PutUnregistered();

  // Goes on making progress until both PEs are here.
  void Barrier();

  // Calls `watcher` after each write into this PE's heap.
  void WatchWrites(void (*watcher)(uint64_t address, size_t bytes));

  // How many sources of puts of this PE, and of gets of its peer, were read so far.
  int num_reads() const;

  // A function that the plug-in exports for tests.
  template <typename Function>
  Function Exported(const char* name) const {
    return reinterpret_cast<Function>(Find(library_, name));
  }

 private:
  static void* Find(void* library, const char* name);
  int Rma(int verb, void* remote, void* local, size_t count, int bytes, bool is_nonblocking);

  void* library_;
  void* driver_;
  int index_;
  char* heap_;
  char* peer_heap_ = nullptr;
  abi::Transport* transport_ = nullptr;
  abi::Bootstrap bootstrap_ = {};
};

// Prints a fact about a PE that the test in Python reads.
void Say(const Pe& pe, const char* name, uint64_t value);
[[noreturn]] void Fail(const char* what, uint64_t value);
void Check(bool holds, const char* what, uint64_t value);

// Starts a process for each PE and waits for them; the worst exit status.
int RunPes(const char* plugin, void (*work)(Pe&));

}  // namespace jax_ep::late::check
