// Loads the kernels that handlers of groups that span hosts launch.
#pragma once

#include <optional>
#include <string>

namespace jax_ep {

// On one device, before the group is made (see ffi/cuda/load_kernels.h). Returns an error text, or
// nothing.
std::optional<std::string> LoadNetworkKernels(int device);

}  // namespace jax_ep
