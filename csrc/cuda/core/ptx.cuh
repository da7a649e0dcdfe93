// All inline PTX of the project. Names give order and scope: LoadAcquireSystem is ld.acquire.sys.
#pragma once

#include <cstdint>

namespace jax_ep::cuda::ptx {

// Loads ------------------------------------------------------------------------------------------

// The compiler moves no access to memory across this.
__device__ __forceinline__ void CompilerFence() { asm volatile("" ::: "memory"); }

// From global memory past the L1 cache, which is not coherent between GPUs, or from shared memory.
// It stays after the waits and compiler fences before it, but is no fence itself: the compiler may
// fetch the addresses of several loads before the first load.
__device__ __forceinline__ uint4 LoadCacheGlobal(const void* address) {
  uint4 value;
  asm volatile("ld.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Flags between GPUs -----------------------------------------------------------------------------

__device__ __forceinline__ uint64_t LoadAcquireSystem(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseSystem(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint32_t LoadAcquireSystem(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseSystem(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t LoadRelaxedSystem(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreRelaxedSystem(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Two words side by side, aligned to 16 bytes. Each word is atomic, the pair need not be.
__device__ __forceinline__ void LoadRelaxedSystem(const uint64_t* address, uint64_t& first,
                                                  uint64_t& second) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(address)
               : "memory");
}

__device__ __forceinline__ void StoreRelaxedSystem(uint64_t* address, uint64_t first,
                                                   uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first),
               "l"(second)
               : "memory");
}

// One access of 16 bytes, aligned to 16: whoever loads any of what was stored loads all of it. (As
// b128, because a vector of four words would be four accesses.)
__device__ __forceinline__ uint4 LoadRelaxedSystem16(const void* address) {
  uint4 value;
  asm volatile(
      "{\n\t.reg .b128 q;\n\t.reg .b64 low, high;\n\t"
      "ld.relaxed.sys.global.b128 q, [%4];\n\t"
      "mov.b128 {low, high}, q;\n\t"
      "mov.b64 {%0, %1}, low;\n\t"
      "mov.b64 {%2, %3}, high;\n\t}"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address)
      : "memory");
  return value;
}

__device__ __forceinline__ void StoreRelaxedSystem16(void* address, uint4 value) {
  asm volatile(
      "{\n\t.reg .b128 q;\n\t.reg .b64 low, high;\n\t"
      "mov.b64 low, {%1, %2};\n\t"
      "mov.b64 high, {%3, %4};\n\t"
      "mov.b128 q, {low, high};\n\t"
      "st.relaxed.sys.global.b128 [%0], q;\n\t}" ::"l"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

__device__ __forceinline__ void FenceAcquireReleaseSystem() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Nanoseconds of a clock that all SMs of the GPU share; ticks coarsely.
__device__ __forceinline__ uint64_t GlobalTimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// Kernels that overlap (core/launch.cuh) ----------------------------------------------------------

// The kernel behind this one in the stream may begin once all blocks have called this or ended.
__device__ __forceinline__ void LetNextBegin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before this one has ended, and sees all that it has written. Returns at
// once in a kernel that began after it.
__device__ __forceinline__ void WaitForPrevious() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Barriers of some warps of a block ---------------------------------------------------------------

// Waits for `num_threads` threads of the block, whole warps; barrier 0 is that of __syncthreads.
template <int kBarrier>
__device__ __forceinline__ void SyncWarps(int num_threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(kBarrier), "r"(num_threads) : "memory");
}

// Clusters of blocks -----------------------------------------------------------------------------

// A barrier of all threads of the cluster in two halves. Writes before the first half are visible
// after the second one.
__device__ __forceinline__ void ClusterArriveRelease() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// The first half for a thread whose earlier writes nobody needs to see; it releases nothing.
__device__ __forceinline__ void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void ClusterWaitAcquire() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The same variable in the shared memory of another block of the cluster.
template <typename T>
__device__ __forceinline__ T* MapShared(T* shared, uint32_t block) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(address)
               : "l"(reinterpret_cast<uint64_t>(shared)), "r"(block));
  return reinterpret_cast<T*>(address);
}

// Asynchronous copies ----------------------------------------------------------------------------

// Starts a copy of 16 bytes from global to shared memory, past the L1 cache, into this thread's
// current group.
__device__ __forceinline__ void CopyToShared16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups, the last ones, are incomplete. This thread
// then sees what the others have copied.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Asynchronous bulk copies -----------------------------------------------------------------------

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Orders this thread's earlier accesses to global memory before its later bulk copies.
__device__ __forceinline__ void FenceProxyAsyncGlobal() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Orders this thread's earlier stores to shared memory before its later bulk copies out of it.
__device__ __forceinline__ void FenceProxyAsyncShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void InitBarrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to bulk copies.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  FenceProxyAsyncShared();
}

__device__ __forceinline__ void ArriveExpectBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool TryWaitParity(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(SharedAddress(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Starts a copy of `bytes` (a multiple of 16) from global memory (also a peer's) to shared memory;
// `barrier` counts them when they have arrived.
__device__ __forceinline__ void BulkLoad(void* shared, const void* global, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// Starts a copy of `bytes` (a multiple of 16) from shared to global memory, into the current group.
__device__ __forceinline__ void BulkStore(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(SharedAddress(shared)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void CommitBulkGroup() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void WaitBulkGroupRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all of this thread's groups are complete, their writes included.
__device__ __forceinline__ void WaitBulkGroups() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace jax_ep::cuda::ptx
