#include "sender.h"

#include <algorithm>
#include <cstring>

namespace jax_ep::late {

void Sender::Add(Operation operation, Chance& chance) {
  if (waiting_.empty() || waiting_.back().after != after_) waiting_.push_back({after_, {}});
  const uint64_t now = Now();
  const Message whole = operation.message;
  for (uint64_t at = 0; at < whole.bytes; at += kPartBytes) {
    Operation part = operation;
    part.message.address = whole.address + at;
    part.message.bytes = std::min<uint64_t>(whole.bytes - at, kPartBytes);
    part.message.after = after_;
    part.message.due = chance.Later(now);
    if (part.local != 0) part.local += at;
    waiting_.back().operations.push_back(part);
    ++num_added_;
  }
  if (waiting_.back().operations.empty()) waiting_.pop_back();  // an operation of no bytes
}

void Sender::Step(Copies& copies, Chance& chance, bool start_all) {
  if (num_sent_ > 0) Finish(copies);
  if (!waiting_.empty()) Start(copies, chance, start_all);
}

void Sender::Finish(Copies& copies) {
  int done[kSlots], count = 0;
  for (int i = 0; i < kSlots; ++i) {
    if (!is_sent_[i]) continue;
    if (lane_->slots[i].state.load(std::memory_order_acquire) == SlotState::kDone) {
      done[count++] = i;
    }
  }
  for (int n = 0; n < count; ++n) {
    const Operation& operation = sent_[done[n]];
    if (operation.message.kind == Kind::kGet) {
      copies.ToDevice(operation.local, lane_->data[done[n]], operation.message.bytes);
    } else if (operation.message.kind == Kind::kAtomic && operation.local != 0) {
      copies.ToDevice(operation.local, &lane_->slots[done[n]].old, sizeof(uint64_t));
    }
  }
  copies.Wait();  // a flag says that its value is there
  for (int n = 0; n < count; ++n) {
    const Operation& operation = sent_[done[n]];
    if (operation.message.kind != Kind::kAtomic || operation.local == 0) continue;
    copies.ToDevice(operation.local + sizeof(uint64_t), &lane_->slots[done[n]].return_flag,
                    sizeof(uint64_t));
  }
  copies.Wait();
  for (int n = 0; n < count; ++n) {
    is_sent_[done[n]] = false;
    lane_->slots[done[n]].state.store(SlotState::kFree, std::memory_order_relaxed);
  }
  num_sent_ -= count;
}

void Sender::Start(Copies& copies, Chance& chance, bool start_all) {
  int started[kSlots], count = 0;
  int free[kSlots], num_free = 0;
  for (int i = 0; i < kSlots; ++i) {
    if (!is_sent_[i]) free[num_free++] = i;
  }
  const uint64_t now = Now();
  // No message takes a slot before all that come before it have one: the receiver waits for those,
  // and meanwhile frees no slot.
  while (!waiting_.empty() && num_free > 0) {
    std::vector<Operation>& operations = waiting_.front().operations;
    for (size_t left = operations.size(), at = chance.Below(left); left > 0 && num_free > 0;
         --left) {
      if (at >= operations.size()) at = 0;
      if (!start_all && operations[at].message.due > now) {
        ++at;
        continue;
      }
      const int slot = free[--num_free];
      Fill(slot, operations[at], copies, chance);
      started[count++] = slot;
      operations[at] = operations.back();
      operations.pop_back();
    }
    if (!operations.empty()) break;
    waiting_.pop_front();
  }
  copies.Wait();
  for (int n = 0; n < count; ++n) {
    lane_->slots[started[n]].state.store(SlotState::kSent, std::memory_order_release);
  }
}

void Sender::Fill(int slot, const Operation& operation, Copies& copies, Chance& chance) {
  Slot& into = lane_->slots[slot];
  into.message = operation.message;
  into.message.due = chance.Later(Now());
  into.return_flag = operation.return_flag;
  if (operation.message.kind == Kind::kPut) {
    if (operation.is_inline) {
      std::memcpy(lane_->data[slot], &operation.message.value, operation.message.bytes);
    } else {
      copies.ToHost(lane_->data[slot], operation.local, operation.message.bytes);
    }
  }
  sent_[slot] = operation;
  is_sent_[slot] = true;
  ++num_sent_;
}

}  // namespace jax_ep::late
