// A thread that watches deadlines.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace jax_ep::cpu {

// Calls `check` on a thread of its own whenever one of the given deadlines may have passed. The
// object and its thread live until the process ends. That may happen at any moment, because they
// use neither Python nor anything with a destructor.
class Watchdog {
 public:
  using Clock = std::chrono::steady_clock;

  // `check` handles overdue work and returns the next deadline, or Clock::time_point::max().
  explicit Watchdog(std::function<Clock::time_point()> check);
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog() = delete;

  // Starts the thread if it does not run. Throws std::system_error if the system gives none.
  void Start();

  // Makes sure that `check` is called by `deadline`. Cheap unless the deadline is the earliest.
  void WakeBy(Clock::time_point deadline);

 private:
  void Loop();

  const std::function<Clock::time_point()> check_;
  std::once_flag started_;
  std::mutex mutex_;
  std::condition_variable earlier_;
  Clock::time_point wake_at_ = Clock::time_point::max();  // guarded by mutex_
};

}  // namespace jax_ep::cpu
