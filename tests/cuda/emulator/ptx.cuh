// Replaces csrc/cuda/core/ptx.cuh: the same functions, on the emulator. Orders of memory need
// nothing, because one fiber runs at a time. Fences let other fibers run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_ep::cuda::ptx {

// Loads ------------------------------------------------------------------------------------------

inline void CompilerFence() {}

inline uint4 LoadCacheGlobal(const void* address) {
  if (!emulator::IsShared(address)) emulator::CheckGlobal(address, 16, "a load of a vector");
  emulator::SometimesYield(64);
  return *static_cast<const uint4*>(address);
}

// Flags between GPUs -----------------------------------------------------------------------------

template <typename T>
T LoadAcquireSystem(const T* address) {
  emulator::CheckGlobal(address, sizeof(T), "a load of a flag");
  emulator::Yield();
  return *static_cast<const volatile T*>(address);
}

template <typename T>
void StoreReleaseSystem(T* address, T value) {
  emulator::CheckGlobal(address, sizeof(T), "a store of a flag");
  emulator::SometimesYield(2);
  *static_cast<volatile T*>(address) = value;
}
inline void StoreReleaseSystem(uint32_t* address, uint32_t value) {
  StoreReleaseSystem<uint32_t>(address, value);
}

inline uint64_t LoadRelaxedSystem(const uint64_t* address) { return LoadAcquireSystem(address); }
inline void StoreRelaxedSystem(uint64_t* address, uint64_t value) {
  StoreReleaseSystem<uint64_t>(address, value);
}

// Each word of a pair is atomic, the pair need not be.
inline void LoadRelaxedSystem(const uint64_t* address, uint64_t& first, uint64_t& second) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::Abort("a pair at %p", address);
  first = LoadAcquireSystem(address);
  emulator::SometimesYield(8);
  second = *static_cast<const volatile uint64_t*>(address + 1);
}
inline void StoreRelaxedSystem(uint64_t* address, uint64_t first, uint64_t second) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::Abort("a pair at %p", address);
  emulator::CheckGlobal(address, 16, "a store of a pair");
  *static_cast<volatile uint64_t*>(address) = first;
  emulator::SometimesYield(8);
  *static_cast<volatile uint64_t*>(address + 1) = second;
}

inline uint4 LoadRelaxedSystem16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::Abort("16 bytes at %p", address);
  emulator::CheckGlobal(address, 16, "a load of 16 bytes");
  emulator::Yield();
  return *static_cast<const uint4*>(address);
}
inline void StoreRelaxedSystem16(void* address, uint4 value) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::Abort("16 bytes at %p", address);
  emulator::CheckGlobal(address, 16, "a store of 16 bytes");
  emulator::SometimesYield(2);
  *static_cast<uint4*>(address) = value;
}

inline void FenceAcquireReleaseSystem() { emulator::SometimesYield(2); }

inline uint64_t GlobalTimer() {
  emulator::Yield();
  return emulator::Nanoseconds();
}

// Kernels that overlap ----------------------------------------------------------------------------

inline void LetNextBegin() { emulator::LetNextBegin(); }
inline void WaitForPrevious() { emulator::WaitForPrevious(); }

// Barriers of some warps of a block ---------------------------------------------------------------

template <int kBarrier>
void SyncWarps(int num_threads) {
  emulator::SyncSome(kBarrier, num_threads);
}

// Clusters of blocks -----------------------------------------------------------------------------

inline void ClusterArriveRelease() { emulator::ArriveAtCluster(); }
inline void ClusterArriveRelaxed() { emulator::ArriveAtCluster(); }
inline void ClusterWaitAcquire() { emulator::WaitForCluster(); }

template <typename T>
T* MapShared(T* shared, uint32_t block) {
  return static_cast<T*>(emulator::SharedOf(shared, block));
}

// Asynchronous copies ----------------------------------------------------------------------------

using emulator::CommitCopies;
using emulator::CopyToShared16;

template <int kPending>
void WaitCopies() {
  emulator::WaitCopies(kPending);
}

// Asynchronous bulk copies -----------------------------------------------------------------------

inline void FenceProxyAsyncGlobal() { emulator::SometimesYield(4); }
inline void FenceProxyAsyncShared() {
  emulator::FenceProxyAsyncShared();
  emulator::SometimesYield(4);
}
inline void FenceBarrierInit() { emulator::SometimesYield(4); }

using emulator::ArriveExpectBytes;
using emulator::BulkLoad;
using emulator::BulkStore;
using emulator::CommitBulkGroup;
using emulator::InitBarrier;
using emulator::TryWaitParity;

template <int kPending>
void WaitBulkGroupRead() {
  emulator::WaitBulkGroups(kPending, false);
}
inline void WaitBulkGroups() { emulator::WaitBulkGroups(0, true); }

}  // namespace jax_ep::cuda::ptx
