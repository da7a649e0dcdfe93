// The members of groups, for handlers. The library that makes groups hands its registry to other
// libraries of the process, so that a group exists once, with its failures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "transport/member.h"

namespace jax_ep::transport {

struct Registry {
  size_t member_bytes;  // sizeof(Member), where the registry was built
  // The member of a group on a device, or null.
  const Member* (*find)(int64_t group_id, int device);
  // Its first failure, as a text for CommunicationError, or nothing.
  std::optional<std::string> (*failure)(const Member& member);
};

// The registry that this library uses. There must be one.
const Registry& TheRegistry();

// Sets it, once. Returns an error text if the registry was built from other sources, or nothing.
std::optional<std::string> UseRegistry(const Registry* registry);

}  // namespace jax_ep::transport
