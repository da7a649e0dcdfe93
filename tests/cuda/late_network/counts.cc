#include "counts.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace jax_ep::late {
namespace {

constexpr size_t kDigits = 20;  // of the largest number
constexpr const char* kNames[kNumCounts] = {"puts",    "put_bytes", "gets",   "get_bytes",
                                            "signals", "atomics",   "fences", "lost"};

void Write(char* place, uint64_t number) {
  for (size_t i = kDigits; i > 0; --i, number /= 10) {
    place[i - 1] = number == 0 && i < kDigits ? ' ' : static_cast<char>('0' + number % 10);
  }
}

}  // namespace

Counts::Counts(const std::string& folder, int pe, int num_pes) : numbers_(num_pes) {
  if (folder.empty()) return;
  const std::string path = folder + "/pe-" + std::to_string(pe) + ".json";
  places_.resize(num_pes);
  std::string text = "{\"pe\": " + std::to_string(pe) + ", \"to\": [";
  for (int to = 0; to < num_pes; ++to) {
    text += to == 0 ? "\n" : ",\n";
    for (int count = 0; count < kNumCounts; ++count) {
      text += std::string(count == 0 ? "{" : ", ") + "\"" + kNames[count] + "\": ";
      places_[to][count] = text.size();
      text.append(kDigits - 1, ' ').append("0");
    }
    text += "}";
  }
  text += "\n]}\n";
  bytes_ = text.size();
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  void* memory = MAP_FAILED;
  // Written first, because a store into a mapping of a full disk would kill the process.
  if (file >= 0 && write(file, text.data(), bytes_) == static_cast<ssize_t>(bytes_)) {
    memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  const int error = errno;
  if (file >= 0) close(file);
  if (memory == MAP_FAILED) {
    throw std::runtime_error("JAX_EP_LATE_COUNTS: cannot write " + path + ": " + strerror(error));
  }
  text_ = static_cast<char*>(memory);
}

Counts::~Counts() {
  if (text_ != nullptr) munmap(text_, bytes_);
}

void Counts::Add(int pe, Count count, uint64_t number) {
  numbers_[pe][count] += number;
  if (text_ != nullptr) Write(text_ + places_[pe][count], numbers_[pe][count]);
}

}  // namespace jax_ep::late
