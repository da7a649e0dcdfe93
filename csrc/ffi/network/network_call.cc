#include "ffi/network/network_call.h"

#include <string>

#include "transport/network/network_groups.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

ffi::Error PrepareNetworkGroup(const GroupAttrs& attrs, ffi::AnyBuffer coords, int32_t device,
                               cuda::OpKind op, const ops::AgreedNumbers& agreed,
                               NetworkGroup& group) {
  if (auto error = PrepareGroup(attrs, coords, device, op, agreed, group.node); error.failure()) {
    return error;
  }
  const transport::NetworkMember* member = transport::FindNetworkMember(attrs.group_id, device);
  if (member == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jax_ep: group " + std::to_string(attrs.group_id) +
                          " does not span hosts; make it with jax_ep.create_group(..., "
                          "transport='nvshmem') in this process first");
  }
  group.params = member->params;
  group.params.node = group.node.params;
  group.message_bytes = member->message_bytes;
  return ffi::Error::Success();
}

}  // namespace jax_ep
