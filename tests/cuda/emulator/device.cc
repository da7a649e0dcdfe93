// The scheduler: chooses the block that runs, and its fiber.
#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "network.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

thread_local Block* current_block = nullptr;

namespace {

// A block for each multiprocessor of an H100. Kernels may rely on that many running at once.
constexpr uint32_t kMaxBlocks = 132;

StackPointer scheduler;
std::vector<std::unique_ptr<Grid>> grids;
uint32_t num_blocks = 0;
uint64_t num_turns = 0;

Warp& CurrentWarp() { return current_block->warps[CurrentThread() / 32]; }
Lane& CurrentLane() { return CurrentWarp().lanes[CurrentThread() % 32]; }

uint32_t NumLanes(const Block& block, uint32_t warp) {
  const dim3& size = block.grid->config.block;
  return std::min(32u, size.x - warp * 32);
}

void StartBlock(Grid& grid) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->index = {grid.num_started % grid.config.grid.x, grid.num_started / grid.config.grid.x, 0};
  block->shared = TakeSharedMemory();
  block->num_running = static_cast<int>(grid.config.block.x);
  block->warps.resize((grid.config.block.x + 31) / 32);
  for (uint32_t w = 0; w < block->warps.size(); ++w) {
    block->warps[w].ready = static_cast<uint32_t>((uint64_t{1} << NumLanes(*block, w)) - 1);
    block->warps[w].done = ~block->warps[w].ready;
  }
  ++grid.num_started;
  ++num_blocks;
  grid.blocks.push_back(std::move(block));
}

// Nobody can wait for a lane that has ended.
void CheckExit(const Warp& warp, uint32_t lane) {
  for (uint32_t i = 0; i < 32; ++i) {
    if ((warp.waiting >> i & 1) != 0 && (warp.lanes[i].mask >> lane & 1) != 0) {
      Abort("lane %u ended while lane %u waits for it", lane, i);
    }
  }
}

void RunFiber() {
  current_block->grid->thread();
  Block& block = *current_block;
  Warp& warp = CurrentWarp();
  const uint32_t lane = CurrentThread() % 32;
  for (const Copy& copy : block.copies) {
    if (copy.thread == CurrentThread()) Abort("the thread ended before its bulk copies");
  }
  warp.ready &= ~(1u << lane);
  warp.done |= 1u << lane;
  CheckExit(warp, lane);
  if (block.num_at_barrier != 0) Abort("the thread ended while others wait at __syncthreads");
  --block.num_running;
  FreeStack(warp.lanes[lane].stack);  // no other fiber takes a stack before the switch
  SwitchStack(&warp.lanes[lane].stack_pointer, scheduler);
  Abort("a fiber that had ended went on");
}

void Resume(Block& block, uint32_t warp, uint32_t lane) {
  threadIdx = {warp * 32 + lane, 0, 0};
  blockIdx = block.index;
  blockDim = block.grid->config.block;
  gridDim = block.grid->config.grid;
  Lane& fiber = block.warps[warp].lanes[lane];
  if (fiber.stack.memory == nullptr) fiber.stack = TakeStack(RunFiber, &fiber.stack_pointer);
  SwitchStack(&scheduler, fiber.stack_pointer);
}

// Each ready lane once, from `first_lane` on, also those that become ready before their turn.
void RunWarp(Block& block, uint32_t w, uint32_t first_lane) {
  const Warp& warp = block.warps[w];
  const auto next_ready = [&](uint32_t after) {  // 32 if there is none
    const uint64_t both = uint64_t{warp.ready} << 32 | warp.ready;
    const uint64_t left = both >> first_lane & 0xffffffff & ~uint64_t{0} << after;
    return left == 0 ? 32u : static_cast<uint32_t>(__builtin_ctzll(left));
  };
  for (uint32_t j = next_ready(0); j < 32; j = next_ready(j + 1)) {
    // Most of a switch is the wait for the first line of the other stack.
    const uint32_t next = next_ready(j + 1);
    if (next < 32) __builtin_prefetch(warp.lanes[(first_lane + next) % 32].stack_pointer);
    Resume(block, w, (first_lane + j) % 32);
  }
}

// Now and then a fiber, warp or block falls behind the others, mostly for a little while.
void SometimesStall(uint64_t now, uint32_t one_in, uint64_t& until) {
  if (Random() % one_in != 0) return;
  until = now + Random() % (Random() % 8 == 0 ? 4000 : 200);
}

