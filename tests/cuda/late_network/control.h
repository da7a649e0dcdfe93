// What a test in the same process may call, for example through ctypes.CDLL(None).
#pragma once

#include <cstdint>

extern "C" {

// Stores what this process has handed to the network for `pe`: puts and their bytes, gets and their
// bytes, signals, other atomics, fences, and operations that got lost. 0, or 1 where there is no
// such PE or no network yet.
int jax_ep_late_counts(int pe, uint64_t* counts);

// Loses the n-th signal from now on towards `pe`; n is 1 or more. 0, or 1 for a wrong number or as
// above.
int jax_ep_late_drop_signal(int pe, uint64_t number);

// Loses all that this process sends after so many operations from now on. 0, or 1 as above.
int jax_ep_late_stop_after(uint64_t operations);
}
