// The state of running grids, blocks and warps, and the bulk copies of a block.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

// 16 bytes on their way to shared memory.
struct SmallCopy {
  char* to;
  const char* from;
};

struct Lane {
  StackPointer stack_pointer = nullptr;
  Stack stack;
  // While it waits for others of its warp:
  Combine combine = nullptr;
  uint32_t mask = 0, argument = 0;
  uint64_t value = 0, result = 0;
  uint32_t group = 0;                                   // of bulk copies, the current one
  std::deque<std::vector<SmallCopy>> small_copies{{}};  // by group; the last is the current one
  uint64_t cluster_phase = 0;                           // that it has arrived at
};

struct Warp {
  uint32_t ready = 0, waiting = 0, done = 0;  // lanes; those at the block's barrier are in none
  uint64_t stalled_until = 0;                 // turns of the block
  Lane lanes[32];
};

struct Copy {
  char* to;
  const char* from;
  uint32_t bytes;
  uint64_t* barrier;  // of a load; null for a store
  uint32_t thread, group;
  uint64_t read_at, written_at;  // turns of the block
  std::vector<char> content;     // of a store, once it is read
};

struct Grid;

constexpr size_t kStaticBytes = 8 << 10;  // of a block's shared memory, for all kernels together
// Where the memory begins whose size a launch gives, if the kernel declares that alignment.
constexpr size_t DynamicAt(size_t alignment) {
  return alignment <= 16 ? kStaticBytes + 16 : (kStaticBytes + alignment) / alignment * alignment;
}

struct Block {
  Grid* grid;
  uint3 index;
  char* shared;  // static variables, then dynamic memory
  size_t dynamic_at = DynamicAt(16);
  std::vector<char> fenced;  // what bulk stores find there, if that may differ
  std::vector<Warp> warps;
  std::vector<Copy> copies;
  uint64_t turns = 0, stalled_until = 0;
  int num_running, num_at_barrier = 0, num_true = 0, barrier_result = 0;
  bool has_let_go = false;
  int num_at_some[16] = {};  // SyncSome
  uint64_t some_phase[16] = {};

  size_t SharedBytes() const;
};

// How far a grid is, for the one behind it.
struct Progress {
  uint32_t num_blocks, num_let_go = 0;  // let go: of those that let the next grid begin, or ended
  bool has_ended = false;
};

struct Grid {
  Config config;
  std::shared_ptr<Progress> progress, before;  // its own, and of the grid that it began beside
  std::function<void()> thread;
  std::function<void()> finished;
  uint32_t num_started = 0, num_finished = 0;
  uint64_t stalled_until = 0, long_stall_at = ~uint64_t{0};  // turns of the device
  uint32_t num_at_cluster = 0;
  uint64_t cluster_phase = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};

inline size_t Block::SharedBytes() const { return dynamic_at + grid->config.shared_bytes; }

// The state of the running fiber; null on threads other than the device's.
extern thread_local Block* current_block;
uint32_t CurrentThread();

// Does the block's copies that are due.
void AdvanceCopies(Block& block);

char* TakeSharedMemory();  // all of it poison; aligned to 1024
void FreeSharedMemory(char* memory, size_t bytes);

// Starts a grid; `finished` is called when all of its blocks are done.
void StartGrid(std::unique_ptr<Grid> grid);
// Runs one block for a turn; false if there is none.
bool RunTurn();

}  // namespace emulator
