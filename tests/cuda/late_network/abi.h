// The interface between NVSHMEM 3.4 and a plug-in that is its network (plug-in interface 3.x).
//
// NVSHMEM's wheel does not ship these declarations, so they stand here in our own words. Order and
// sizes of the fields are what matters; other versions of NVSHMEM differ in them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_ep::late::abi {

constexpr int kMajorVersion = 3;  // of 10000 * major + 100 * minor + patch
constexpr int kOk = 0;
constexpr int kInternalError = 7;

// What a peer can be reached for, bits of `*access`.
constexpr int kCanWrite = 1 << 4;
constexpr int kCanRead = 1 << 5;
constexpr int kCanUpdate = 1 << 6;  // by atomics

// Bits of Transport::attributes.
constexpr int kNeedsConnection = 1 << 1;

enum Rma : int { kPut = 1, kPutValue = 2, kPutSignal = 3, kGet = 4, kGetValue = 5 };

enum Amo : int {
  kIncrement = 2,
  kSet = 3,
  kAdd = 4,
  kAnd = 5,
  kOr = 6,
  kXor = 7,
  kSignal = 8,
  kSignalSet = 9,
  kSignalAdd = 10,
  kLastWithoutResult = 11,  // those behind it give the old value back
  kFetch = 12,
  kFetchIncrement = 13,
  kFetchAdd = 14,
  kFetchAnd = 15,
  kFetchOr = 16,
  kFetchXor = 17,
  kSwap = 18,
  kCompareSwap = 19,
};

struct MemoryHandle {
  char bytes[512];
};

struct RmaVerb {
  int operation;  // of Rma
  int is_nonblocking;
  int is_on_stream;
  void* stream;
};

struct Place {
  void* address;  // in the process that has the memory
  uint64_t offset;
  MemoryHandle* handle;  // null: not registered
};

struct RmaSize {
  size_t count;
  int bytes_each;
  ptrdiff_t source_stride, destination_stride;
};

struct AmoVerb {
  int operation;  // of Amo
  int gives_old, has_value, has_compare;
};

struct AmoPlace {
  Place remote;
  uint64_t return_flag;
  void* return_place;  // two words of 64 bits: the old value, then return_flag
  void *value_place, *compare_place;
  uint64_t value, compare;
  MemoryHandle* return_handle;
};

struct AmoSize {
  int type;
  int bytes;
};

// How the processes talk before there is a network. It has more fields than we need.
struct Bootstrap {
  int version, pe, num_pes, pe_of_host, pes_of_host;
  int (*all_gather)(const void* send, void* receive, int bytes_each, Bootstrap*);
  int (*all_to_all)(const void* send, void* receive, int bytes_each, Bootstrap*);
  int (*barrier)(Bootstrap*);
};

struct Transport;

struct Operations {
  int (*can_reach_peer)(int* access, void* peer, Transport*);
  int (*connect)(Transport*, int* devices, int num_devices);
  int (*register_memory)(MemoryHandle*, void* address, size_t bytes, Transport*, bool only_local);
  int (*release_memory)(MemoryHandle*, Transport*);
  int (*finalize)(Transport*);
  int (*show_info)(Transport*, int style);
  int (*progress)(Transport*);
  int (*rma)(Transport*, int pe, RmaVerb, Place* remote, Place* local, RmaSize, int channel);
  int (*amo)(Transport*, int pe, void*, AmoVerb, AmoPlace*, AmoSize, int channel);
  int (*fence)(Transport*, int pe, int channel);
  int (*quiet)(Transport*, int pe, int channel);
  int (*make_consistent)(Transport*);                                           // may be null
  int (*make_consistent_at_target)(Transport*);                                 // may be null
  int (*add_device_handles)(Transport*, int, MemoryHandle*, uint64_t, size_t);  // may be null
};

struct Transport {
  int api_version, type;
  int* access;
  Operations operations;
  Bootstrap* bootstrap;
  void *state, *state_shared_with_device, *cache;
  char** pci_paths;
  int attributes, num_devices;
  bool atomics_complete_on_quiet, is_initialized, has_no_proxy;
  void* heap_base;
  size_t log2_granularity;
  uint64_t max_operation_bytes;
  uint32_t host_endian_atomic_bytes;
  int index, my_pe, num_pes;
  void *aliases, *other_memory;
};

static_assert(sizeof(RmaVerb) == 24 && sizeof(Place) == 24 && sizeof(RmaSize) == 32);
static_assert(sizeof(AmoVerb) == 16 && sizeof(AmoPlace) == 80 && sizeof(AmoSize) == 8);
static_assert(offsetof(Bootstrap, all_gather) == 24 && sizeof(Operations) == 14 * 8);
static_assert(offsetof(Transport, bootstrap) == 128 && offsetof(Transport, heap_base) == 184);
static_assert(offsetof(Transport, my_pe) == 216 && sizeof(Transport) == 240);

}  // namespace jax_ep::late::abi
