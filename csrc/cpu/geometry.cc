#include "cpu/geometry.h"

namespace jax_ep::cpu {

Status BadHandleEntry(const char* op, const char* argument, int64_t rank, int64_t index,
                      int64_t limit, int32_t got) {
  return Status(StatusCode::kInvalidArgument,
                std::string("jax_ep.") + op + ": argument " + argument +
                    ": expected entries in [-1, " + std::to_string(limit) + "), got " +
                    std::to_string(got) + " at flat index " + std::to_string(index) + " of rank " +
                    std::to_string(rank) + "; pass the handle that dispatch returned, unchanged");
}

}  // namespace jax_ep::cpu
