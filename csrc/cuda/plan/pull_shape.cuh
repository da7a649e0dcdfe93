// For a block of the plan that reads (pull.cu): the columns that it counts, the number of tokens
// that it numbers at a time, and its shared memory.
#pragma once

#include <cstdint>

#include "cuda/plan/common.cuh"

namespace jax_ep::cuda {
namespace {

constexpr size_t kMaxPullBytes = 200 << 10;  // of shared memory
// The most tokens of each rank that a block numbers at a time.
constexpr int kMaxTile = 128;
// The most entries of all ranks that a block numbers at a time.
constexpr int kMaxTileEntries = 16 << 10;

// The number of columns that a block counts tokens of `source` by: all columns for this rank's own
// tokens, and those whose rows are here for tokens of peers. They have consecutive *slots*, this
// rank's first.
struct Columns {
  int32_t first;
  int32_t count;
  int32_t first_slot;
};

__device__ Columns ColumnsOf(const PlanParams& p, int32_t source) {
  const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  if (source == p.group.rank) return {0, columns, 0};
  const int32_t here = NumColumnsHere(p);
  const int32_t nth = source < p.group.rank ? source : source - 1;
  return {p.group.rank * here, here, columns + nth * here};
}

// The inverse: the source and the column of a slot.
struct SlotColumn {
  int32_t source;
  int32_t column;
};

__device__ SlotColumn ColumnOfSlot(const PlanParams& p, int32_t slot) {
  const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  if (slot < columns) return {p.group.rank, slot};
  const int32_t here = NumColumnsHere(p);
  const int32_t nth = (slot - columns) / here;
  return {nth < p.group.rank ? nth : nth + 1, p.group.rank * here + (slot - columns) % here};
}

// Words of a block's shared memory if `tile` tokens of each rank are numbered at a time.
__host__ __device__ int32_t SharedWords(const PlanParams& p, int32_t tile) {
  const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  return p.group.num_ranks * tile * p.top_k + NumSlots(p) + 2 * columns + num_local +
         NumSlots(p) * (tile / 32);
}

// Tokens of each rank that are numbered at a time; a multiple of 32.
__host__ __device__ int32_t TileSize(const PlanParams& p) {
  int32_t tile = kMaxTile;
  while (tile > 32 && (tile * p.top_k * p.group.num_ranks > kMaxTileEntries ||
                       SharedWords(p, tile) * sizeof(int32_t) > kMaxPullBytes)) {
    tile /= 2;
  }
  return tile;
}

// Views of a block's dynamic shared memory.
struct PullMemory {
  int32_t* entries;  // [R, tile, K]: expert ids, then rows on this rank
  int32_t* before;   // [slots]: entries of this block; later: rows before the tile
  int32_t* starts;   // [columns]: first row of the column on its rank
  int32_t* counts;   // [columns]: rows kept of the column
  int32_t* kept;     // [L]: pairs kept of each local expert (layout "token")
  uint32_t* masks;   // [slots, tile / 32]
  __device__ PullMemory(const PlanParams& p, int32_t* memory) {
    const int32_t columns = NumColumns(p.layout, p.num_experts, p.group.num_ranks);
    entries = memory;
    before = entries + p.group.num_ranks * TileSize(p) * p.top_k;
    starts = before + NumSlots(p);
    counts = starts + columns;
    kept = counts + columns;
    masks = reinterpret_cast<uint32_t*>(kept + p.num_experts / p.group.num_ranks);
  }
};

size_t SharedBytes(const PlanParams& p) { return sizeof(int32_t) * SharedWords(p, TileSize(p)); }

}  // namespace
}  // namespace jax_ep::cuda
