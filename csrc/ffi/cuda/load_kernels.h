// Loads the kernels that handlers launch.
#pragma once

#include <optional>
#include <set>
#include <string>

namespace jax_ep {

// Loads all of them on these devices, before their group is made: loading one lazily, while a peer
// waits inside one, would deadlock. Returns an error text, or nothing.
std::optional<std::string> LoadKernels(const std::set<int>& devices);

}  // namespace jax_ep
