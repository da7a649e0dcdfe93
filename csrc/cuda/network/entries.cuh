// The entries of a rank (network/routes.h).
#pragma once

#include <cstdint>

#include "cuda/network/routes.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// The first entry from `begin` to `end` whose token is `token` or a later one. By one warp, which
// looks at 32 of them at a time.
__device__ inline int32_t FirstEntry(const int32_t* tokens, int32_t begin, int32_t end,
                                     int32_t token) {
  const int32_t lane = threadIdx.x % 32;
  while (begin < end) {
    const int32_t step = (end - begin + 31) / 32;
    const int32_t at = begin + lane * step;
    const uint32_t below = __ballot_sync(~0u, at < end && tokens[at] < token);
    if (below == 0) return begin;
    const int32_t last = 31 - __clz(static_cast<int>(below));
    begin += last * step + 1;
    if (last < 31) end = plan::Min(end, begin + step - 1);
  }
  return begin;
}

// Neighbouring entries of one source rank.
struct EntryRange {
  int32_t begin, end;
};

// The entries from `begin` to `end` with tokens from `first` to before `last`, where both ends are
// likely among the 192 from `from` on: looks at those first. By one warp.
__device__ inline EntryRange EntriesNear(const int32_t* tokens, int32_t begin, int32_t end,
                                         int32_t first, int32_t last, int32_t from) {
  constexpr int kLooks = 6;
  const int32_t lane = threadIdx.x % 32;
  int32_t token[kLooks];
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    const int32_t at = from + 32 * i + lane;
    token[i] = at < end ? tokens[at] : INT32_MAX;
  }
  int32_t before = 0, up_to = 0;
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    before += __popc(__ballot_sync(~0u, token[i] < first));
    up_to += __popc(__ballot_sync(~0u, token[i] < last));
  }
  EntryRange range{from + before, from + up_to};
  if (before == 0 && from > begin) range.begin = FirstEntry(tokens, begin, from, first);
  if (before == 32 * kLooks) range.begin = FirstEntry(tokens, range.begin, end, first);
  if (up_to == 0 && from > begin) range.end = FirstEntry(tokens, range.begin, from, last);
  if (up_to == 32 * kLooks) range.end = FirstEntry(tokens, range.end, end, last);
  return range;
}

// Where a warp is in the entries of each source rank, as it goes through windows of their tokens in
// order. It remembers 32 of them, one in each lane.
class EntryCursors {
 public:
  // The entries of rank `source`, of all of its `num_tokens`, with tokens from `first` to before
  // `last`. `number` is the source's in this warp's order. By all lanes.
  __device__ EntryRange Find(const NetworkRoutes& routes, int32_t num_tokens, int32_t source,
                             int32_t number, int32_t first, int32_t last) {
    const int32_t end = routes.recv_start[source + 1];
    const bool is_known = number < 32;
    const int32_t token = is_known ? __shfl_sync(~0u, token_, number) : 0;
    int32_t begin = is_known ? __shfl_sync(~0u, entry_, number) : 0;
    if (token == 0) begin = routes.recv_start[source];
    // If each of the tokens that are left has as many entries as the others.
    const int64_t left = end - begin;
    const int32_t guess = static_cast<int32_t>(left * (first - token) / (num_tokens - token));
    const int32_t from = begin + max(guess - kBeforeGuess, 0);
    const EntryRange range = EntriesNear(routes.recv_token, begin, end, first, last, from);
    if (static_cast<int32_t>(threadIdx.x % 32) == number) entry_ = range.end, token_ = last;
    return range;
  }

 private:
  static constexpr int32_t kBeforeGuess = 56;

  int32_t token_ = 0, entry_ = 0;  // the entry is the source's first of this token or a later one
};

// The first entries of a range, at most 32 and only whole tokens. That is always possible, because
// no token has more than 32 rows on a rank. Each lane has one of them. By one warp.
struct EntryBatch {
  int32_t count;
  int32_t token, row;  // of the lane's entry; no token past `count`
  uint32_t heads;      // one bit for each entry: whether it is the first of its token

