// Where the time of an op of latency mode goes: its phases, in a chain of ops of a CUDA graph.
#pragma once

#ifdef JAX_EP_CLOCK_STAMPS

#include <cstdio>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda/decode/phases.h"
#include "decode_case.cuh"
#include "graph.cuh"
#include "phases.cuh"

namespace {

using cuda::DecodePhase;

constexpr int kNumPhases = static_cast<int>(DecodePhase::kCount);
constexpr const char* kPhaseNames[] = {
    "launched",   "op known",        "hello sent",  "ids read",     "ids sent",
    "rows read",  "rows sent",       "ids counted", "hellos there", "plan known",
    "rows there", "results written", "end"};
static_assert(std::size(kPhaseNames) == kNumPhases, "a name for each");

// What a launch must have stamped in every block.
inline std::vector<DecodePhase> PhasesOfAllBlocks(const std::string& op, cuda::Calls calls) {
  std::vector<DecodePhase> phases{DecodePhase::kLaunched, DecodePhase::kBegun, DecodePhase::kEnd};
  const bool is_dispatch = op == "dispatch";
  if (is_dispatch && calls != cuda::Calls::kDone) phases.push_back(DecodePhase::kIdsSent);
  if (calls == cuda::Calls::kStart) return phases;
  phases.push_back(DecodePhase::kWritten);
  if (is_dispatch) {
    phases.insert(phases.end(), {DecodePhase::kIdsThere, DecodePhase::kPlanKnown});
  }
  return phases;
}

// And in some block.
inline std::vector<DecodePhase> PhasesOfSomeBlock(const std::string& op, cuda::Calls calls,
                                                  int num_ranks) {
  std::vector<DecodePhase> phases;
  if (calls != cuda::Calls::kDone) {
    phases = {DecodePhase::kHelloSent};
    if (op == "dispatch") phases.push_back(DecodePhase::kIdsRead);
    if (num_ranks > 1) {
      phases.insert(phases.end(), {DecodePhase::kRowsRead, DecodePhase::kRowsSent});
    }
  }
  if (calls != cuda::Calls::kStart) {
    phases.push_back(DecodePhase::kHellosThere);
    if (num_ranks > 1) phases.push_back(DecodePhase::kRowsThere);
  }
  return phases;
}

// In each block the last warp to pass the first of two phases does so before the last warp to pass
// the second one.
constexpr DecodePhase kOrder[][2] = {
    {DecodePhase::kIdsRead, DecodePhase::kIdsSent},
    {DecodePhase::kIdsSent, DecodePhase::kIdsThere},
    {DecodePhase::kIdsThere, DecodePhase::kPlanKnown},
    {DecodePhase::kPlanKnown, DecodePhase::kWritten},
    {DecodePhase::kHelloSent, DecodePhase::kHellosThere},
    {DecodePhase::kHellosThere, DecodePhase::kEnd},
    {DecodePhase::kRowsRead, DecodePhase::kRowsSent},
    {DecodePhase::kRowsSent, DecodePhase::kEnd},
    {DecodePhase::kRowsThere, DecodePhase::kWritten},
    {DecodePhase::kWritten, DecodePhase::kEnd},
};

// What is wrong with the stamps of an op, or "".
inline std::string WrongStamps(const StampedOp& stamped, const std::string& op, cuda::Calls calls,
                               int num_ranks, int num_blocks) {
  const auto of = [&](DecodePhase phase) -> const PhaseOfOp& {
    return stamped.phases[static_cast<int>(phase)];
  };
  const auto name = [](DecodePhase phase) {
    return std::string("\"") + kPhaseNames[static_cast<int>(phase)] + "\"";
  };
  for (const DecodePhase phase : PhasesOfAllBlocks(op, calls)) {
    if (of(phase).blocks.size() != size_t(num_blocks)) {
      return name(phase) + " in " + std::to_string(of(phase).blocks.size()) + " of " +
             std::to_string(num_blocks) + " blocks";
    }
  }
  for (const DecodePhase phase : PhasesOfSomeBlock(op, calls, num_ranks)) {
    if (of(phase).empty()) return name(phase) + " in no block";
  }
  for (int block = 0; block < num_blocks; ++block) {
    const uint64_t launched = of(DecodePhase::kLaunched).Of(block)->first;
    const uint64_t begun = of(DecodePhase::kBegun).Of(block)->first;
    for (int phase = 0; phase < kNumPhases; ++phase) {
      const auto* passed = stamped.phases[phase].Of(block);
      if (passed == nullptr) continue;
      if (passed->first > passed->last || passed->first < launched ||
          (phase != 0 && passed->first < begun)) {
        return name(static_cast<DecodePhase>(phase)) + " too early in block " +
               std::to_string(block);
      }
    }
    for (const auto& [before, after] : kOrder) {
      const auto *a = of(before).Of(block), *b = of(after).Of(block);
      if (a != nullptr && b != nullptr && a->last > b->last) {
        return name(before) + " after " + name(after) + " in block " + std::to_string(block);
      }
    }
  }
  return "";
}

inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

// What one launch of an op takes: medians over ops, in microseconds after its first block's launch.
struct LaunchTimes {
  struct Phase {
    int blocks = 0;                           // that pass it, at most
    std::vector<double> first, median, last;  // over blocks, of each op
  };
  std::string op, call;
  Phase phases[kNumPhases];
  std::vector<double> gap;   // from its end to the next launch of the rank
  std::vector<double> skew;  // from the first rank's launch to the last one's

