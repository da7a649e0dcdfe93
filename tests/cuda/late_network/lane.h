// The wire: memory that two processes share, one lane for each direction of each pair of PEs.
//
// A lane has a few slots. The sender fills a free one, and the receiver, when the message is due,
// does what it says and hands the slot back. A message says after how many others of its lane it
// may be delivered, which is all that the network knows of order: messages that lie between the
// same two fences come in any order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace jax_ep::late {

constexpr int kSlots = 32;
constexpr size_t kPartBytes = 128 << 10;  // longer puts and gets travel in parts

enum class Kind : uint32_t { kPut, kGet, kAtomic };

struct Message {
  Kind kind;
  int amo;           // abi::Amo, of an atomic
  uint64_t address;  // in the receiver's process
  uint64_t bytes;    // of the data, or of the word of an atomic; at most kPartBytes
  uint64_t value, compare;
  uint64_t after;  // messages of this lane that are delivered before it
  uint64_t due;    // not before that time: nanoseconds of the steady clock, which the host shares
};

enum class SlotState : uint32_t { kFree, kSent, kDone };

struct Slot {
  std::atomic<SlotState> state;
  Message message;
  uint64_t old;          // what an atomic found
  uint64_t next;         // what the receiver writes for it
  uint64_t return_flag;  // what the sender writes behind `old`
};
static_assert(std::atomic<SlotState>::is_always_lock_free);

struct Lane {
  Slot slots[kSlots];  // all bytes zero: free
  alignas(4096) char data[kSlots][kPartBytes];
};

}  // namespace jax_ep::late
