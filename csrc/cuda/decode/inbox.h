// The memory of latency mode: what peers send a rank, in words that need no flag.
//
// A *word* has 12 bytes of a message and a stamp, the number of the op. A thread stores it, and
// another one loads it, in one access of 16 bytes, so whoever finds the stamp has the bytes too. An
// inbox has two halves, for even and for odd epochs. README.md says why two are enough. Every
// channel of a group has an inbox of its own, and the ops of a channel run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/workspace.h"
#include "plan/host_device.h"

namespace jax_ep::cuda {

// Limits of latency mode.
constexpr int32_t kMaxDecodeTokens = 512;        // T
constexpr int32_t kMaxDecodeTopK = 32;           // K
constexpr int32_t kMaxDecodeEntries = 1 << 16;   // R * T * K
constexpr int32_t kMaxDecodeCapacity = 1 << 30;  // C
constexpr int32_t kMaxDecodeBlocks = 256;        // of an op

constexpr int32_t kWordBytes = 12;  // of a message, in a word
constexpr int32_t kWordInts = kWordBytes / 4;
constexpr int32_t kIdsOfWord = 6;  // expert ids of 16 bits
// A row travels in parts of so many bytes: whole blocks of 128 channels of float8, which makes a
// row of 7168 bytes four parts.
constexpr int32_t kPartBytes = 1792;
constexpr int32_t kPartScales = kPartBytes / 128;

struct alignas(16) StampedWord {
  uint32_t data[kWordInts];
  uint32_t stamp;
};
static_assert(sizeof(StampedWord) == 16, "one access");

// What a launch does of an op: all of it, or what one of its two calls does.
enum class Calls : int32_t {
  kOne = 0,
  kStart = 1,  // sends all that peers need, and waits for nothing
  kDone = 2,   // waits for what the peers have sent, and ends the op
};

// The op that a start call has sent. Its done call finds it by the epoch.
struct alignas(16) SentOp {
  uint64_t epoch;
  uint32_t tag;   // of the start call
  uint32_t kind;  // of the op, the same for both calls
};
static_assert(sizeof(SentOp) == 16, "one access");

// What begins an inbox; the words of its halves follow.
struct DecodeInbox {
  // This rank only: the epoch that each block has ended last, and whether it runs. Blocks that an
  // op does not have count with it (EndDecode).
  uint64_t epochs[kMaxDecodeBlocks];
  uint32_t busy[kMaxDecodeBlocks];
  // When a thread that waits has last looked whether a peer is gone, in 2^20 ns, and padding.
  uint32_t looked, unused[3];
  SentOp sent;  // this rank only
  uint32_t more_unused[24];
  // Rank r writes entry r at the beginning of each op: the op's tag.
  StampedWord hello[2][kMaxRanks];

  JAX_EP_HOST_DEVICE StampedWord* Half(int parity, int64_t half_words) {
    return reinterpret_cast<StampedWord*>(this + 1) + parity * half_words;
  }
};
static_assert(sizeof(DecodeInbox) % 128 == 0, "the words after it are aligned");

// The words of an op in a half of an inbox: the ids of all tokens, by source rank, token and word;
// then the rows of all other ranks, by share (the rank, without the inbox's own), token and part.
// Each part has its bytes, then its scales, and the last one the token's weights.
struct DecodeSlots {
  int32_t num_ranks;   // R
  int32_t num_tokens;  // T
  int32_t id_words;    // of a token
  int32_t parts;       // P of a row
  int32_t part_words;  // of all parts but the last
  int32_t row_words;