// Warps in turn, beginning with any of them; some must wait.
void RunBlock(Block& block) {
  current_block = &block;
  ++block.turns;
  AdvanceCopies(block);
  const uint32_t num_warps = static_cast<uint32_t>(block.warps.size());
  bool any = !block.copies.empty();
  for (uint32_t i = 0, w = Random() % num_warps; i < num_warps; ++i, ++w) {
    if (w == num_warps) w = 0;
    Warp& warp = block.warps[w];
    if (warp.ready == 0) continue;
    any = true;
    SometimesStall(block.turns, 20000, warp.stalled_until);
    if (Random() % 4 == 0 || block.turns < warp.stalled_until) continue;
    RunWarp(block, w, Random() % 32);
  }
  if (!any && block.num_running != 0) {
    for (uint32_t w = 0; w < num_warps; ++w) {
      std::fprintf(stderr, "warp %u: waiting %08x, ended %08x\n", w, block.warps[w].waiting,
                   block.warps[w].done);
    }
    Abort("all threads of the block wait for each other, %d of them at __syncthreads",
          block.num_at_barrier);
  }
  current_block = nullptr;
}

void LetGo(Block& block) {
  if (block.has_let_go) return;
  block.has_let_go = true;
  ++block.grid->progress->num_let_go;
}

void EndBlock(Grid& grid, size_t i) {
  LetGo(*grid.blocks[i]);
  if (!grid.blocks[i]->copies.empty()) Abort("a block ended before its bulk copies");
  FreeSharedMemory(grid.blocks[i]->shared, grid.blocks[i]->SharedBytes());
  grid.blocks.erase(grid.blocks.begin() + static_cast<ptrdiff_t>(i));
  --num_blocks;
  ++grid.num_finished;
}

}  // namespace

uint32_t CurrentThread() { return threadIdx.x; }

void Abort(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "EMULATOR: ");
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current_block != nullptr) {
    std::fprintf(stderr, " (block %u of %u, thread %u of %u)", blockIdx.x, gridDim.x, threadIdx.x,
                 blockDim.x);
  }
  std::fprintf(stderr, "\n");
  std::fflush(nullptr);
  std::_Exit(3);
}

uint64_t random_state = [] {
  const char* seed = std::getenv("JAX_EP_EMULATOR_SEED");
  return (seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1) * 0x9e3779b97f4a7c15 | 1;
}();

int Mutation() {
  static const int mutation = [] {
    const char* given = std::getenv("JAX_EP_EMULATOR_MUTATION");
    return given != nullptr ? std::atoi(given) : 0;
  }();
  return mutation;
}

int MostRingSlots() {
  static const int slots = [] {
    const char* given = std::getenv("JAX_EP_EMULATOR_RING_SLOTS");
    return given != nullptr ? std::atoi(given) : 1 << 30;
  }();
  return slots;
}

uint32_t MostBlocks() {
  static const uint32_t blocks = [] {
    const char* given = std::getenv("JAX_EP_EMULATOR_BLOCKS");
    return given != nullptr ? static_cast<uint32_t>(std::atoi(given)) : kMaxBlocks;
  }();
  return blocks;
}

void Yield() { SwitchStack(&CurrentLane().stack_pointer, scheduler); }

void Sleep(uint64_t ns) {
  for (const uint64_t end = current_block->turns + ns / 100; current_block->turns < end;) Yield();
}

uint64_t Exchange(Combine combine, uint32_t mask, uint64_t value, uint32_t argument) {
  Warp& warp = CurrentWarp();
  const uint32_t self = CurrentThread() % 32;
  if ((mask >> self & 1) == 0) Abort("lane %u is not in its mask %08x", self, mask);
  if ((mask & warp.done) != 0) Abort("the mask %08x has lanes that ended: %08x", mask, warp.done);
  Lane& lane = warp.lanes[self];
  lane.combine = combine;
  lane.mask = mask;
  lane.value = value;
  lane.argument = argument;
  warp.waiting |= 1u << self;
  warp.ready &= ~(1u << self);
  if ((warp.waiting & mask) != mask) {
    Yield();
    return lane.result;
  }
  uint64_t values[32];
  for (uint32_t i = 0; i < 32; ++i) {
    const Lane& other = warp.lanes[i];
    values[i] = other.value;
    if ((mask >> i & 1) != 0 && (other.mask != mask || other.combine != combine)) {
      Abort("lanes %u and %u do not meet: masks %08x and %08x, %s function", self, i, mask,
            other.mask, other.combine == combine ? "the same" : "another");
    }
  }
  for (uint32_t i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    warp.lanes[i].result = combine(values, mask, i, warp.lanes[i].argument);
  }
  warp.waiting &= ~mask;
  warp.ready |= mask;
  return lane.result;
}

