// Copies of one warp through stages in shared memory: loads run ahead of the stores.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"

namespace jax_ep::cuda {

// Stages of one warp, whose barriers count loads across runs.
class Pipe {
 public:
  static constexpr int kStages = 4;

  // All lanes of a warp. `stages` has kStages stages of `stage_bytes`, a multiple of 128.
  __device__ Pipe(char* stages, uint64_t* barriers, int32_t stage_bytes)
      : stages_(stages), barriers_(barriers), stage_bytes_(stage_bytes) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < kStages; ++s) ptx::InitBarrier(&barriers[s], 1);
      ptx::FenceBarrierInit();
    }
    __syncwarp();
  }

  // Copies items 0, 1, ..., num_items - 1. `bytes(i)` of item i, a multiple of 16, come from
  // `source(i)`; `store(i, stage)` starts bulk stores of them out of a stage. All lanes call this,
  // and it calls `bytes`, `source` and `store` in all lanes. When it returns, all loads are
  // complete, but stores may be in flight.
  template <typename Bytes, typename Source, typename Store>
  __device__ void Run(int32_t num_items, Bytes&& bytes, Source&& source, Store&& store) {
    for (int32_t i = 0; i < num_items + kAhead; ++i) {
      if (i >= kAhead) {
        const uint32_t number = num_loaded_ + i - kAhead;
        while (!ptx::TryWaitParity(&barriers_[number % kStages], number / kStages & 1)) {
        }
        store(i - kAhead, Stage(number));
      }
      ptx::CommitBulkGroup();
      // The next load takes a stage whose stores are the last group but one.
      ptx::WaitBulkGroupRead<1>();
      __syncwarp();
      if (i >= num_items) continue;
      const void* from = source(i);
      if (threadIdx.x % 32 == 0) {
        const uint32_t number = num_loaded_ + i;
        uint64_t* barrier = &barriers_[number % kStages];
        ptx::ArriveExpectBytes(barrier, bytes(i));
        ptx::BulkLoad(Stage(number), from, bytes(i), barrier);
      }
    }
    num_loaded_ += num_items;
  }

  __device__ int32_t stage_bytes() const { return stage_bytes_; }

  // Waits until all stores are complete, their writes included.
  __device__ void Finish() { ptx::WaitBulkGroups(); }

 private:
  static constexpr int kAhead = kStages - 1;

  __device__ char* Stage(uint32_t number) const {
    return stages_ + static_cast<int64_t>(number % kStages) * stage_bytes_;
  }

  char* stages_;
  uint64_t* barriers_;
  int32_t stage_bytes_;
  uint32_t num_loaded_ = 0;
};

}  // namespace jax_ep::cuda
