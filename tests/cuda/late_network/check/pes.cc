#include "pes.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <thread>

namespace jax_ep::late::check {
namespace {

constexpr int kMostBytes = 64;
constexpr int kInterface = 30000;
constexpr unsigned kLimit_s = 60;

// What the processes share from before the fork: the bootstrap's means.
struct Shared {
  std::atomic<int> arrived;
  char gathered[kPes][kMostBytes];
};
Shared* shared = nullptr;

void Arrive() { shared->arrived.fetch_add(1); }
bool AllAre(int round) { return shared->arrived.load() >= kPes * round; }

int round_number = 0;  // of this process

int Barrier(abi::Bootstrap*) {
  ++round_number;
  Arrive();
  while (!AllAre(round_number)) std::this_thread::yield();
  return 0;
}

int AllGather(const void* send, void* receive, int bytes, abi::Bootstrap* bootstrap) {
  std::memcpy(shared->gathered[bootstrap->pe], send, bytes);
  Barrier(bootstrap);
  for (int pe = 0; pe < kPes; ++pe) {
    std::memcpy(static_cast<char*>(receive) + pe * bytes, shared->gathered[pe], bytes);
  }
  return Barrier(bootstrap);
}

void Need(int status, const char* what) { Check(status == 0, what, status); }

}  // namespace

void Say(const Pe& pe, const char* name, uint64_t value) {
  std::printf("%d.%s=%lu\n", pe.index(), name, value);
  std::fflush(stdout);
}

void Fail(const char* what, uint64_t value) {
  std::fprintf(stderr, "FAILED: %s (%lu)\n", what, value);
  std::exit(1);
}

void Check(bool holds, const char* what, uint64_t value) {
  if (!holds) Fail(what, value);
}

Pe::Pe(const char* plugin, int index) : index_(index) {
  library_ = dlopen(plugin, RTLD_NOW);
  if (library_ == nullptr) std::fprintf(stderr, "%s\n", dlerror());
  Check(library_ != nullptr, "the plug-in does not load", 0);
  void* const memory =
      mmap(nullptr, kHeapBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Check(memory != MAP_FAILED, "mmap", kHeapBytes);
  heap_ = static_cast<char*>(memory);
  driver_ = dlopen(std::getenv("JAX_EP_LATE_DRIVER"), RTLD_NOW);  // as the plug-in will
  const auto init = Exported<int (*)(abi::Transport**, void*, int)>("nvshmemt_init");
  Need(init(&transport_, nullptr, kInterface), "nvshmemt_init");
  bootstrap_.pe = index;
  bootstrap_.num_pes = kPes;
  bootstrap_.all_gather = AllGather;
  bootstrap_.barrier = check::Barrier;
  transport_->bootstrap = &bootstrap_;
  transport_->my_pe = index;
  transport_->num_pes = kPes;
  int access = 0, device = 0;
  Need(transport_->operations.can_reach_peer(&access, nullptr, transport_), "can_reach_peer");
  Check((access & abi::kCanWrite) != 0, "access", access);
  Need(transport_->operations.connect(transport_, &device, 1), "connect");
  char* heaps[kPes];
  AllGather(&heap_, heaps, sizeof heap_, &bootstrap_);
  peer_heap_ = heaps[peer()];
}

void Pe::Finalize() {
  Barrier();
  Need(transport_->operations.finalize(transport_), "finalize");
  for (const char* name : {"fake_driver_contexts", "fake_driver_registrations"}) {
    Need(reinterpret_cast<int (*)()>(Find(driver_, name))(), name);
  }
}

void Pe::WatchWrites(void (*watcher)(uint64_t, size_t)) {
  *static_cast<decltype(watcher)*>(Find(driver_, "fake_driver_written")) = watcher;
}

int Pe::num_reads() const { return *static_cast<int*>(Find(driver_, "fake_driver_reads")); }

void* Pe::Find(void* library, const char* name) {
  void* const symbol = dlsym(library, name);
  if (symbol == nullptr) std::fprintf(stderr, "no %s\n", name);
  Check(symbol != nullptr, "a library lacks a symbol", 0);
  return symbol;
}

int Pe::Rma(int verb, void* remote, void* local, size_t count, int bytes, bool is_nonblocking) {
  abi::MemoryHandle handle;
  abi::Place there = {remote, 0, &handle};
  abi::Place here = {local, 0, verb == abi::kPutValue ? nullptr : &handle};
  return transport_->operations.rma(transport_, peer(), {verb, is_nonblocking, 0, nullptr}, &there,
                                    &here, {count, bytes, 1, 1}, 0);
}

void Pe::Put(size_t to, size_t from, size_t bytes, bool is_nonblocking) {
  Need(Rma(abi::kPut, peer_heap_ + to, heap_ + from, bytes, 1, is_nonblocking), "put");
}

void Pe::PutValue(size_t to, uint64_t value, int bytes) {
  Need(Rma(abi::kPutValue, peer_heap_ + to, &value, 1, bytes, false), "put of a value");
}

void Pe::Get(size_t to, size_t from, size_t bytes, bool is_nonblocking) {
  Need(Rma(abi::kGet, peer_heap_ + from, heap_ + to, bytes, 1, is_nonblocking), "get");
}

int Pe::PutUnregistered() {
  abi::MemoryHandle handle;
  abi::Place there = {peer_heap_, 0, &handle};
  abi::Place here = {heap_, 0, nullptr};
  return transport_->operations.rma(transport_, peer(), {abi::kPut, 1, 0, nullptr}, &there, &here,
                                    {8, 1, 1, 1}, 0);
}

void Pe::Atomic(int operation, size_t word, uint64_t value, uint64_t compare, int bytes,
                size_t result_word, uint64_t flag) {
  abi::MemoryHandle handle;
  abi::AmoPlace place = {};
  place.remote = {peer_heap_ + kWordsAt + 8 * word, 0, &handle};
  place.value = value;
  place.compare = compare;
  place.return_place = words() + result_word;
  place.return_flag = flag;
  place.return_handle = &handle;
  Need(transport_->operations.amo(transport_, peer(), nullptr, {operation, 0, 0, 0}, &place,
                                  {0, bytes}, 0),
       "atomic");
}

void Pe::Fence() { Need(transport_->operations.fence(transport_, peer(), 0), "fence"); }
int Pe::Quiet() { return transport_->operations.quiet(transport_, peer(), 0); }
void Pe::Progress() { Need(transport_->operations.progress(transport_), "progress"); }

void Pe::Barrier() {
  ++round_number;
  Arrive();
  while (!AllAre(round_number)) Progress();
}

int RunPes(const char* plugin, void (*work)(Pe&)) {
  void* const memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Check(memory != MAP_FAILED, "mmap", sizeof(Shared));
  shared = new (memory) Shared{};
  pid_t processes[kPes];
  for (int index = 0; index < kPes; ++index) {
    processes[index] = fork();
    if (processes[index] != 0) continue;
    alarm(kLimit_s);  // whatever happens
    Pe pe(plugin, index);
    work(pe);
    std::exit(0);
  }
  int worst = 0;
  for (int index = 0; index < kPes; ++index) {
    int status = 0;
    const pid_t ended = waitpid(-1, &status, 0);
    for (pid_t& process : processes) {
      if (process == ended) process = 0;
    }
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    // A peer of a failed one would wait for it.
    if (code != 0) {
      for (const pid_t process : processes) {
        if (process != 0) kill(process, SIGKILL);
      }
    }
    if (worst == 0) worst = code;
  }
  return worst;
}

}  // namespace jax_ep::late::check
