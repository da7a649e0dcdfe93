#include "cpu/work.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "cpu/float_mode.h"

namespace jax_ep::cpu {
namespace {

// So large that handing out a chunk costs nothing compared with moving it.
constexpr int64_t kChunkBytes = 256 * 1024;

// One piece of work in chunks. Lives as long as a task that might still look for a chunk.
class SharedRun {
 public:
  explicit SharedRun(RowWork work)
      : work_(std::move(work)),
        rows_per_chunk_(
            std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, work_.bytes_per_row))),
        num_chunks_(std::max<int64_t>(1, (work_.num_rows + rows_per_chunk_ - 1) / rows_per_chunk_)),
        num_unfinished_(num_chunks_) {}

  int64_t num_chunks() const { return num_chunks_; }

  // Works until every chunk has been started.
  void TakePart() {
    for (int64_t chunk = next_chunk_++; chunk < num_chunks_; chunk = next_chunk_++) {
      Status status;
      if (!failed_) status = RunChunk(chunk);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!status.ok() && !failed_.exchange(true)) status_ = std::move(status);
      if (--num_unfinished_ == 0) finished_.notify_one();
    }
  }

  // Waits for the chunks that others have started on.
  Status Finish() {
    std::unique_lock<std::mutex> lock(mutex_);
    // Not wait(lock), as in watchdog.cc.
    while (
        !finished_.wait_for(lock, std::chrono::hours(1), [this] { return num_unfinished_ == 0; })) {
    }
    return status_;
  }

 private:
  Status RunChunk(int64_t chunk) {
    const int64_t begin = chunk * rows_per_chunk_;
    const int64_t end = std::min(begin + rows_per_chunk_, work_.num_rows);
    try {
      ScopedFloatMode float_mode;
      return work_.run(begin, end);
    } catch (const std::exception& error) {
      return Status(StatusCode::kInternal, std::string("jax_ep: ") + error.what());
    }
  }

  const RowWork work_;
  const int64_t rows_per_chunk_;
  const int64_t num_chunks_;
  std::atomic<int64_t> next_chunk_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
  int64_t num_unfinished_;  // guarded by mutex_
  Status status_;           // guarded by mutex_
};

}  // namespace

RowWork RanksDisagree(const char* op, int64_t rank) {
  Status status(StatusCode::kInvalidArgument,
                std::string("jax_ep.") + op +
                    ": expected the same shapes and attributes on every " +
                    "rank, got others on rank " + std::to_string(rank) +
                    " than on rank 0; run one program on the whole group");
  RowWork work;
  work.run = [status = std::move(status)](int64_t, int64_t) { return status; };
  return work;
}

Status BadHandleEntry(const char* op, const char* argument, int64_t rank, int64_t index,
                      int64_t limit, int32_t got) {
  return Status(StatusCode::kInvalidArgument,
                std::string("jax_ep.") + op + ": argument " + argument +
                    ": expected entries in [-1, " + std::to_string(limit) + "), got " +
                    std::to_string(got) + " at flat index " + std::to_string(index) + " of rank " +
                    std::to_string(rank) + "; pass the handle that dispatch returned, unchanged");
}

Status RunShared(RowWork work, const ThreadPool& pool) {
  const auto run = std::make_shared<SharedRun>(std::move(work));
  static const int64_t num_cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t num_helpers = std::min({run->num_chunks(), num_cores, pool.num_threads}) - 1;
  for (int64_t i = 0; i < num_helpers; ++i) {
    pool.schedule([run] { run->TakePart(); });
  }
  run->TakePart();
  return run->Finish();
}

}  // namespace jax_ep::cpu
