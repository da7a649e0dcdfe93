// Runs kernels on the CPU: every CUDA thread is a fiber, and one OS thread, the *device*, runs all
// fibers of all blocks of all streams, in random order (JAX_EP_EMULATOR_SEED). A fiber goes on
// until it yields, or waits for others of its warp or block.
//
// The emulator shows wrong arithmetic and indices, missing waits, waits that never end, accesses
// out of bounds by bulk copies and flags, and lanes that do not meet. But for one fence, it cannot
// show the order in which a GPU's memory makes writes visible, or time.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

extern uint3 threadIdx, blockIdx;  // of the running fiber
extern dim3 blockDim, gridDim;

namespace emulator {

// Prints the error and its place, and ends the process.
[[noreturn]] void Abort(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Scheduling -------------------------------------------------------------------------------------

extern uint64_t random_state;  // that begins with JAX_EP_EMULATOR_SEED
inline uint32_t Random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 32);
}

// Lets a random number of other fibers run; SometimesYield does so once in `one_in` calls.
void Yield();
inline void SometimesYield(uint32_t one_in) {
  if (Random() % one_in == 0) Yield();
}
void Sleep(uint64_t ns);
uint64_t Nanoseconds();  // of a clock that goes on with every turn

// JAX_EP_EMULATOR_MUTATION: the wait that is removed, one of test_hooks.cuh or of these.
constexpr int kWithoutLoads = 101;   // for bulk loads
constexpr int kWithoutStores = 102;  // until bulk stores have read shared memory
constexpr int kWithoutWarps = 103;   // __syncwarp
constexpr int kWithoutFence = 104;   // between stores to shared memory and bulk stores of that
int Mutation();

// JAX_EP_EMULATOR_RING_SLOTS: kMostRingSlots of test_hooks.cuh.
int MostRingSlots();

// Waits until all lanes of `mask` have come with the same `combine`. Then returns the result of
// `combine` for their values and this lane's `argument`.
using Combine = uint64_t (*)(const uint64_t* values, uint32_t mask, uint32_t lane,
                             uint32_t argument);
uint64_t Exchange(Combine combine, uint32_t mask, uint64_t value, uint32_t argument);

// Waits for all threads of the block; returns the number of those with a value other than 0.
int CountAtBarrier(bool value);

// Waits for `count` threads of the block at one of its 16 barriers.
void SyncSome(int barrier, int count);

// The barrier of the cluster, which is the whole grid here: no kernel has more than one cluster.
void ArriveAtCluster();
void WaitForCluster();

// The kernel behind this one in the stream, if launched `early`, may begin once all blocks have
// called LetNextBegin or ended. There WaitForPrevious waits until this kernel has ended.
void LetNextBegin();
void WaitForPrevious();

// Memory -----------------------------------------------------------------------------------------

// Shared memory of a block, poisoned when the block begins. Variables have the same place in all
// blocks.
constexpr size_t kMaxSharedBytes = 227 << 10;
bool IsShared(const void* pointer);
size_t ReserveShared(size_t size, size_t alignment);
void* StaticShared(size_t offset);
// Aligned to that, and to no more than 16 unless more is asked for: as a linker of device code has
// it.
void* DynamicShared(size_t alignment);
void* SharedOf(void* pointer, uint32_t block);

// Aborts unless the memory is within one allocation.
void CheckGlobal(const void* pointer, size_t size, const char* what);

// Bulk copies, which happen some time later -------------------------------------------------------

void InitBarrier(uint64_t* barrier, uint32_t arrivals);
void ArriveExpectBytes(uint64_t* barrier, uint32_t bytes);
bool TryWaitParity(uint64_t* barrier, uint32_t parity);
void CopyToShared16(void* shared, const void* global);
void CommitCopies();
void WaitCopies(size_t pending);

void BulkLoad(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void BulkStore(void* global, const void* shared, uint32_t bytes);
void CommitBulkGroup();
void WaitBulkGroups(int pending, bool until_written);

// With JAX_EP_EMULATOR_PROXIES=1, bulk stores find shared memory as it was when a thread of the
// block last called this, with what bulk loads have brought since. It slows kernels down.
void FenceProxyAsyncShared();

// Launches ---------------------------------------------------------------------------------------

struct Config {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool early;
};
// JAX_EP_EMULATOR_BLOCKS: how many blocks of a grid run at once, as if other kernels kept the rest
// from the SMs. Not for grids that are clusters.
uint32_t MostBlocks();
void Enqueue(const Config& config, const void* kernel, std::function<void()> thread);
cudaError_t AllowShared(const void* kernel, int bytes);

template <typename... Params>
auto Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, bool early = false) {
  return [=](auto&&... arguments) {
    std::tuple<std::remove_const_t<Params>...> params(arguments...);
    Enqueue({grid, block, shared_bytes, stream, early}, reinterpret_cast<const void*>(kernel),
            [=] { std::apply(kernel, params); });
  };
}

}  // namespace emulator
