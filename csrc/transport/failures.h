// Failures of the members of groups: those that kernels have recorded, and processes that have
// gone.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "transport/member.h"

namespace jax_ep::transport {

// The first failure of `member`, as a text for CommunicationError, or nothing. A peer whose process
// has gone is one too; if `orderly_is_failure`, also one that has ended orderly.
std::optional<std::string> Failure(const Member& member, bool orderly_is_failure = true);

// Notes that a process has gone; what was said first counts.
void NoteGone(int process, bool orderly);

// Tells the waits of `member` if a process of its group has gone.
void TellGone(const Member& member);

// The processes that have gone, and whether orderly.
std::map<int, bool> GoneProcesses();

}  // namespace jax_ep::transport