  // Numbers of the phases that pass, by the time at which the last block has passed them.
  std::vector<int> Ordered() const {
    std::vector<int> found;
    for (int i = 0; i < kNumPhases; ++i) {
      if (phases[i].blocks != 0) found.push_back(i);
    }
    std::stable_sort(found.begin(), found.end(),
                     [&](int a, int b) { return Median(phases[a].last) < Median(phases[b].last); });
    return found;
  }
};

// Measures and checks an op in one call or two. `call(rank, calls)` launches it; a rank's group has
// the stamps. Writes the figures to `json`, if there is one.
class PhaseMeter {
 public:
  PhaseMeter(const DecodeWorkload& w, std::vector<Rank>& ranks, int count, int replays, FILE* json)
      : w_(w), ranks_(ranks), count_(count), replays_(replays), json_(json) {}

  // Returns the number of ops whose stamps are wrong.
  template <typename Call>
  int Measure(const char* op, bool in_two, Call&& call) {
    std::vector<cuda::Calls> launches{cuda::Calls::kOne};
    if (in_two) launches = {cuda::Calls::kStart, cuda::Calls::kDone};
    const auto all_of = [&](Rank& k, const std::vector<cuda::ClockStamps*>& stamps) {
      for (size_t c = 0; c < launches.size(); ++c) {
        k.group.stamps = stamps[c];
        call(k, launches[c]);
      }
      k.group.stamps = nullptr;
    };
    const std::vector<cuda::ClockStamps*> none(launches.size(), nullptr);
    Graphs plain(ranks_, count_, [&](Rank& k) { all_of(k, none); });
    plain.Run();
    std::vector<double> plain_us;
    for (int i = 0; i < replays_; ++i) plain_us.push_back(plain.Run() / count_);

    std::vector<std::vector<cuda::ClockStamps*>> stamps(ranks_.size());
    for (size_t r = 0; r < ranks_.size(); ++r) {
      CHECK_CUDA(cudaSetDevice(ranks_[r].device));
      for (size_t c = 0; c < launches.size(); ++c) stamps[r].push_back(MakeStamps());
      CHECK_CUDA(cudaDeviceSynchronize());
    }
    Graphs graphs(ranks_, count_, [&](Rank& k) { all_of(k, stamps[k.group.rank]); });
    times_.assign(launches.size(), {});
    for (size_t c = 0; c < launches.size(); ++c) {
      times_[c].op = op;
      times_[c].call = !in_two ? "whole" : (c == 0 ? "start" : "done");
    }
    whole_.clear();
    resolution_ = 0;
    int num_wrong = 0;
    for (int i = 0; i <= replays_; ++i) {
      for (size_t r = 0; r < ranks_.size(); ++r) {
        CHECK_CUDA(cudaSetDevice(ranks_[r].device));
        for (cuda::ClockStamps* of_launch : stamps[r]) {
          FillDevice(of_launch, 0, sizeof(cuda::ClockStamps));
        }
        CHECK_CUDA(cudaDeviceSynchronize());
      }
      graphs.Run();
      num_wrong += Take(op, launches, stamps, i != 0);  // the first run loads the graph
    }
    for (const auto& of_rank : stamps) {
      for (cuda::ClockStamps* of_launch : of_rank) CHECK_CUDA(cudaFree(of_launch));
    }
    Report(Median(plain_us));
    return num_wrong;
  }

 private:
  // Checks the stamps of a run, and counts their times if it `counts`, except those of the first
  // ops, which the ranks begin apart.
  int Take(const std::string& op, const std::vector<cuda::Calls>& launches,
           const std::vector<std::vector<cuda::ClockStamps*>>& stamps, bool counts) {
    int num_wrong = 0;
    std::vector<std::vector<std::vector<StampedOp>>> ops(ranks_.size());  // by rank and launch
    for (size_t r = 0; r < ranks_.size(); ++r) {
      CHECK_CUDA(cudaSetDevice(ranks_[r].device));
      for (size_t c = 0; c < launches.size(); ++c) {
        ops[r].push_back(ReadStamps(stamps[r][c]));
        if (ops[r][c].size() != size_t(count_)) {
          std::printf("WRONG: stamps of %zu ops, not of %d\n", ops[r][c].size(), count_);
          return num_wrong + 1;
        }
        const int blocks = BlocksOf(w_, ranks_[r]) + (launches[c] == cuda::Calls::kStart);
        for (const StampedOp& stamped : ops[r][c]) {
          const std::string wrong = WrongStamps(stamped, op, launches[c], w_.R, blocks);
          if (wrong.empty()) continue;
          std::printf("WRONG stamps of %s, rank %zu: %s\n", op.c_str(), r, wrong.c_str());
          ++num_wrong;
        }
      }
    }
    if (!counts) return num_wrong;
    for (int i = std::min(4, count_ / 4); i + 1 < count_; ++i) {
      for (size_t c = 0; c < launches.size(); ++c) {
        uint64_t earliest = ~uint64_t{0}, latest = 0;
        for (size_t r = 0; r < ranks_.size(); ++r) {
          const StampedOp& stamped = ops[r][c][i];
          const bool is_last = c + 1 == launches.size();
          const StampedOp& next = is_last ? ops[r][0][i + 1] : ops[r][c + 1][i];
          const uint64_t begin = stamped.phases[0].First();
          earliest = std::min(earliest, begin);
          latest = std::max(latest, begin);
          Add(stamped, begin, next.phases[0].First(), times_[c]);
          if (c == 0) whole_.push_back(Us(ops[r][0][i + 1].phases[0].First() - begin));
        }
        times_[c].skew.push_back(Us(latest - earliest));
      }
    }
    return num_wrong;
  }

