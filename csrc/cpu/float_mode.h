// The floating-point mode of all arithmetic in this backend.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace jax_ep::cpu {

// While one lives, its thread rounds to nearest even and treats denormal float32 operands and
// results as zero. XLA runs its own code on CPU in this mode. Ops may run on threads that XLA did
// not set up, and their bits must not depend on the thread.
class ScopedFloatMode {
 public:
  ScopedFloatMode() : saved_(Get()) { Set(kMode); }
  ~ScopedFloatMode() { Set(saved_); }
  ScopedFloatMode(const ScopedFloatMode&) = delete;
  ScopedFloatMode& operator=(const ScopedFloatMode&) = delete;

 private:
#if defined(__SSE2__)
  using Word = uint32_t;
  // MXCSR: all exceptions masked, flush to zero (bit 15), denormals are zero (bit 6).
  static constexpr Word kMode = 0x1f80u | (1u << 15) | (1u << 6);
  static Word Get() { return _mm_getcsr(); }
  static void Set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kMode = Word{1} << 24;  // FPCR: flush to zero
  static Word Get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void Set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
#error "jax_ep: no floating-point mode is known for this processor (x86-64 and arm64 are)"
#endif

  Word saved_;
};

}  // namespace jax_ep::cpu
