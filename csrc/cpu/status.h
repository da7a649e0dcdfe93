// The outcome of native host code. Nothing here throws to its caller or ends the process.
#pragma once

#include <string>
#include <utility>

namespace jax_ep::cpu {

enum class StatusCode { kOk, kInvalidArgument, kDeadlineExceeded, kInternal };

class Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace jax_ep::cpu
