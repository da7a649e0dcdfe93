#include "receiver.h"

#include <stdexcept>
#include <string>

#include "abi.h"

namespace jax_ep::late {
namespace {

uint64_t Ones(uint64_t bytes) { return bytes < 8 ? (uint64_t{1} << 8 * bytes) - 1 : ~uint64_t{0}; }

uint64_t Result(const Message& message, uint64_t old) {
  switch (message.amo) {
    case abi::kIncrement:
    case abi::kFetchIncrement:
      return old + 1;
    case abi::kAdd:
    case abi::kFetchAdd:
    case abi::kSignalAdd:
      return old + message.value;
    case abi::kAnd:
    case abi::kFetchAnd:
      return old & message.value;
    case abi::kOr:
    case abi::kFetchOr:
      return old | message.value;
    case abi::kXor:
    case abi::kFetchXor:
      return old ^ message.value;
    case abi::kSwap:
      return message.value;
    case abi::kCompareSwap:
      return old == (message.compare & Ones(message.bytes)) ? message.value : old;
    case abi::kFetch:
      return old;
    default:
      throw std::runtime_error("atomic operation " + std::to_string(message.amo) + " is unknown");
  }
}

bool OnlyStores(int amo) {
  return amo == abi::kSet || amo == abi::kSignal || amo == abi::kSignalSet;
}

}  // namespace

void Receiver::Step(Copies& copies, Chance& chance) {
  int ready[kSlots], count = 0;
  const uint64_t now = Now();
  for (int i = 0; i < kSlots; ++i) {
    const Slot& slot = lane_->slots[i];
    if (slot.state.load(std::memory_order_acquire) != SlotState::kSent) continue;
    // Messages before a fence are all delivered before any behind it, so their number tells.
    if (slot.message.after <= num_delivered_ && slot.message.due <= now) ready[count++] = i;
  }
  if (count == 0) return;
  chance.Shuffle(ready, count);
  for (int n = 0; n < count; ++n) Deliver(ready[n], copies);
  copies.Wait();
  for (int n = 0; n < count; ++n) {
    lane_->slots[ready[n]].state.store(SlotState::kDone, std::memory_order_release);
  }
  num_delivered_ += count;
}

// An atomic that does more than store is not atomic to what the GPU does with its word meanwhile.
void Receiver::Deliver(int index, Copies& copies) {
  Slot& slot = lane_->slots[index];
  const Message& message = slot.message;
  if (message.kind == Kind::kPut) {
    copies.ToDevice(message.address, lane_->data[index], message.bytes);
  } else if (message.kind == Kind::kGet) {
    copies.ToHost(lane_->data[index], message.address, message.bytes);
  } else if (OnlyStores(message.amo)) {
    slot.next = message.value;
    copies.ToDevice(message.address, &slot.next, message.bytes);
  } else {
    slot.old = 0;
    copies.ToHost(&slot.old, message.address, message.bytes);
    copies.Wait();
    slot.next = Result(message, slot.old);
    // Where nothing changes, nothing is written: it could undo a store of the GPU.
    if (slot.next != slot.old) copies.ToDevice(message.address, &slot.next, message.bytes);
  }
}

}  // namespace jax_ep::late
