#include "transport/error_text.h"

#include <cstdint>

namespace jax_ep::transport {
namespace {

using cuda::ErrorRecord;

const char* OpName(uint32_t op) {
  constexpr const char* kNames[] = {"plan", "dispatch", "combine", "combine_vjp"};
  return op < 4 ? kNames[op] : "unknown";
}

const char* PhaseName(uint32_t phase) {
  constexpr const char* kNames[] = {"arrival", "close", "rows"};
  return phase < 3 ? kNames[phase] : "unknown";
}

std::string FlagText(uint64_t flag) {
  return "epoch " + std::to_string(flag >> cuda::kTagBits) + " tag " +
         std::to_string(flag & ((1u << cuda::kTagBits) - 1));
}

}  // namespace

std::string ErrorText(const ErrorRecord& error) {
  std::string text = "jax_ep.CommunicationError: rank " + std::to_string(error.rank) + ", op " +
                     OpName(error.op) + ", phase " + PhaseName(error.phase) + ": ";
  const std::string peer = "rank " + std::to_string(error.peer);
  const std::string flags =
      "; expected " + FlagText(error.expected) + ", saw " + FlagText(error.seen);
  switch (static_cast<cuda::ErrorKind>(error.kind)) {
    case cuda::ErrorKind::kTimeout:
      text += "waited " + std::to_string(static_cast<double>(error.waited_ns) * 1e-9) + " s for " +
              peer + flags;
      break;
    case cuda::ErrorKind::kMismatch:
      text += peer + " is at another op" + flags;
      break;
    case cuda::ErrorKind::kPeerLost:
      text += "the process of " + peer + " is gone" + flags;
      break;
    case cuda::ErrorKind::kUnreachable:
      text += "an input is in memory that its peers cannot read";
      break;
    case cuda::ErrorKind::kConcurrent:
      text += "another op of the group was running at the same time";
      break;
    case cuda::ErrorKind::kMisplaced:
      return text + "the program's mesh has this device as rank " + std::to_string(error.peer) +
             " of group " + std::to_string(error.seen) +
             " along the axis, and the group's mesh as rank " + std::to_string(error.rank) +
             " of group " + std::to_string(error.expected) +
             "; make the group with the mesh that shard_map runs on.";
    default:
      text += "another rank of the group failed";
      if (error.peer != error.rank) text += " while this one waited for " + peer;
  }
  return text + ". The group takes no more ops; make it again with jax_ep.create_group.";
}

}  // namespace jax_ep::transport
