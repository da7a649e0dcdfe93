// What a failure that a kernel has recorded says to users.
#pragma once

#include <string>

#include "cuda/core/workspace.h"

namespace jax_ep::transport {

// The text of a CommunicationError.
std::string ErrorText(const cuda::ErrorRecord& error);

}  // namespace jax_ep::transport
