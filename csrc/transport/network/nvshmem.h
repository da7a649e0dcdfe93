// NVSHMEM in this process: started once, over all processes of a job, with one GPU each.
//
// It gives every process the same amount of memory, of which groups take parts at the same offsets.
// All functions but the first two are for one thread at a time. They return an error text, or
// nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace jax_ep::transport {

struct Version {
  int major, minor, patch;
};

// What the library was built with, and what has been loaded.
Version BuiltVersion();
Version LoadedVersion();

// Why what has been loaded cannot be used by what was built, or nothing.
std::optional<std::string> VersionObstacle(Version built, Version loaded);

// Bytes that name a job, made by one process for all.
std::optional<std::string> MakeUniqueId(std::string& id);

// Starts NVSHMEM as processing element `pe` of `num_pes`, on a GPU of this process, and allocates
// `bytes` of zeros. Waits for the others to do the same. Calls after the first only check that they
// ask for the same.
std::optional<std::string> StartNvshmem(int device, int pe, int num_pes, const std::string& id,
                                        int64_t bytes);

// Whether it has been started, and not been ended.
bool NvshmemRuns();

// The memory of this process; that of another one, as this device maps it, or null.
char* SymmetricMemory();
char* SymmetricMemoryOf(int pe);
int64_t SymmetricBytes();

// Ends it; waits for the others to do the same.
std::optional<std::string> EndNvshmem();

}  // namespace jax_ep::transport
