// scenarios PLUGIN SCENARIO: two PEs and the network between them, with fake_driver.cc for a GPU.
// It fails where bytes are wrong, and prints the facts that depend on settings
// (test_late_network.py).
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "../chance.h"
#include "../counts.h"
#include "pes.h"

namespace jax_ep::late::check {
namespace {

// Everything arrives ------------------------------------------------------------------------------

constexpr size_t kSizes[] = {1, 7, 4096, 131072, 131073, 300001, 24};
constexpr size_t kTo = 1 << 20;                // where puts go
constexpr size_t kGot = kWordsAt + (1 << 20);  // where gets go

char Pattern(int pe, size_t at) {
  return static_cast<char>((at * 2654435761u >> 13) + 101 * pe + (at >> 8));
}

void NeedPattern(const Pe& pe, size_t place, size_t bytes, const char* what) {
  for (size_t i = 0; i < bytes; ++i) {
    Check(pe.heap()[place + i] == Pattern(pe.peer(), i), what, i);
  }
}

// Word, operation, value, compare; what the word has before and after, and whether it is fetched.
struct AtomicCase {
  int operation;
  uint64_t value, compare, before, after;
};
constexpr uint64_t kWide = 0x1234567890abcdef;
constexpr AtomicCase kAtomicCases[] = {
    {abi::kIncrement, 0, 0, 41, 42},
    {abi::kSet, kWide, 0, 1, kWide},
    {abi::kAdd, 5, 0, kWide, kWide + 5},
    {abi::kAnd, 0xff00, 0, 0xabcd, 0xab00},
    {abi::kOr, 0xff00, 0, 0xabcd, 0xffcd},
    {abi::kXor, 0xff00, 0, 0xabcd, 0x54cd},
    {abi::kSignal, 9, 0, 0, 9},
    {abi::kSignalSet, kWide, 0, 3, kWide},
    {abi::kSignalAdd, 4, 0, 3, 7},
    {abi::kFetch, 0, 0, kWide, kWide},
    {abi::kFetchIncrement, 0, 0, 6, 7},
    {abi::kFetchAdd, 5, 0, 6, 11},
    {abi::kFetchAnd, 6, 0, 12, 4},
    {abi::kFetchOr, 6, 0, 12, 14},
    {abi::kFetchXor, 6, 0, 12, 10},
    {abi::kSwap, kWide, 0, 12, kWide},
    {abi::kCompareSwap, 1, 12, 12, 1},
    {abi::kCompareSwap, 1, 13, 12, 12},
};
constexpr size_t kNumAtomicCases = std::size(kAtomicCases);
constexpr size_t kHalfWord = 30, kResults = 100;  // words
constexpr uint64_t kFlag = 77;

Pe* watched = nullptr;

// A flag is written behind its value, and a word that is only fetched is not written.
void WatchAtomics(uint64_t device, size_t) {
  const uint64_t* const words = watched->words();
  for (size_t i = 0; i < kNumAtomicCases; ++i) {
    const uint64_t* const result = words + kResults + 2 * i;
    if (device == reinterpret_cast<uint64_t>(result + 1)) {
      Check(result[0] == kAtomicCases[i].before, "a flag came before its value, case", i);
    }
    if (device == reinterpret_cast<uint64_t>(words + i)) {
      Check(kAtomicCases[i].after != kAtomicCases[i].before, "a word was written, of case", i);
    }
  }
}

void Bytes(Pe& pe) {
  watched = &pe;
  pe.WatchWrites(WatchAtomics);
  const size_t total = std::accumulate(std::begin(kSizes), std::end(kSizes), size_t{0});
  for (size_t i = 0; i < total; ++i) pe.heap()[i] = Pattern(pe.index(), i);
  for (size_t i = 0; i < kNumAtomicCases; ++i) pe.words()[i] = kAtomicCases[i].before;
  pe.words()[kHalfWord] = (uint64_t{5} << 32) | 12;
  pe.Barrier();
  size_t at = 0;
  for (const size_t bytes : kSizes) {
    pe.Put(kTo + at, at, bytes);
    pe.Get(kGot + at, at, bytes);
    at += bytes;
  }
  pe.Put(kTo, 0, 0);  // of no bytes
  pe.PutValue(kTo + total, kWide, 8);
  pe.PutValue(kTo + total + 8, kWide, 4);
  for (size_t i = 0; i < kNumAtomicCases; ++i) {
    const AtomicCase& one = kAtomicCases[i];
    pe.Atomic(one.operation, i, one.value, one.compare, 8, kResults + 2 * i, kFlag + i);
  }
  // Of half a word, with what NVSHMEM may leave in the upper half of its arguments.
  pe.Atomic(abi::kCompareSwap, kHalfWord, kWide, (uint64_t{3} << 32) | 12, 4, kResults - 2, kFlag);
  Check(pe.Quiet() == 0, "quiet", 0);
  NeedPattern(pe, kGot, total, "a byte of a get is wrong");
  pe.Barrier();  // before the sources of the peer's gets change
  pe.Put(kTo + total + 16, 0, 8, false);
  std::memset(pe.heap(), 0, 8);  // a put that returns has read its source
  Check(pe.PutUnregistered() != 0, "memory that is not registered was sent", 0);
  pe.Barrier();
  NeedPattern(pe, kTo, total, "a byte of a put is wrong");
  NeedPattern(pe, kTo + total + 16, 8, "a byte of a blocking put is wrong");
  uint64_t values[2] = {};
  std::memcpy(values, pe.heap() + kTo + total, 12);
  Check(values[0] == kWide && values[1] == (kWide & 0xffffffff), "a value", values[1]);
  for (size_t i = 0; i < kNumAtomicCases; ++i) {
    const AtomicCase& one = kAtomicCases[i];
    const uint64_t* const result = pe.words() + kResults + 2 * i;
    Check(pe.words()[i] == one.after, "what an atomic leaves, of case", i);
    const bool is_fetch = one.operation > abi::kLastWithoutResult;
    Check(result[0] == (is_fetch ? one.before : 0), "what an atomic gives, of case", i);
    Check(result[1] == (is_fetch ? kFlag + i : 0), "the flag of case", i);
  }
  Check(pe.words()[kHalfWord] == ((uint64_t{5} << 32) | (kWide & 0xffffffff)), "a half word", 0);
  Check(pe.words()[kResults - 2] == 12, "the old half word", pe.words()[kResults - 2]);
  Say(pe, "bytes", total);
  pe.Finalize();
}

// Order
// ---------------------------------------------------------------------------------------------

constexpr int kBlocks = 64;  // bits of a word
struct Block {
  size_t at, words;
};
std::vector<Block> Blocks() {
  std::vector<Block> blocks;
  size_t at = 0;
  for (int i = 0; i < kBlocks; ++i) {
    const size_t words = i == 10 ? 20000 : 1 + i * 37 % 150;  // one travels in two parts
    blocks.push_back({at, words});
    at += 8 * words;
  }
  return blocks;
}

// Of PE 1, whose watcher sees each write before the next.
struct Seen {
  Pe* pe;
  std::vector<Block> blocks;
  uint64_t signals = 0, overtakes = 0, early_blocks = 0;
};
Seen* seen = nullptr;

bool IsComplete(int i) {
  const auto* words = reinterpret_cast<const uint64_t*>(seen->pe->heap() + seen->blocks[i].at);
  return std::all_of(words, words + seen->blocks[i].words,
                     [&](uint64_t word) { return word == uint64_t(i) + 1; });
}

void Watch(uint64_t device, size_t bytes) {
  const uint64_t words = reinterpret_cast<uint64_t>(seen->pe->words());
  if (device < words || device >= words + 8 * kBlocks || bytes != 8) return;
  const int i = static_cast<int>((device - words) / 8);
  seen->signals |= uint64_t{1} << i;
  if (!IsComplete(i)) ++seen->overtakes;
  if (i + 1 < kBlocks && IsComplete(i + 1)) ++seen->early_blocks;
}

void Signals(Pe& pe, bool with_fence) {
  Seen mine{&pe, Blocks()};
  seen = &mine;
  if (pe.index() == 1) pe.WatchWrites(Watch);
  pe.Barrier();
  if (pe.index() == 0) {
    for (int i = 0; i < kBlocks; ++i) {
      auto* const words = reinterpret_cast<uint64_t*>(pe.heap() + mine.blocks[i].at);
      std::fill_n(words, mine.blocks[i].words, i + 1);
      pe.Put(mine.blocks[i].at, mine.blocks[i].at, 8 * mine.blocks[i].words);
      if (with_fence) pe.Fence();
      pe.Signal(i, i + 1);
      pe.Progress();
    }
    Say(pe, "quiet", pe.Quiet());
  }
  pe.Barrier();
  if (pe.index() == 1) {
    uint64_t complete = 0, set = 0;
    for (int i = 0; i < kBlocks; ++i) {
      if (IsComplete(i)) complete |= uint64_t{1} << i;
      if (pe.words()[i] == uint64_t(i) + 1) set |= uint64_t{1} << i;
    }
    Check(set == mine.signals, "a signal has another value", set);
    Say(pe, "signals", mine.signals);
    Say(pe, "blocks", complete);
    Say(pe, "overtakes", mine.overtakes);
    Say(pe, "early_blocks", mine.early_blocks);
  }
  pe.Finalize();
}

void Fenced(Pe& pe) { Signals(pe, true); }
void Unfenced(Pe& pe) { Signals(pe, false); }

// Sources are read late, but not after quiet.
void Sources(Pe& pe) {
  auto* const words = reinterpret_cast<uint64_t*>(pe.heap());
  if (pe.index() == 0) {
    std::fill_n(words, kBlocks, 1);
    for (int i = 0; i < kBlocks; ++i) pe.Put(8 * i, 8 * i, 8);
    std::fill_n(words, kBlocks, 2);
    const uint64_t begin = Now();
    Check(pe.Quiet() == 0, "quiet", 0);
    Say(pe, "quiet_ms", (Now() - begin) / 1'000'000);
    std::fill_n(words, kBlocks, 3);
  }
  pe.Barrier();
  if (pe.index() == 1) {
    for (int i = 0; i < kBlocks; ++i) Check(words[i] == 1 || words[i] == 2, "a source", words[i]);
    Say(pe, "late", std::count(words, words + kBlocks, 2));
  }
  pe.Finalize();
}

// How many of 16 operations start at once where nobody waits for them.
void Starts(Pe& pe) {
  if (pe.index() == 1) return;
  for (int i = 0; i < 16; ++i) pe.Put(8 * i, 8 * i, 8);
  pe.Progress();
  Say(pe, "started", pe.num_reads());
}

// Faults and counts that a test asks for while it runs.
void Calls(Pe& pe) {
  const auto counts = pe.Exported<int (*)(int, uint64_t*)>("jax_ep_late_counts");
  const auto drop = pe.Exported<int (*)(int, uint64_t)>("jax_ep_late_drop_signal");
  const auto stop = pe.Exported<int (*)(uint64_t)>("jax_ep_late_stop_after");
  uint64_t numbers[kNumCounts];
  if (pe.index() == 0) {
    Check(counts(kPes, numbers) == 1 && counts(-1, numbers) == 1, "counts of no PE", 0);
    Check(drop(kPes, 1) == 1 && drop(1, 0) == 1, "a drop that cannot be", 0);
    for (int i = 0; i < 4; ++i) pe.Signal(i, 1);
    Check(drop(1, 2) == 0, "drop", 0);
    for (int i = 4; i < 8; ++i) pe.Signal(i, 1);
    Say(pe, "quiet", pe.Quiet());
    Check(stop(1) == 0, "stop", 0);
    for (int i = 8; i < 11; ++i) pe.Signal(i, 1);
    Say(pe, "quiet_stopped", pe.Quiet() != 0);
    Check(counts(1, numbers) == 0, "counts", 0);
    Say(pe, "counted_signals", numbers[late::kSignals]);
    Say(pe, "counted_lost", numbers[kLost]);
  }
  pe.Barrier();
  if (pe.index() == 1) {
    uint64_t signals = 0;
    for (int i = 0; i < 11; ++i) signals |= pe.words()[i] << i;
    Say(pe, "signals", signals);
  }
  pe.Finalize();
  Check(counts(1, numbers) == 1, "counts without a network", 0);
}

void Killed(Pe& pe) {
  pe.Barrier();
  if (pe.index() == 0) {
    for (int i = 0; i < 3; ++i) pe.Put(0, 0, 100);
    raise(SIGKILL);
  }
  pe.Barrier();
}

}  // namespace
}  // namespace jax_ep::late::check

int main(int count, char** arguments) {
  using namespace jax_ep::late::check;
  struct Scenario {
    const char* name;
    void (*work)(Pe&);
  };
  constexpr Scenario kScenarios[] = {
      {"bytes", Bytes}, {"fenced", Fenced}, {"unfenced", Unfenced}, {"sources", Sources},
      {"calls", Calls}, {"killed", Killed}, {"starts", Starts},
  };
  for (const Scenario& scenario : kScenarios) {
    if (count == 3 && std::strcmp(arguments[2], scenario.name) == 0) {
      return RunPes(arguments[1], scenario.work);
    }
  }
  std::fprintf(stderr, "usage: %s PLUGIN SCENARIO\n", arguments[0]);
  return 2;
}
