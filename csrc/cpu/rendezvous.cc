#include "cpu/rendezvous.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/watchdog.h"

namespace jax_ep::cpu {
namespace {

using Clock = Watchdog::Clock;

// Number of failed meetings that are remembered, so that ranks that come too late fail at once.
constexpr size_t kMaxTombstones = 1024;

// So far away that nobody waits for it, and so near that no clock overflows.
constexpr int64_t kMaxTimeoutMs = int64_t{1000} * 60 * 60 * 24 * 365;

struct KeyLess {
  bool operator()(const MeetingKey& a, const MeetingKey& b) const {
    return std::tie(a.call_id, a.run_id, a.group_index) <
           std::tie(b.call_id, b.run_id, b.group_index);
  }
};

struct Meeting {
  std::vector<std::optional<Arrival>> arrivals;  // by rank
  int32_t num_arrived = 0;
  Clock::time_point opened;
  Clock::time_point deadline;
};

// Arrivals that fail together, and why.
struct Failure {
  std::vector<Arrival> arrivals;
  StatusCode code;
  std::string reason;
};

std::string ListRanks(const Meeting& meeting, bool arrived) {
  std::string list;
  int32_t count = 0;
  for (size_t rank = 0; rank < meeting.arrivals.size(); ++rank) {
    if (meeting.arrivals[rank].has_value() != arrived) continue;
    list += (count++ == 0 ? "" : ", ") + std::to_string(rank);
  }
  return (count == 1 ? "rank " : "ranks ") + list;
}

std::string DeadlineReason(const Meeting& meeting, const Arrival& first, Clock::time_point now) {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.1f",
                std::chrono::duration<double>(now - meeting.opened).count());
  return "waited " + std::string(seconds) + " s for " + ListRanks(meeting, false) + "; " +
         ListRanks(meeting, true) + " arrived (group id " + std::to_string(first.group_id) +
         ", group index " + std::to_string(first.key.group_index) +
         "). Usually a lax.cond takes different branches on different ranks, or ranks run different"
         " programs; if peers are merely slow, raise the deadline with"
         " create_group(..., timeout=seconds)";
}

Status StatusFor(const Arrival& arrival, StatusCode code, const std::string& reason) {
  return Status(code, "jax_ep.CommunicationError: rank " + std::to_string(arrival.rank) + ": op " +
                          arrival.op + ": phase arrival: " + reason);
}

void Complete(const Failure& failure) {
  for (const Arrival& arrival : failure.arrivals) {
    arrival.done(StatusFor(arrival, failure.code, failure.reason));
  }
}

Status RunOp(const Meeting& meeting, MakeWork make_work, const ThreadPool& pool) {
  try {
    std::vector<std::shared_ptr<const void>> args;
    for (const auto& arrival : meeting.arrivals) args.push_back(arrival->args);
    return RunShared(make_work(args), pool);
  } catch (const std::exception& error) {
    return Status(StatusCode::kInternal, std::string("jax_ep: ") + error.what());
  }
}

// Runs the op of a complete meeting on the thread of rank `last`.
void RunMeeting(std::unique_ptr<Meeting> complete, int32_t last, MakeWork make_work,
                const ThreadPool& pool) {
  const std::shared_ptr<Meeting> meeting = std::move(complete);
  const Status status = RunOp(*meeting, make_work, pool);
  for (const auto& arrival : meeting->arrivals) {
    if (arrival->rank == last) continue;
    pool.schedule([meeting, &arrival = *arrival, status] { arrival.done(status); });
  }
  meeting->arrivals[last]->done(status);
}

// All meetings of the process. Never destroyed, because ranks may arrive until the process ends.
class MeetingTable {
 public:
  static MeetingTable& Get() {
    static MeetingTable* const table = new MeetingTable();
    return *table;
  }

  void Arrive(Arrival arrival, MakeWork make_work, const ThreadPool& pool) {
    watchdog_.Start();
    const int32_t rank = arrival.rank;
    std::unique_ptr<Meeting> complete;
    std::optional<Failure> failure;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      failure = Refuse(arrival);
      if (!failure) complete = Join(std::move(arrival));
    }
    if (failure) Complete(*failure);
    if (complete) RunMeeting(std::move(complete), rank, make_work, pool);
  }

  int64_t num_open() {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(open_.size());
  }

 private:
  MeetingTable() : watchdog_(*new Watchdog([this] { return FailOverdue(); })) {}

