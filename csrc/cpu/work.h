// Work on rows that several threads can share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/status.h"

namespace jax_ep::cpu {

// Rows that can be worked on independently. `run` handles [begin, end); it may be called from
// several threads at once, with ranges that do not overlap.
struct RowWork {
  int64_t num_rows = 0;
  int64_t bytes_per_row = 0;  // payload, to decide whether to share the work
  std::function<Status(int64_t begin, int64_t end)> run;
};

// The first rank with other shapes or attributes than rank 0; 0 if there is none.
template <typename Args>
int64_t FindDisagreement(const std::vector<const Args*>& ranks) {
  for (size_t rank = 1; rank < ranks.size(); ++rank) {
    if (AgreedOn(*ranks[rank]) != AgreedOn(*ranks[0])) return static_cast<int64_t>(rank);
  }
  return 0;
}

// Work that fails because `rank` came to op `op` with other shapes or attributes than rank 0.
RowWork RanksDisagree(const char* op, int64_t rank);

// The error for an entry of a handle that is outside of [-1, limit). Handles are plain arrays, so a
// program may damage one, and that must not make an op read or write elsewhere.
Status BadHandleEntry(const char* op, const char* argument, int64_t rank, int64_t index,
                      int64_t limit, int32_t got);

// Threads to run tasks on.
struct ThreadPool {
  int64_t num_threads = 0;
  std::function<void(std::function<void()>)> schedule;
};

// Runs all of `work` and returns the first error, if there was one. Threads of `pool` share large
// work. The caller waits only for rows that one of them is working on at that moment, never for a
// task that has not started, so a busy pool cannot cause a deadlock. Exceptions of `run` become
// errors.
Status RunShared(RowWork work, const ThreadPool& pool);

}  // namespace jax_ep::cpu