int CountAtBarrier(bool value) {
  Block& block = *current_block;
  if (block.num_running != static_cast<int>(blockDim.x)) Abort("__syncthreads after threads ended");
  block.num_true += value;
  CurrentWarp().ready &= ~(1u << (CurrentThread() % 32));
  if (++block.num_at_barrier < block.num_running) {
    Yield();
    return block.barrier_result;
  }
  block.barrier_result = block.num_true;
  block.num_at_barrier = block.num_true = 0;
  for (Warp& warp : block.warps) warp.ready = ~warp.done;
  return block.barrier_result;
}

void SyncSome(int barrier, int count) {
  Block& block = *current_block;
  if (barrier < 1 || barrier > 15 || count % 32 != 0) Abort("barrier %d of %d", barrier, count);
  const uint64_t phase = block.some_phase[barrier];
  if (++block.num_at_some[barrier] == count) {
    block.num_at_some[barrier] = 0;
    ++block.some_phase[barrier];
  }
  while (block.some_phase[barrier] == phase) Yield();
}

void ArriveAtCluster() {
  Grid& grid = *current_block->grid;
  if (grid.config.grid.x > 16) Abort("a cluster of %u blocks", grid.config.grid.x);
  if (MostBlocks() < grid.config.grid.x) Abort("a cluster has more than JAX_EP_EMULATOR_BLOCKS");
  CurrentLane().cluster_phase = grid.cluster_phase;
  if (++grid.num_at_cluster < grid.config.grid.x * grid.config.block.x) return;
  grid.num_at_cluster = 0;
  ++grid.cluster_phase;
}

void WaitForCluster() {
  while (current_block->grid->cluster_phase == CurrentLane().cluster_phase) Yield();
}

void LetNextBegin() {
  LetGo(*current_block);
  SometimesYield(8);
}

void WaitForPrevious() {
  const std::shared_ptr<Progress>& before = current_block->grid->before;
  while (before != nullptr && !before->has_ended) Yield();
}

void* StaticShared(size_t offset) { return current_block->shared + offset; }
void* DynamicShared(size_t alignment) {
  Block& block = *current_block;
  block.dynamic_at = DynamicAt(alignment);
  return block.shared + block.dynamic_at;
}

bool IsShared(const void* pointer) {
  const auto* byte = static_cast<const char*>(pointer);
  return current_block->shared <= byte && byte < current_block->shared + kMaxSharedBytes;
}

void* SharedOf(void* pointer, uint32_t block) {
  for (const auto& other : current_block->grid->blocks) {
    if (other->index.x == block) {
      return other->shared + (static_cast<char*>(pointer) - current_block->shared);
    }
  }
  Abort("block %u of the cluster has ended", block);
}

void StartGrid(std::unique_ptr<Grid> grid) {
  if (grid->config.grid.y * grid->config.grid.z * grid->config.block.y * grid->config.block.z != 1)
    Abort("only grids and blocks of one dimension are known");
  if (Random() % 8 == 0) grid->long_stall_at = num_turns + Random() % 300;
  grids.push_back(std::move(grid));
}

// It counts turns like the waits that it times, so it is the same on a slow machine.
uint64_t Nanoseconds() { return num_turns * 10000; }

bool RunTurn() {
  ++num_turns;
  AdvanceNetwork();
  if (grids.empty()) return false;
  Grid& grid = *grids[Random() % grids.size()];
  const bool fits = num_blocks < kMaxBlocks && grid.blocks.size() < MostBlocks();
  if (grid.num_started < grid.config.grid.x && fits) StartBlock(grid);
  SometimesStall(num_turns, 1000, grid.stalled_until);
  if (num_turns >= grid.long_stall_at) {
    grid.long_stall_at = ~uint64_t{0};
    grid.stalled_until = num_turns + 8000;
  }
  if (grid.blocks.empty() || num_turns < grid.stalled_until) return true;
  const size_t i = Random() % grid.blocks.size();
  SometimesStall(num_turns, 3000, grid.blocks[i]->stalled_until);
  if (num_turns < grid.blocks[i]->stalled_until) return true;
  RunBlock(*grid.blocks[i]);
  if (grid.blocks[i]->num_running == 0) EndBlock(grid, i);
  if (grid.num_finished < grid.config.grid.x) return true;
  for (size_t g = 0; g < grids.size(); ++g) {
    if (grids[g].get() != &grid) continue;
    const std::unique_ptr<Grid> ended = std::move(grids[g]);
    grids.erase(grids.begin() + static_cast<ptrdiff_t>(g));
    ended->progress->has_ended = true;
    ended->finished();
    break;
  }
  return true;
}

}  // namespace emulator
