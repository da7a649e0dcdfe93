// What tests of failures expect of the ranks: a count of what is wrong, and results that are
// poison.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/core/ptx.cuh"
#include "kernels_case.cuh"

namespace {

constexpr int kUntouched = 0xAB;  // what Buffer::Resize writes
int num_wrong = 0;

void Expect(bool holds, int rank, const char* what) {
  if (holds) return;
  std::printf("WRONG on rank %d: %s\n", rank, what);
  ++num_wrong;
}

__global__ void ReadTime(uint64_t* time) { *time = cuda::ptx::GlobalTimer(); }

// Nanoseconds from when all ranks had begun their last op until one of them, with `times`, had
// ended its own. A host that is late to launch an op keeps the other ranks waiting, which they may.
// `all` has when each began and ended; ranks without an op have earlier times, or none.
inline uint64_t EndedAfter(const std::vector<Buffer<uint64_t>>& all,
                           const std::vector<uint64_t>& times) {
  uint64_t begun = times[0];
  for (const Buffer<uint64_t>& of_rank : all) {
    const uint64_t other = of_rank.FromDevice()[0];
    if (other < times[1]) begun = std::max(begun, other);
  }
  return times[1] - begun;
}

// Every byte of a result is 0xff, but its last `guard` elements are as they were.
template <typename T>
void ExpectPoison(int rank, const char* name, const Buffer<T>& buffer, size_t guard = 0) {
  const std::vector<T> got = buffer.FromDevice();
  const auto* bytes = reinterpret_cast<const unsigned char*>(got.data());
  const auto* end = bytes + (got.size() - guard) * sizeof(T);
  const auto* guard_end = bytes + got.size() * sizeof(T);
  const auto is = [](int value) { return [=](int byte) { return byte == value; }; };
  Expect(std::all_of(bytes, end, is(0xff)), rank, (std::string(name) + ": no poison").c_str());
  Expect(std::all_of(end, guard_end, is(kUntouched)), rank,
         (std::string(name) + ": written past the end").c_str());
}

}  // namespace
