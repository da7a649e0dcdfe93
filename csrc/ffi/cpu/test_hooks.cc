#include "ffi/cpu/test_hooks.h"

#include <atomic>
#include <chrono>
#include <random>
#include <thread>

namespace jax_ep {
namespace {

std::array<std::atomic<int64_t>, kNumTargets> call_counts{};
std::atomic<int64_t> max_delay_us{0};

}  // namespace

void OnCall(Target target) {
  call_counts[static_cast<int>(target)].fetch_add(1, std::memory_order_relaxed);
  const int64_t max_us = max_delay_us.load(std::memory_order_relaxed);
  if (max_us <= 0) return;
  thread_local std::minstd_rand random(std::random_device{}());
  std::uniform_int_distribution<int64_t> delay_us(0, max_us);
  std::this_thread::sleep_for(std::chrono::microseconds(delay_us(random)));
}

std::array<int64_t, kNumTargets> CallCounts() {
  std::array<int64_t, kNumTargets> counts;
  for (int i = 0; i < kNumTargets; ++i) counts[i] = call_counts[i].load();
  return counts;
}

void ResetCallCounts() {
  for (auto& count : call_counts) count = 0;
}

void SetTestDelay(int64_t max_us) { max_delay_us = max_us; }

}  // namespace jax_ep
