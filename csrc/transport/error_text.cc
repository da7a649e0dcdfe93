#include "transport/error_text.h"

#include <cstdint>

#include "cuda/network/layout.h"

namespace jax_ep::transport {
namespace {

using cuda::ErrorRecord;

const char* OpName(uint32_t op) {
  constexpr const char* kNames[] = {"plan", "dispatch", "combine", "combine_vjp"};
  return op < 4 ? kNames[op] : "unknown";
}

const char* PhaseName(cuda::Phase phase) {
  switch (phase) {
    case cuda::Phase::kArrival:
      return "arrival";
    case cuda::Phase::kClose:
      return "close";
    case cuda::Phase::kRows:
      return "rows";
  }
  return "unknown";
}

std::string FlagText(uint64_t flag) {
  return "epoch " + std::to_string(flag >> cuda::kTagBits) + " tag " +
         std::to_string(flag & ((1u << cuda::kTagBits) - 1));
}

// What a wait expected of a word, and what an earlier op had left there.
std::string WordText(const ErrorRecord& error) {
  const auto text = [&](const char* what, auto describe, uint64_t mask) {
    const bool is_empty = (error.seen & mask) == 0;
    return "; expected the " + std::string(what) + " of " + describe(error.expected) + ", saw " +
           (is_empty ? "none" : "that of " + describe(error.seen));
  };
  const auto publication = [](uint64_t word) {
    return "publication " + std::to_string(word & 0xffff) + " modulo 65536";
  };
  const auto epoch = [](uint64_t word) { return "epoch " + std::to_string(word & 0xffffffff); };
  const auto epoch_and_token = [](uint64_t word) {
    return "epoch " + std::to_string(word >> 32) + ", token " + std::to_string(word & 0xffffffff);
  };
  const auto epoch_and_chunk = [](uint64_t word) {
    return "epoch " + std::to_string(word >> 32) + ", chunk " +
           std::to_string(word & ((1u << cuda::kChunkBits) - 1));
  };
  const auto latency_epoch = [](uint64_t word) {
    return "latency mode's epoch " + std::to_string(word);
  };
  switch (static_cast<cuda::WordKind>(error.word)) {
    case cuda::WordKind::kArrivalFlag:
    case cuda::WordKind::kCloseFlag:
      return "; expected " + FlagText(error.expected) + ", saw " + FlagText(error.seen);
    case cuda::WordKind::kAddress:
      return text("address", publication, ~uint64_t{0});
    case cuda::WordKind::kTotal:
      return text("total", epoch, 0xffffffff);
    case cuda::WordKind::kMessage:
      return text("message", epoch, 0xffffffff);
    case cuda::WordKind::kSum:
      return text("sum", epoch_and_token, ~uint64_t{0});
    case cuda::WordKind::kCastChunk:
      return text("cast of the chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kSumRead:
      return text("receipt for the sum", epoch_and_token, ~uint64_t{0});
    case cuda::WordKind::kChunkArrived:
      return text("chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kChunkReady:
      return text("word that its chunk is there", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kChunkDone:
      return text("receipt of its host for the chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kCredit:
      return text("credit for the chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kPart:
      return text("part of the chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kPartDone:
      return text("receipt for the part of the chunk", epoch_and_chunk, ~uint64_t{0});
    case cuda::WordKind::kHello:
      return "; expected latency mode's " + FlagText(error.expected) + ", saw " +
             FlagText(error.seen);
    case cuda::WordKind::kIds:
      return text("ids", latency_epoch, ~uint64_t{0});
    case cuda::WordKind::kRowWords:
      return text("row", latency_epoch, ~uint64_t{0});
    case cuda::WordKind::kSumWords:
      return text("sum", latency_epoch, ~uint64_t{0});
    case cuda::WordKind::kNone:
      break;
  }
  return "";
}

}  // namespace

std::string ErrorText(const ErrorRecord& error) {
  std::string text = "jax_ep.CommunicationError: rank " + std::to_string(error.rank) + ", op " +
                     OpName(error.op) + ", phase " +
                     PhaseName(cuda::PhaseOf(static_cast<cuda::WordKind>(error.word))) + ": ";
  const std::string peer = "rank " + std::to_string(error.peer);
  switch (static_cast<cuda::ErrorKind>(error.kind)) {
    case cuda::ErrorKind::kTimeout:
      text += "waited " + std::to_string(static_cast<double>(error.waited_ns) * 1e-9) + " s for " +
              peer + WordText(error);
      break;
    case cuda::ErrorKind::kMismatch:
      text += peer + " is at another op" + WordText(error);
      break;
    case cuda::ErrorKind::kPeerLost:
      text += "the process of " + peer + " is gone" + WordText(error);
      break;
    case cuda::ErrorKind::kUnreachable:
      text += "an input is in memory that its peers cannot read";
      break;
    case cuda::ErrorKind::kConcurrent:
      text += "another op of the group was running at the same time";
      break;
    case cuda::ErrorKind::kUnpaired:
      text +=
          "the start and done halves of ops in flight did not alternate on their channel; call the "
          "done half of every ticket, in the function that made it";
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
