#include "cpu/watchdog.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <thread>
#include <utility>

namespace jax_ep::cpu {

Watchdog::Watchdog(std::function<Clock::time_point()> check) : check_(std::move(check)) {}

void Watchdog::Start() {
  std::call_once(started_, [this] {
    // Signals are for the application's threads: the new one inherits a mask that blocks them all.
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    try {
      std::thread([this] { Loop(); }).detach();
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &previous, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  });
}

void Watchdog::WakeBy(Clock::time_point deadline) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (deadline >= wake_at_) return;
  wake_at_ = deadline;
  earlier_.notify_one();
}

void Watchdog::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    if (wake_at_ == Clock::time_point::max()) {
      // Not wait(lock): GCC 12 made that a new symbol, which the libstdc++ of glibc 2.34's systems
      // lacks.
      earlier_.wait_for(lock, std::chrono::hours(1));
    } else {
      earlier_.wait_until(lock, wake_at_);
    }
    if (Clock::now() < wake_at_) continue;
    wake_at_ = Clock::time_point::max();
    lock.unlock();
    const Clock::time_point next = check_();
    lock.lock();
    wake_at_ = std::min(wake_at_, next);
  }
}

}  // namespace jax_ep::cpu
