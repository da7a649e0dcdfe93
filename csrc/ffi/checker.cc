#include "ffi/checker.h"

#include <algorithm>

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

std::string NameOf(ffi::DataType dtype) {
  switch (dtype) {
#define JAX_EP_NAME_OF(name) \
  case ffi::DataType::name:  \
    return #name;
    JAX_EP_NAME_OF(PRED)
    JAX_EP_NAME_OF(S8)
    JAX_EP_NAME_OF(S16)
    JAX_EP_NAME_OF(S32)
    JAX_EP_NAME_OF(S64)
    JAX_EP_NAME_OF(U8)
    JAX_EP_NAME_OF(U16)
    JAX_EP_NAME_OF(U32)
    JAX_EP_NAME_OF(U64)
    JAX_EP_NAME_OF(F16)
    JAX_EP_NAME_OF(BF16)
    JAX_EP_NAME_OF(F32)
    JAX_EP_NAME_OF(F64)
    JAX_EP_NAME_OF(F8E4M3FN)
    JAX_EP_NAME_OF(F8E5M2)
#undef JAX_EP_NAME_OF
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

// Without streams: with XLA's plugin for GPUs in the process, a std::ostringstream crashed here,
// probably because the plugin brings parts of a C++ library of its own.
template <typename Dims>
std::string Describe(ffi::DataType dtype, const Dims& dims) {
  std::string text = NameOf(dtype) + "[";
  const char* separator = "";
  for (int64_t dim : dims) {
    text += separator + std::to_string(dim);
    separator = ",";
  }
  return text + "]";
}

}  // namespace

std::string Describe(ffi::AnyBuffer buffer) {
  return Describe(buffer.element_type(), buffer.dimensions());
}

bool IsPresent(ffi::AnyBuffer buffer) {
  const auto dims = buffer.dimensions();
  return !(dims.size() == 1 && dims[0] == 0);
}

void Checker::Fail(const std::string& what, const std::string& expected, const std::string& got) {
  if (!ok()) return;
  failure_ = std::string("jax_ep.") + op_ + ": " + what + ": expected " + expected + ", got " + got;
}

void Checker::Attribute(const char* name, bool condition, const char* expected, int64_t got) {
  if (!condition) Fail(std::string("attribute ") + name, expected, std::to_string(got));
}

void Checker::Buffer(const std::string& what, ffi::AnyBuffer got, ffi::DataType dtype,
                     std::initializer_list<int64_t> dims) {
  const auto got_dims = got.dimensions();
  const bool same = got.element_type() == dtype && got_dims.size() == dims.size() &&
                    std::equal(dims.begin(), dims.end(), got_dims.begin());
  if (!same) Fail(what, Describe(dtype, dims), Describe(got));
}

void Checker::Argument(const char* name, ffi::AnyBuffer got, ffi::DataType dtype,
                       std::initializer_list<int64_t> dims) {
  Buffer(std::string("argument ") + name, got, dtype, dims);
}

void Checker::Result(const char* name, ffi::AnyBuffer got, ffi::DataType dtype,
                     std::initializer_list<int64_t> dims) {
  Buffer(std::string("result ") + name, got, dtype, dims);
}

Checker::Matrix Checker::MatrixArgument(const char* name, ffi::AnyBuffer got) {
  const auto dims = got.dimensions();
  if (dims.size() == 2) return {dims[0], dims[1]};
  Fail(std::string("argument ") + name, "two dimensions", Describe(got));
  return {0, 0};
}

ffi::Error Checker::error() const {
  return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(failure_);
}

}  // namespace jax_ep
