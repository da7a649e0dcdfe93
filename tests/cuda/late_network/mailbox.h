// The lanes into one PE, in memory that the other processes of the machine map.
//
// The memory has no name, so nothing is left of it after its processes, however they end. Others
// open it through /proc.
#pragma once

#include <vector>

#include "lane.h"

namespace jax_ep::late {

class Mailbox {
 public:
  // Where others find it.
  struct Address {
    int process, file;
  };

  // With a lane for each PE.
  explicit Mailbox(int num_pes);
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  Address address() const;
  Lane* lane(int from) const { return lanes_ + from; }

  // Maps the lane of PE `from` into the mailbox at `address`, until the end of this object.
  Lane* Open(Address address, int from);

 private:
  int file_ = -1;
  int num_pes_;
  Lane* lanes_ = nullptr;
  std::vector<Lane*> opened_;
};

}  // namespace jax_ep::late
