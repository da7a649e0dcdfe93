// Notices when a process that shares a group with this one is gone.
#pragma once

#include <optional>
#include <string>

namespace jax_ep::transport {

// Watches a connected socket to `process`: once it closes, ReportProcess is called, from a thread
// that lives as long as this process. The process says goodbye before it ends orderly. Takes a
// duplicate of the descriptor.
std::optional<std::string> WatchProcess(int process, int descriptor);

// Says goodbye to all watched processes: this one is about to end orderly. Waits for the ops that
// it has launched first, since their peers take a goodbye for the end of them.
void SayGoodbye();

}  // namespace jax_ep::transport
