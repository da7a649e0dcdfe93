#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "emulator.h"

#ifdef __x86_64__
// Saves the registers that functions preserve; ucontext would also make two system calls.
extern "C" void emulator_switch_stack(void** from, void* to);
asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch_stack, .-emulator_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// The system provides memory only as far as it is used. The size is an odd number of cache lines.
// With a power of two, the tops of all stacks would compete for the same few lines of the caches.
constexpr size_t kStackBytes = 1093 * 64;
constexpr uint64_t kCanary = 0x5ac3f1b2d4e69788;

std::vector<Stack> free_stacks;

Stack NewStack() {
  // Many stacks in one mapping, because the number of mappings is limited.
  constexpr size_t kAtOnce = 256;
  void* memory = mmap(nullptr, kAtOnce * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) Abort("no memory for stacks");
  for (size_t i = kAtOnce; i-- > 0;) {
    free_stacks.push_back({static_cast<char*>(memory) + i * kStackBytes});
    std::memcpy(free_stacks.back().memory, &kCanary, sizeof(kCanary));
  }
  return {};
}

}  // namespace

Stack TakeStack(void (*entry)(), StackPointer* start) {
  if (free_stacks.empty()) NewStack();
  const Stack stack = free_stacks.back();
  free_stacks.pop_back();
#ifdef __x86_64__
  // Six registers, then the return address. The address above it is not aligned to 16, as after a
  // call.
  void** top = reinterpret_cast<void**>(stack.memory + kStackBytes) - 1;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  *start = top - 7;
#else
  static_assert(sizeof(ucontext_t) < kStackBytes / 4, "the context lies at the stack's top");
  auto* context = reinterpret_cast<ucontext_t*>(stack.memory + kStackBytes - sizeof(ucontext_t));
  getcontext(context);
  context->uc_stack.ss_sp = stack.memory;
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  *start = context;
#endif
  return stack;
}

void FreeStack(Stack stack) {
  uint64_t canary;
  std::memcpy(&canary, stack.memory, sizeof(canary));
  if (canary != kCanary) Abort("a stack was too small");
  free_stacks.push_back(stack);
}

void SwitchStack(StackPointer* from, StackPointer to) {
#ifdef __x86_64__
  emulator_switch_stack(from, to);
#else
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
#endif
}

}  // namespace emulator