  __device__ EntryBatch(const NetworkRoutes& routes, EntryRange range) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t* const tokens = routes.recv_token;
    count = plan::Min(32, range.end - range.begin);
    token = plan::kNone, row = 0;
    if (lane < count) {
      token = tokens[range.begin + lane];
      row = routes.recv_row[range.begin + lane];
    }
    const int32_t before = __shfl_up_sync(~0u, token, 1);
    heads = __ballot_sync(~0u, lane < count && (lane == 0 || token != before));
    const int32_t last_token = __shfl_sync(~0u, token, count - 1);
    const int32_t end = range.begin + count;
    if (end < range.end && __popc(heads) > 1 && tokens[end] == last_token) {
      count = 31 - __clz(static_cast<int>(heads));  // the last token is cut off
      heads &= (1u << count) - 1;
      if (lane >= count) token = plan::kNone;
    }
  }
};

// Room for a warp's list of entries in shared memory.
struct EntryRoom {
  static constexpr int32_t kMost = 128;
  int32_t rows[kMost];
  int32_t of[kMost];  // the number of the entry's token in the list
  int32_t tokens[kMost], starts[kMost + 1];
};

// The first entries of a range, as many as there is room for, and only whole tokens. By one warp.
class EntryList {
 public:
  __device__ EntryList(const NetworkRoutes& routes, EntryRange range, EntryRoom& room)
      : room_(room), count_(plan::Min(EntryRoom::kMost, range.end - range.begin)) {
    constexpr int kLoads = EntryRoom::kMost / 32;
    const int32_t lane = threadIdx.x % 32;
    const uint32_t up_to_lane = lane == 31 ? ~0u : (2u << lane) - 1;
    int32_t token[kLoads], row[kLoads], next = plan::kNone;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t at = range.begin + 32 * i + lane;
      const bool is_in = 32 * i + lane < count_;
      token[i] = is_in ? routes.recv_token[at] : plan::kNone;
      row[i] = is_in ? routes.recv_row[at] : plan::kNone;
    }
    if (range.begin + count_ < range.end) next = routes.recv_token[range.begin + count_];
    __syncwarp();  // the room is free
    int32_t last = plan::kNone;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t entry = 32 * i + lane;
      int32_t before = __shfl_up_sync(~0u, token[i], 1);
      if (lane == 0) before = last;
      const bool is_in = entry < count_;
      const uint32_t heads = __ballot_sync(~0u, is_in && token[i] != before);
      const int32_t number = num_tokens_ + __popc(heads & up_to_lane) - 1;
      if (is_in) room.rows[entry] = row[i], room.of[entry] = number;
      if ((heads >> lane & 1) != 0) room.tokens[number] = token[i], room.starts[number] = entry;
      num_tokens_ += __popc(heads);
      last = __shfl_sync(~0u, token[i], plan::Min(31, max(count_ - 1 - 32 * i, 0)));
    }
    __syncwarp();
    // A token has at most 32 entries, so one that is cut off is not the first.
    if (next != plan::kNone && num_tokens_ > 0 && room.tokens[num_tokens_ - 1] == next) {
      count_ = room.starts[--num_tokens_];
    }
    __syncwarp();
    if (lane == 0) room.starts[num_tokens_] = count_;
    __syncwarp();
  }

  __device__ int32_t count() const { return count_; }
  __device__ int32_t num_tokens() const { return num_tokens_; }
  // Of the `number`-th token: it, and its entries.
  __device__ int32_t Token(int32_t number) const { return room_.tokens[number]; }
  __device__ EntryRange Of(int32_t number) const {
    return {room_.starts[number], room_.starts[number + 1]};
  }
  // Of an entry.
  __device__ int32_t Row(int32_t entry) const { return room_.rows[entry]; }
  __device__ int32_t TokenOf(int32_t entry) const { return room_.tokens[room_.of[entry]]; }

 private:
  EntryRoom& room_;
  int32_t count_, num_tokens_ = 0;
};

// Lane i gets the place of the i-th bit of `mask`, or 0. By one warp.
__device__ inline int32_t PlaceOfNthBit(uint32_t mask) {
  const int32_t lane = threadIdx.x % 32;
  int32_t place = 0;
  for (int32_t i = 0; mask != 0; ++i, mask &= mask - 1) {
    if (lane == i) place = __ffs(static_cast<int>(mask)) - 1;
  }
  return place;
}

}  // namespace jax_ep::cuda