  static double Us(uint64_t ns) { return static_cast<double>(static_cast<int64_t>(ns)) / 1e3; }

  void Add(const StampedOp& stamped, uint64_t begin, uint64_t next, LaunchTimes& times) {
    for (int i = 0; i < kNumPhases; ++i) {
      const PhaseOfOp& passed = stamped.phases[i];
      if (passed.empty()) continue;
      LaunchTimes::Phase& phase = times.phases[i];
      phase.blocks = std::max(phase.blocks, static_cast<int>(passed.blocks.size()));
      phase.first.push_back(Us(passed.First() - begin));
      phase.median.push_back(Us(passed.LastOf(0.5) - begin));
      phase.last.push_back(Us(passed.LastOf(1.0) - begin));
      for (const PhaseOfOp::OfBlock& block : passed.blocks) {
        resolution_ = std::gcd(resolution_, block.last - begin);
      }
    }
    const PhaseOfOp& end = stamped.phases[static_cast<int>(DecodePhase::kEnd)];
    times.gap.push_back(Us(next - end.LastOf(1.0)));
  }

  void Report(double plain_us) const {
    double sum = 0;
    for (const LaunchTimes& times : times_) {
      std::printf("  %s, %s call: us from its first block's launch, and of each phase\n",
                  times.op.c_str(), times.call.c_str());
      std::printf("    %-16s %6s %8s %8s %8s %8s\n", "phase", "blocks", "first", "median", "last",
                  "takes");
      double before = 0;
      std::string json;
      for (const int i : times.Ordered()) {
        const LaunchTimes::Phase& phase = times.phases[i];
        const double first = Median(phase.first), median = Median(phase.median),
                     last = Median(phase.last);
        std::printf("    %-16s %6d %8.2f %8.2f %8.2f %8.2f\n", kPhaseNames[i], phase.blocks, first,
                    median, last, last - before);
        char text[256];
        std::snprintf(text, sizeof(text),
                      "%s{\"phase\": \"%s\", \"blocks\": %d, \"first_us\": %.3f, "
                      "\"median_us\": %.3f, \"last_us\": %.3f, \"takes_us\": %.3f}",
                      json.empty() ? "" : ", ", kPhaseNames[i], phase.blocks, first, median, last,
                      last - before);
        json += text;
        before = last;
      }
      const double gap = Median(times.gap), skew = Median(times.skew);
      sum += before + gap;
      std::printf("    %-16s %42.2f\n    ranks launch %.2f us apart\n", "until the next", gap,
                  skew);
      if (json_ != nullptr) {
        std::fprintf(json_,
                     "%s{\"kernel\": \"%s\", \"call\": \"%s\", \"ops\": %zu, \"op_us\": %.3f, "
                     "\"plain_us\": %.3f, \"gap_us\": %.3f, \"skew_us\": %.3f, "
                     "\"resolution_ns\": %llu, \"phases\": [%s]}",
                     num_reported_++ == 0 ? "[" : ",\n ", times.op.c_str(), times.call.c_str(),
                     whole_.size(), Median(whole_), plain_us, gap, skew,
                     static_cast<unsigned long long>(resolution_), json.c_str());
      }
    }
    std::printf("    phases and gaps %.2f us; an op takes %.2f us, without stamps %.2f us\n", sum,
                Median(whole_), plain_us);
    std::printf("    medians of %zu ops; the clock ticks every %llu ns\n", whole_.size(),
                static_cast<unsigned long long>(resolution_));
  }

  const DecodeWorkload& w_;
  std::vector<Rank>& ranks_;
  int count_, replays_;
  FILE* json_;
  mutable int num_reported_ = 0;
  std::vector<LaunchTimes> times_;  // by launch of an op
  std::vector<double> whole_;       // from a launch to that of the next op
  uint64_t resolution_ = 0;
};

}  // namespace

#endif  // JAX_EP_CLOCK_STAMPS