  // The failure that `arrival` finds or causes, if any. Needs mutex_.
  std::optional<Failure> Refuse(Arrival& arrival) {
    if (const auto tombstone = tombstones_.find(arrival.key); tombstone != tombstones_.end()) {
      Failure failure{{},
                      StatusCode::kDeadlineExceeded,
                      "came to a meeting that had failed: " + tombstone->second};
      failure.arrivals.push_back(std::move(arrival));
      return failure;
    }
    const auto found = open_.find(arrival.key);
    if (found == open_.end()) return std::nullopt;
    const Meeting& meeting = *found->second;
    std::string reason;
    if (meeting.arrivals.size() != static_cast<size_t>(arrival.num_ranks)) {
      reason = "expected " + std::to_string(meeting.arrivals.size()) +
               " ranks, as the first to arrive did, got num_ranks " +
               std::to_string(arrival.num_ranks);
    } else if (meeting.arrivals[arrival.rank].has_value()) {
      reason = "expected every rank once, got rank " + std::to_string(arrival.rank) +
               " twice; pass lax.axis_index of the group's axes as its rank";
    } else {
      return std::nullopt;
    }
    Failure failure = Dissolve(found, StatusCode::kInvalidArgument, std::move(reason));
    failure.arrivals.push_back(std::move(arrival));
    return failure;
  }

  // Enters `arrival`; returns the meeting once it is complete. Needs mutex_.
  std::unique_ptr<Meeting> Join(Arrival arrival) {
    const MeetingKey key = arrival.key;
    const int32_t rank = arrival.rank;
    auto found = open_.find(key);
    if (found == open_.end()) {
      auto meeting = std::make_unique<Meeting>();
      meeting->arrivals.resize(arrival.num_ranks);
      meeting->opened = Clock::now();
      meeting->deadline =
          meeting->opened + std::chrono::milliseconds(std::min(arrival.timeout_ms, kMaxTimeoutMs));
      if (arrival.num_ranks > 1) watchdog_.WakeBy(meeting->deadline);
      found = open_.emplace(key, std::move(meeting)).first;
    }
    Meeting& meeting = *found->second;
    meeting.arrivals[rank] = std::move(arrival);
    if (++meeting.num_arrived < static_cast<int32_t>(meeting.arrivals.size())) return nullptr;
    std::unique_ptr<Meeting> complete = std::move(found->second);
    open_.erase(found);
    return complete;
  }

  using OpenMeetings = std::map<MeetingKey, std::unique_ptr<Meeting>, KeyLess>;

  // Removes a failed meeting from the table and remembers it. Needs mutex_.
  Failure Dissolve(OpenMeetings::iterator found, StatusCode code, std::string reason) {
    if (tombstone_order_.size() == kMaxTombstones) {
      tombstones_.erase(tombstone_order_.front());
      tombstone_order_.pop_front();
    }
    tombstones_[found->first] = reason;
    tombstone_order_.push_back(found->first);
    Failure failure{{}, code, std::move(reason)};
    for (auto& arrival : found->second->arrivals) {
      if (arrival) failure.arrivals.push_back(std::move(*arrival));
    }
    open_.erase(found);
    return failure;
  }

  // Fails every meeting past its deadline and returns the next deadline. Called by the watchdog.
  Clock::time_point FailOverdue() {
    std::vector<Failure> failures;
    Clock::time_point next = Clock::time_point::max();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const Clock::time_point now = Clock::now();
      for (auto it = open_.begin(); it != open_.end();) {
        const auto current = it++;
        const Meeting& meeting = *current->second;
        if (meeting.deadline > now) {
          next = std::min(next, meeting.deadline);
          continue;
        }
        const auto first = std::find_if(meeting.arrivals.begin(), meeting.arrivals.end(),
                                        [](const auto& arrival) { return arrival.has_value(); });
        failures.push_back(Dissolve(current, StatusCode::kDeadlineExceeded,
                                    DeadlineReason(meeting, **first, now)));
      }
    }
    for (const Failure& failure : failures) Complete(failure);
    return next;
  }

  std::mutex mutex_;
  OpenMeetings open_;
  std::map<MeetingKey, std::string, KeyLess> tombstones_;  // why each failed
  std::deque<MeetingKey> tombstone_order_;                 // oldest first
  Watchdog& watchdog_;
};

}  // namespace

void Arrive(Arrival arrival, MakeWork make_work, const ThreadPool& pool) {
  MeetingTable::Get().Arrive(std::move(arrival), make_work, pool);
}

int64_t NumOpenMeetings() { return MeetingTable::Get().num_open(); }

}  // namespace jax_ep::cpu
