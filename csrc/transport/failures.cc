#include "transport/failures.h"

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "transport/error_text.h"

namespace jax_ep::transport {
namespace {

using cuda::ErrorRecord;

std::mutex& Mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

// The processes that have gone, and whether orderly; guarded by Mutex().
std::map<int, bool>& Gone() {
  static auto* processes = new std::map<int, bool>;
  return *processes;
}

// The failure that a kernel has recorded.
std::optional<std::string> RecordedFailure(const Member& member) {
  const ErrorRecord& error = *member.params.error;
  if (__atomic_load_n(&error.set, __ATOMIC_ACQUIRE) != 1) return std::nullopt;
  return ErrorText(error);
}

// The failure that a peer's process has gone, unless orderly and that is no failure.
std::optional<std::string> LostPeer(const Member& member, bool orderly_is_failure) {
  const uint32_t lost = __atomic_load_n(&member.params.error->lost_peer, __ATOMIC_ACQUIRE);
  if (lost == 0) return std::nullopt;
  std::lock_guard<std::mutex> lock(Mutex());
  const int first_rank = member.params.first_rank, lost_rank = static_cast<int>(lost) - 1;
  const bool orderly = Gone()[member.processes[lost_rank - first_rank]];
  if (orderly && !orderly_is_failure) return std::nullopt;
  return "jax_ep.CommunicationError: rank " + std::to_string(first_rank + member.params.rank) +
         ": the process of rank " + std::to_string(lost_rank) +
         (orderly ? " has ended" : " is gone") +
         ". The group takes no more ops; start the job again.";
}

}  // namespace

std::optional<std::string> Failure(const Member& member, bool orderly_is_failure) {
  if (auto failure = RecordedFailure(member)) return failure;
  return LostPeer(member, orderly_is_failure);
}

void NoteGone(int process, bool orderly) {
  std::lock_guard<std::mutex> lock(Mutex());
  Gone().emplace(process, orderly);
}

void TellGone(const Member& member) {
  std::lock_guard<std::mutex> lock(Mutex());
  const int first_rank = member.params.first_rank;
  uint32_t lost = 0;  // rather one that did not say goodbye
  for (size_t rank = 0; rank < member.processes.size(); ++rank) {
    const auto gone = Gone().find(member.processes[rank]);
    if (gone == Gone().end()) continue;
    if (lost == 0 || !gone->second) lost = static_cast<uint32_t>(first_rank + rank) + 1;
    if (!gone->second) break;
  }
  if (lost != 0) __atomic_store_n(&member.params.error->lost_peer, lost, __ATOMIC_RELEASE);
}

std::map<int, bool> GoneProcesses() {
  std::lock_guard<std::mutex> lock(Mutex());
  return Gone();
}

}  // namespace jax_ep::transport
