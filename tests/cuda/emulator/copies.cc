// Bulk copies and the barriers that count them. A copy happens some turns after it was started, so
// that code that does not wait for it finds poison.
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace emulator {
namespace {

// In the 64 bits of an mbarrier.
struct Barrier {
  uint64_t magic : 8;
  uint64_t phase : 1;
  uint64_t arrivals : 11;  // of a phase
  uint64_t missing : 11;   // in this phase
  int64_t bytes : 33;      // expected and not there yet
};
static_assert(sizeof(Barrier) == 8, "an mbarrier");
constexpr uint64_t kMagic = 0xb7;

Barrier Load(const uint64_t* word) {
  Barrier barrier;
  std::memcpy(&barrier, word, 8);
  if (barrier.magic != kMagic) Abort("a barrier at %p that was not initialised", (void*)word);
  return barrier;
}

void Store(uint64_t* word, Barrier barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.missing = barrier.arrivals;
  }
  std::memcpy(word, &barrier, 8);
}

void CheckShared(const void* pointer, size_t bytes) {
  const char* begin = static_cast<const char*>(pointer);
  const char* shared = current_block->shared;
  if (begin < shared || begin + bytes > shared + current_block->SharedBytes()) {
    Abort("%zu bytes at %td of shared memory", bytes,
          begin - shared - static_cast<ptrdiff_t>(current_block->dynamic_at));
  }
}

bool HasProxies() {
  static const char* const given = std::getenv("JAX_EP_EMULATOR_PROXIES");
  return given != nullptr && given[0] == '1';
}

// What bulk copies know of this memory of the block.
char* Fenced(Block& block, char* shared) {
  if (!HasProxies()) return shared;
  if (block.fenced.empty()) block.fenced.assign(block.SharedBytes(), static_cast<char>(0xAB));
  return block.fenced.data() + (shared - block.shared);
}

void CheckCopy(const void* shared, const void* global, uint32_t bytes) {
  CheckShared(shared, bytes);
  CheckGlobal(global, bytes, "a bulk copy");
  const auto bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if ((bits | bytes) % 16 != 0) Abort("a bulk copy of %u bytes, %p to %p", bytes, shared, global);
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) {
    Abort("a slow bulk copy of %u bytes: at %td of shared memory", bytes,
          static_cast<const char*>(shared) - current_block->shared);
  }
}

Lane& CurrentLane() {
  const uint32_t thread = CurrentThread();
  return current_block->warps[thread / 32].lanes[thread % 32];
}

void Start(Copy copy) {
  copy.thread = CurrentThread();
  const uint32_t most = Random() % 8 == 0 ? 100 : 6;
  copy.read_at = current_block->turns + 1 + Random() % most;
  copy.written_at = copy.read_at + Random() % most;
  current_block->copies.push_back(std::move(copy));
}

}  // namespace

void InitBarrier(uint64_t* word, uint32_t arrivals) {
  Barrier barrier{};
  barrier.magic = kMagic;
  barrier.arrivals = barrier.missing = arrivals;
  std::memcpy(word, &barrier, 8);
}

void ArriveExpectBytes(uint64_t* word, uint32_t bytes) {
  Barrier barrier = Load(word);
  barrier.bytes += bytes;
  --barrier.missing;
  Store(word, barrier);
}

bool TryWaitParity(uint64_t* word, uint32_t parity) {
  if (Load(word).phase != parity || Mutation() == kWithoutLoads) return true;
  Yield();
  return Load(word).phase != parity;
}

// The copy happens now, or as late as the thread's wait for it.
void CopyToShared16(void* shared, const void* global) {
  CheckShared(shared, 16);
  CheckGlobal(global, 16, "an asynchronous copy");
  const auto bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (bits % 16 != 0) Abort("an asynchronous copy of 16 bytes, %p to %p", global, shared);
  if (Random() % 4 == 0) {
    std::memcpy(shared, global, 16);
    return;
  }
  std::memset(shared, 0xff, 16);
  CurrentLane().small_copies.back().push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global)});
}

void CommitCopies() { CurrentLane().small_copies.emplace_back(); }

void WaitCopies(size_t pending) {
  auto& groups = CurrentLane().small_copies;
  if (Mutation() == kWithoutLoads) return;
  for (; groups.size() > pending + 1; groups.pop_front()) {
    for (const SmallCopy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
  }
}

void BulkLoad(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  CheckCopy(shared, global, bytes);
  Load(barrier);
  std::memset(shared, 0xff, bytes);
  Start({static_cast<char*>(shared),
         static_cast<const char*>(global),
         bytes,
         barrier,
         0,
         0,
         0,
         0,
         {}});
}

void BulkStore(void* global, const void* shared, uint32_t bytes) {
  CheckCopy(shared, global, bytes);
  const uint32_t thread = CurrentThread();
  const uint32_t group = current_block->warps[thread / 32].lanes[thread % 32].group;
  Start({static_cast<char*>(global),
         static_cast<const char*>(shared),
         bytes,
         nullptr,
         0,
         group,
         0,
         0,
         {}});
}

void CommitBulkGroup() {
  ++current_block->warps[CurrentThread() / 32].lanes[CurrentThread() % 32].group;
}

void WaitBulkGroups(int pending, bool until_written) {
  if (Mutation() == kWithoutStores && !until_written) return;
  const uint32_t thread = CurrentThread();
  const uint32_t current = current_block->warps[thread / 32].lanes[thread % 32].group;
  const auto must_wait = [&] {
    for (const Copy& copy : current_block->copies) {
      if (copy.thread == thread && copy.barrier == nullptr && copy.group < current &&
          current - copy.group > static_cast<uint32_t>(pending) &&
          (until_written || copy.content.empty())) {
        return true;
      }
    }
    return false;
  };
  while (must_wait()) Yield();
}

void FenceProxyAsyncShared() {
  Block& block = *current_block;
  if (!HasProxies() || Mutation() == kWithoutFence) return;
  std::memcpy(Fenced(block, block.shared), block.shared, block.fenced.size());
}

void AdvanceCopies(Block& block) {
  for (size_t i = 0; i < block.copies.size();) {
    Copy& copy = block.copies[i];
    const bool is_load = copy.barrier != nullptr;
    if (!is_load && copy.content.empty() && block.turns >= copy.read_at) {
      const char* from = Fenced(block, const_cast<char*>(copy.from));
      copy.content.assign(from, from + copy.bytes);
    }
    if (block.turns < copy.written_at) {
      ++i;
      continue;
    }
    std::memcpy(copy.to, is_load ? copy.from : copy.content.data(), copy.bytes);
    if (is_load) {
      if (HasProxies()) std::memcpy(Fenced(block, copy.to), copy.to, copy.bytes);
      Barrier barrier = Load(copy.barrier);
      barrier.bytes -= copy.bytes;
      Store(copy.barrier, barrier);
    }
    std::swap(copy, block.copies.back());
    block.copies.pop_back();
  }
}

}  // namespace emulator
