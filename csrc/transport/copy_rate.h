// How fast the memory of one rank of a group reaches another, over the mapping that the ops use.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/measure/copy.h"
#include "transport/groups.h"

namespace jax_ep::transport {

// A place in a rank's memory, as all ranks of its group may name it.
struct Place {
  int region = 0;
  uint64_t offset = 0;
};

// The place of `bytes` at `pointer`, which must be memory of the rank on `device`. Returns an error
// text, or nothing.
std::optional<std::string> NamePlace(int64_t group_id, int device, uint64_t pointer, int64_t bytes,
                                     Place& place);

// A copy out of a rank's memory.
struct Copy {
  int device = -1;  // that copies, and that `to` belongs to
  int rank = 0;     // whose memory is read, of the group that `device` is in
  Place from;
  uint64_t to = 0;
};

// Has all the devices copy `bytes`, 3 * `count` times one after the other, at the same time, and
// measures with events of their streams how long each took for those in the middle. The others keep
// memory and links busy for devices that begin a little earlier or later, of other processes too.
// Returns an error text, or nothing and the seconds of each copy's device in `seconds`.
std::optional<std::string> TimeCopies(int64_t group_id, const std::vector<Copy>& copies,
                                      int64_t bytes, cuda::Mover mover, int blocks, int count,
                                      std::vector<double>& seconds);

}  // namespace jax_ep::transport
