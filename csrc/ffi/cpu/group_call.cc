#include "ffi/cpu/group_call.h"

#include <functional>

namespace jax_ep {

namespace ffi = ::xla::ffi;

cpu::ThreadPool PoolFrom(ffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

ffi::Error ToError(const cpu::Status& status) {
  switch (status.code()) {
    case cpu::StatusCode::kOk:
      return ffi::Error::Success();
    case cpu::StatusCode::kInvalidArgument:
      return ffi::Error::InvalidArgument(status.message());
    case cpu::StatusCode::kDeadlineExceeded:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, status.message());
    case cpu::StatusCode::kInternal:
      return ffi::Error::Internal(status.message());
  }
  return ffi::Error::Internal(status.message());
}

}  // namespace jax_ep
