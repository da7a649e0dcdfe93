#include "mailbox.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace jax_ep::late {
namespace {

[[noreturn]] void Fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

Lane* Map(int file, int first, int count) {
  void* memory = mmap(nullptr, sizeof(Lane) * count, PROT_READ | PROT_WRITE, MAP_SHARED, file,
                      static_cast<off_t>(sizeof(Lane)) * first);
  if (memory == MAP_FAILED) Fail("cannot map a mailbox");
  return static_cast<Lane*>(memory);
}

}  // namespace

Mailbox::Mailbox(int num_pes) : num_pes_(num_pes) {
  file_ = memfd_create("jax_ep_late", MFD_CLOEXEC);
  if (file_ < 0) Fail("cannot make a mailbox");
  if (ftruncate(file_, static_cast<off_t>(sizeof(Lane)) * num_pes) != 0) {
    Fail("no room for a mailbox");
  }
  lanes_ = Map(file_, 0, num_pes);
}

Mailbox::~Mailbox() {
  for (Lane* lane : opened_) munmap(lane, sizeof(Lane));
  munmap(lanes_, sizeof(Lane) * num_pes_);
  close(file_);
}

Mailbox::Address Mailbox::address() const { return {getpid(), file_}; }

Lane* Mailbox::Open(Address address, int from) {
  const std::string path =
      "/proc/" + std::to_string(address.process) + "/fd/" + std::to_string(address.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) Fail("cannot open a peer's mailbox, " + path);
  opened_.reserve(opened_.size() + 1);
  Lane* const lane = Map(file, from, 1);
  close(file);
  opened_.push_back(lane);
  return lane;
}

}  // namespace jax_ep::late
