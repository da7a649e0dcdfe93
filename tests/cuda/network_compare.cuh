// How network_test and network_plan_test compare results, step by step.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels_case.cuh"

namespace {

int num_wrong = 0;

template <typename T>
void Compare(const char* what, int step, int rank, const Buffer<T>& buffer) {
  const std::vector<T> got = buffer.FromDevice();
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &buffer.host[i], sizeof(T)) != 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return;
  std::printf("WRONG %s of rank %d in step %d: %zu of %zu, first at %zu\n", what, rank, step, wrong,
              got.size(), first);
  ++num_wrong;
}

template <typename T>
void Poison(Buffer<T>& buffer) {
  FillDevice(buffer.device, 0xAB, buffer.host.size() * sizeof(T));
}

// Waits for the op on all ranks; reports those that failed.
inline void Finish(const char* op, int step, const std::vector<Rank>& ranks) {
  for (size_t r = 0; r < ranks.size(); ++r) {
    CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    const cuda::ErrorRecord& error = *ranks[r].error;
    if (error.set == 0) continue;
    std::printf(
        "FAILED %s of rank %zu in step %d: kind %u, word %u, peer %u, expected %llx, saw %llx\n",
        op, r, step, error.kind, error.word, error.peer,
        static_cast<unsigned long long>(error.expected),
        static_cast<unsigned long long>(error.seen));
    ++num_wrong;
  }
}

}  // namespace
