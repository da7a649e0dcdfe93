// Delivers what one PE sends to this one.
#pragma once

#include <cstdint>

#include "chance.h"
#include "driver.h"
#include "lane.h"

namespace jax_ep::late {

class Receiver {
 public:
  explicit Receiver(Lane* lane) : lane_(lane) {}

  // Delivers, in random order, the messages that are due and not behind a fence.
  void Step(Copies& copies, Chance& chance);

 private:
  void Deliver(int slot, Copies& copies);

  Lane* lane_;
  uint64_t num_delivered_ = 0;
};

}  // namespace jax_ep::late