  JAX_EP_HOST_DEVICE int64_t IdsAt(int32_t source, int32_t token) const {
    return (int64_t{source} * num_tokens + token) * id_words;
  }
  JAX_EP_HOST_DEVICE int64_t RowAt(int32_t share, int32_t token, int32_t part) const {
    return int64_t{num_ranks} * num_tokens * id_words +
           (int64_t{share} * num_tokens + token) * row_words + int64_t{part} * part_words;
  }
  JAX_EP_HOST_DEVICE int64_t NumWords() const { return RowAt(num_ranks - 1, 0, 0); }
};

JAX_EP_HOST_DEVICE constexpr int32_t WordsOf(int32_t count, int32_t in_a_word) {
  return (count + in_a_word - 1) / in_a_word;
}

// Where home has the sums or rows of rank `source`.
JAX_EP_HOST_DEVICE int32_t DecodeShare(int32_t source, int32_t home) {
  return source < home ? source : source - 1;
}

// For rows of `row_bytes` that travel with scales and `num_weights` weights. Without ids top_k is
// 0.
inline DecodeSlots DecodeSlotsOf(int32_t num_ranks, int32_t num_tokens, int32_t top_k,
                                 int64_t row_bytes, bool has_scales, int32_t num_weights) {
  constexpr int32_t kLine = 8;  // words
  const auto lines = [](int32_t words) { return (words + kLine - 1) / kLine * kLine; };
  DecodeSlots slots{};
  slots.num_ranks = num_ranks;
  slots.num_tokens = num_tokens;
  slots.id_words = WordsOf(top_k, kIdsOfWord);
  slots.parts = static_cast<int32_t>((row_bytes + kPartBytes - 1) / kPartBytes);
  if (slots.parts == 0) slots.parts = 1;
  const int32_t part_bytes = static_cast<int32_t>(row_bytes < kPartBytes ? row_bytes : kPartBytes);
  slots.part_words =
      lines(WordsOf(part_bytes, kWordBytes) + (has_scales ? WordsOf(kPartScales, kWordInts) : 0));
  slots.row_words = slots.parts * slots.part_words + lines(WordsOf(num_weights, kWordInts));
  return slots;
}

// Words of each half of the inboxes of a group that was made for `tokens` tokens a rank of `hidden`
// channels of 16 bits.
inline int64_t DecodeHalfWords(int32_t num_ranks, int32_t tokens, int32_t hidden) {
  return DecodeSlotsOf(num_ranks, tokens, kMaxDecodeTopK, 2 * int64_t{hidden}, false,
                       kMaxDecodeTopK)
      .NumWords();
}

// Bytes of the inbox of a channel; 0 without latency mode.
inline int64_t DecodeInboxBytes(int32_t num_ranks, int32_t tokens, int32_t hidden) {
  if (tokens == 0) return 0;
  const int64_t bytes =
      static_cast<int64_t>(sizeof(DecodeInbox)) +
      2 * DecodeHalfWords(num_ranks, tokens, hidden) * static_cast<int64_t>(sizeof(StampedWord));
  return (bytes + 127) / 128 * 128;
}

// The inboxes of a channel of a group, at this device's addresses.
struct DecodeInboxes {
  DecodeInbox* of[kMaxRanks];
  int64_t half_words;
};

// What latency mode expects instead of this, or null.
inline const char* DecodeObstacle(const DecodeInboxes& inboxes, const DecodeSlots& slots,
                                  int32_t top_k) {
  if (slots.num_tokens > kMaxDecodeTokens) return "at most 512 tokens a rank";
  if (top_k > kMaxDecodeTopK) return "a top_k of at most 32";
  if (int64_t{slots.num_ranks} * slots.num_tokens * top_k > kMaxDecodeEntries) {
    return "at most 65536 entries of topk_idx over all ranks";
  }
  if (inboxes.half_words == 0) {
    return "a group made with create_group(latency_tokens=, latency_hidden=)";
  }
  if (slots.NumWords() > inboxes.half_words) {
    return "rows that the group's inboxes have room for; give create_group larger latency_tokens= "
           "or latency_hidden= (float32 rows count twice)";
  }
  return nullptr;
}

}  // namespace jax_ep::cuda
