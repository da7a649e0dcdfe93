#include "network.h"

#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

namespace jax_ep::late {
namespace {

bool IsSignal(const Message& message) {
  return message.kind == Kind::kAtomic &&
         (message.amo == abi::kSignal || message.amo == abi::kSignalSet ||
          message.amo == abi::kSignalAdd);
}

void Meet(int status) {
  if (status != 0)
    throw std::runtime_error("NVSHMEM's bootstrap failed with " + std::to_string(status));
}

}  // namespace

Network::Network() : settings_(ReadSettings()), driver_(settings_.driver) {}

Network::~Network() {
  for (Lane* lane : pinned_) driver_.Unpin(lane);
}

void Network::Connect(int pe, int num_pes, abi::Bootstrap& bootstrap) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (mailbox_ != nullptr) throw std::runtime_error("the PEs are connected already");
  pe_ = pe;
  chance_.emplace(settings_.seed, pe, settings_.delay_ns);
  counts_ = std::make_unique<Counts>(settings_.counts, pe, num_pes);
  mailbox_ = std::make_unique<Mailbox>(num_pes);
  lost_after_stop_.resize(num_pes);
  if (settings_.drop_signal && settings_.drop_signal->pe >= num_pes) {
    throw std::runtime_error("JAX_EP_LATE_DROP_SIGNAL: expected one of " + std::to_string(num_pes) +
                             " PEs, got " + std::to_string(settings_.drop_signal->pe));
  }
  if (settings_.faulty_pe.value_or(pe) == pe) {
    drop_ = settings_.drop_signal;
    left_ = settings_.stop_after;
  }
  const Mailbox::Address mine = mailbox_->address();
  std::vector<Mailbox::Address> all(num_pes);
  Meet(bootstrap.all_gather(&mine, all.data(), sizeof mine, &bootstrap));
  for (int peer = 0; peer < num_pes; ++peer) {
    // Of this PE too: two mappings of one memory would be pinned twice, which CUDA may refuse.
    Lane* const in = mailbox_->lane(peer);
    Lane* const out = peer == pe ? in : mailbox_->Open(all[peer], pe);
    receivers_.emplace_back(in);
    senders_.emplace_back(out);
    for (Lane* lane : {in, out}) {
      if (lane == out && peer == pe) continue;
      driver_.Pin(lane, sizeof(Lane));
      pinned_.push_back(lane);
    }
  }
  Meet(bootstrap.barrier(&bootstrap));
}

void Network::Add(int pe, const Operation& operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Message& message = operation.message;
  const bool is_signal = IsSignal(message);
  const bool is_lost = IsLost(pe, is_signal);
  if (settings_.trace) Trace(pe, operation, is_lost);
  if (is_lost) return counts_->Add(pe, kLost, 1);
  if (message.kind == Kind::kPut) {
    counts_->Add(pe, kPuts, 1);
    counts_->Add(pe, kPutBytes, message.bytes);
  } else if (message.kind == Kind::kGet) {
    counts_->Add(pe, kGets, 1);
    counts_->Add(pe, kGetBytes, message.bytes);
  } else {
    counts_->Add(pe, is_signal ? kSignals : kAtomics, 1);
  }
  senders_.at(pe).Add(operation, *chance_);
}

bool Network::IsLost(int pe, bool is_signal) {
  if (left_) {
    if (*left_ == 0) {
      lost_after_stop_[pe] = true;
      return true;
    }
    --*left_;
  }
  if (!drop_ || !is_signal || drop_->pe != pe || --drop_->number > 0) return false;
  drop_.reset();
  return true;
}

void Network::Trace(int pe, const Operation& operation, bool is_lost) const {
  static constexpr const char* kKinds[] = {"put", "get", "atomic"};
  const Message& message = operation.message;
  std::fprintf(stderr, "late network %d->%d: %s %d at %#lx, %lu bytes, value %#lx%s\n", pe_, pe,
               kKinds[static_cast<int>(message.kind)], message.amo, message.address, message.bytes,
               message.value, is_lost ? ", lost" : "");
}

void Network::Fence(int pe) {
  const std::lock_guard<std::mutex> lock(mutex_);
  counts_->Add(pe, kFences, 1);
  senders_.at(pe).Fence();
}

void Network::Quiet(int pe) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Copies copies(driver_);
  while (true) {
    senders_.at(pe).Step(copies, *chance_, true);
    if (!senders_[pe].HasWork()) break;
    // The peer may wait in a quiet of its own for what it has sent here.
    for (Receiver& receiver : receivers_) receiver.Step(copies, *chance_);
    std::this_thread::yield();
  }
  if (lost_after_stop_[pe]) {
    throw std::runtime_error("PE " + std::to_string(pe) + " cannot be reached: the network of PE " +
                             std::to_string(pe_) +
                             " has stopped, as JAX_EP_LATE_STOP_AFTER or "
                             "a test wants it");
  }
}

void Network::Progress() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Copies copies(driver_);
  for (Receiver& receiver : receivers_) receiver.Step(copies, *chance_);
  for (Sender& sender : senders_) sender.Step(copies, *chance_, false);
}

void Network::DropSignal(int pe, uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  NeedPe(pe);
  if (number == 0) throw std::out_of_range("signals are counted from 1");
  drop_ = SignalToDrop{pe, number};
}

void Network::StopAfter(uint64_t operations) {
  const std::lock_guard<std::mutex> lock(mutex_);
  NeedPe(pe_);
  left_ = operations;
}

std::array<uint64_t, kNumCounts> Network::CountsOf(int pe) {
  const std::lock_guard<std::mutex> lock(mutex_);
  NeedPe(pe);
  return counts_->Of(pe);
}

void Network::NeedPe(int pe) const {
  if (pe < 0 || pe >= static_cast<int>(senders_.size())) throw std::out_of_range("no such PE");
}

}  // namespace jax_ep::late
