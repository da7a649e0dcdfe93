#include "transport/registry.h"

#include <atomic>

namespace jax_ep::transport {
namespace {

std::atomic<const Registry*> the_registry{nullptr};

}  // namespace

const Registry& TheRegistry() { return *the_registry.load(std::memory_order_acquire); }

std::optional<std::string> UseRegistry(const Registry* registry) {
  if (registry->member_bytes != sizeof(Member)) {
    return "the native libraries of jax_ep were built from different sources; reinstall jax_ep";
  }
  the_registry.store(registry, std::memory_order_release);
  return std::nullopt;
}

}  // namespace jax_ep::transport
