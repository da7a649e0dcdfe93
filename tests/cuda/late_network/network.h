// One PE's side of the network. NVSHMEM calls it from its proxy thread and from callers of host
// functions; whoever calls, also delivers.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "abi.h"
#include "chance.h"
#include "counts.h"
#include "driver.h"
#include "lane.h"
#include "mailbox.h"
#include "receiver.h"
#include "sender.h"
#include "settings.h"

namespace jax_ep::late {

class Network {
 public:
  // Copies to and from the GPU of the calling thread's context.
  Network();
  ~Network();

  // Meets the other PEs; before any operation.
  void Connect(int pe, int num_pes, abi::Bootstrap& bootstrap);

  void Add(int pe, const Operation& operation);
  void Fence(int pe);

  // Returns when all operations towards `pe` have been delivered. Throws if the network has stopped
  // and has lost some of them.
  void Quiet(int pe);

  void Progress();

  // Faults, for tests; counted from now. The n-th signal towards `pe` gets lost. After `operations`
  // more, all that this PE sends gets lost. These and CountsOf throw std::out_of_range where there
  // is no such PE, or no connection yet.
  void DropSignal(int pe, uint64_t number);
  void StopAfter(uint64_t operations);

  std::array<uint64_t, kNumCounts> CountsOf(int pe);

 private:
  void NeedPe(int pe) const;
  bool IsLost(int pe, bool is_signal);
  void Trace(int pe, const Operation& operation, bool is_lost) const;

  const Settings settings_;
  Driver driver_;
  std::mutex mutex_;
  int pe_ = -1;
  std::unique_ptr<Mailbox> mailbox_;
  std::vector<Lane*> pinned_;
  std::unique_ptr<Counts> counts_;
  std::optional<Chance> chance_;
  std::vector<Sender> senders_;
  std::vector<Receiver> receivers_;
  std::optional<SignalToDrop> drop_;
  std::optional<uint64_t> left_;       // operations until the network stops
  std::vector<bool> lost_after_stop_;  // by PE
};

}  // namespace jax_ep::late
