// Checks of what XLA hands to a handler, with errors that print what was expected and what came.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Collects the first thing that is wrong with a call of one op. After a failed check the values
// that later checks need may be nonsense; that is harmless, since the call will not run.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  bool ok() const { return failure_.empty(); }
  // What is wrong, as XLA takes it; success if nothing is.
  ::xla::ffi::Error error() const;

  // `what` is "argument x", "result rows" or "attribute layout".
  void Fail(const std::string& what, const std::string& expected, const std::string& got);

  // Fails unless `condition` holds.
  void Attribute(const char* name, bool condition, const char* expected, int64_t got);
  void Argument(const char* name, ::xla::ffi::AnyBuffer got, ::xla::ffi::DataType dtype,
                std::initializer_list<int64_t> dims);
  void Result(const char* name, ::xla::ffi::AnyBuffer got, ::xla::ffi::DataType dtype,
              std::initializer_list<int64_t> dims);

  void Buffer(const std::string& what, ::xla::ffi::AnyBuffer got, ::xla::ffi::DataType dtype,
              std::initializer_list<int64_t> dims);

  // The extents of a two-dimensional argument; zeros if it is not one.
  struct Matrix {
    int64_t rows;
    int64_t cols;
  };
  Matrix MatrixArgument(const char* name, ::xla::ffi::AnyBuffer got);

 private:
  const char* op_;
  std::string failure_;
};

// Optional operands and results are arrays of shape (0,) when absent.
bool IsPresent(::xla::ffi::AnyBuffer buffer);

// Its dtype and dimensions, as in "BF16[16,128]".
std::string Describe(::xla::ffi::AnyBuffer buffer);

}  // namespace jax_ep
