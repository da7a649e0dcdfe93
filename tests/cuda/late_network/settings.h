// What the environment asks of the network: variables JAX_EP_LATE_*, listed in README.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace jax_ep::late {

// The n-th signal towards a PE, counted from 1.
struct SignalToDrop {
  int pe;
  uint64_t number;
};

struct Settings {
  uint64_t delay_ns = 0;  // the longest: of each half of the way
  uint64_t seed = 1;
  bool trace = false;
  std::string counts;  // a folder; empty: no file
  // Faults, of each PE or of one.
  std::optional<int> faulty_pe;
  std::optional<SignalToDrop> drop_signal;
  std::optional<uint64_t> stop_after;  // operations that are carried
  std::string driver = "libcuda.so.1";
};

// Throws std::runtime_error, which names the variable, for a value that it cannot have.
Settings ReadSettings();

}  // namespace jax_ep::late
