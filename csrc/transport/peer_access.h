// The memory of a rank that its peers reach, and their access to it.
//
// Within a process, GPUs reach each other's memory by plain pointers once peer access is on. Memory
// of other processes has been mapped before (shared_memory.h). All functions return an error text,
// or nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/core/workspace.h"

namespace jax_ep::transport {

// Lets `device` reach the memory of `peer`, both of this process.
std::optional<std::string> EnablePeerAccess(int device, int peer);

// Allocates a workspace on `device`, with the inboxes of latency mode after its channels: zeros.
// Never freed: a kernel of a failed peer may still write to it.
std::optional<std::string> AllocateWorkspace(int device, int64_t bytes, uint64_t& workspace);

// Allocates the record of the first failure, in pinned host memory.
std::optional<std::string> AllocateErrorRecord(int device, cuda::ErrorRecord** error);

// The regions of a rank that shares the process with all its peers: every address is good
// everywhere, so they are the parts of the address space.
std::vector<cuda::Region> AddressSpace();

// Writes the regions of all ranks into every channel of the workspace of one, on `device`.
std::optional<std::string> WriteRegions(int device,
                                        const std::vector<std::vector<cuda::Region>>& regions,
                                        int num_channels, cuda::Workspace* workspace);

}  // namespace jax_ep::transport
