// How many operations and bytes a PE has handed to the network, by destination.
//
// The numbers stand in a file, pe-PE.json, that is mapped into memory, as JSON whose numbers have a
// fixed width. So the file is complete at any moment, also after the process was killed.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace jax_ep::late {

enum Count { kPuts, kPutBytes, kGets, kGetBytes, kSignals, kAtomics, kFences, kLost, kNumCounts };

class Counts {
 public:
  // `folder` may be empty: then there is no file.
  Counts(const std::string& folder, int pe, int num_pes);
  ~Counts();
  Counts(const Counts&) = delete;
  Counts& operator=(const Counts&) = delete;

  void Add(int pe, Count count, uint64_t number);
  const std::array<uint64_t, kNumCounts>& Of(int pe) const { return numbers_[pe]; }

 private:
  std::vector<std::array<uint64_t, kNumCounts>> numbers_;
  std::vector<std::array<size_t, kNumCounts>> places_;  // in the text
  char* text_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace jax_ep::late
