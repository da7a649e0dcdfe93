// Fibers: stacks, and the switch between them.
#pragma once

#include <cstddef>

namespace emulator {

// The address of the state that a switch saves on the stack.
using StackPointer = void*;

// Goes on at `to`, and leaves in `from` where to come back.
void SwitchStack(StackPointer* from, StackPointer to);

// A stack on which `entry` begins. It is the stack freed last, so that it is in the cache. `entry`
// does not return.
struct Stack {
  char* memory = nullptr;
};
Stack TakeStack(void (*entry)(), StackPointer* start);
void FreeStack(Stack stack);  // also the one in use, until the next TakeStack

}  // namespace emulator
