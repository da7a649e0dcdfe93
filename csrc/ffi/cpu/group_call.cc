#include "ffi/cpu/group_call.h"

#include <functional>

namespace jax_ep {

namespace ffi = ::xla::ffi;

cpu::ThreadPool PoolFrom(ffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

}  // namespace jax_ep
