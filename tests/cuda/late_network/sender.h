// What a PE sends to one other PE: operations that wait to leave, and those that are on their way.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "chance.h"
#include "driver.h"
#include "lane.h"

namespace jax_ep::late {

struct Operation {
  Message message;  // of the whole operation; its order and time are filled in when it is added
  uint64_t local;   // GPU memory: source of a put, destination of a get, place of an old value
  uint64_t return_flag;  // of an atomic that gives the old value: stored behind it
  bool is_inline;        // the data of a put is `message.value`
};

class Sender {
 public:
  explicit Sender(Lane* lane) : lane_(lane) {}

  void Add(Operation operation, Chance& chance);

  // What is added from now on is delivered after all that was added before.
  void Fence() { after_ = num_added_; }

  // Finishes operations that were delivered and starts others: those that are due, or, if somebody
  // waits for them, all. A source is read when its operation starts.
  void Step(Copies& copies, Chance& chance, bool start_all);

  bool HasWork() const { return !waiting_.empty() || num_sent_ > 0; }

 private:
  // Between two fences.
  struct Stretch {
    uint64_t after;
    std::vector<Operation> operations;  // in no order
  };

  void Finish(Copies& copies);
  void Start(Copies& copies, Chance& chance, bool start_all);
  void Fill(int slot, const Operation& operation, Copies& copies, Chance& chance);

  Lane* lane_;
  std::deque<Stretch> waiting_;
  Operation sent_[kSlots] = {};  // by slot
  bool is_sent_[kSlots] = {};
  int num_sent_ = 0;
  uint64_t num_added_ = 0;  // messages, so parts of operations
  uint64_t after_ = 0;
};

}  // namespace jax_ep::late
