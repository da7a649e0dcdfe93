#include "ffi/cuda/device_call.h"

#include <algorithm>
#include <string>

#include "ffi/cuda/op_tag.h"
#include "transport/registry.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

void CheckDeviceGroup(Checker& check, const GroupAttrs& attrs, ffi::AnyBuffer coords) {
  CheckGroup(check, attrs);
  check.Argument("coords", coords, ffi::S32, {2});
  check.Attribute("num_experts", attrs.num_experts <= cuda::kMaxExperts, "at most 4096 on GPUs",
                  attrs.num_experts);
}

ffi::Error PrepareGroup(const GroupAttrs& attrs, ffi::AnyBuffer coords, int32_t device,
                        cuda::OpKind op, const ops::AgreedNumbers& agreed, DeviceGroup& group) {
  const transport::Member* member = transport::TheRegistry().find(attrs.group_id, device);
  if (member == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jax_ep: GPU " + std::to_string(device) + " is in no group of id " +
                          std::to_string(attrs.group_id) +
                          "; make the group with jax_ep.create_group in this process first");
  }
  if (attrs.channel < 0 || attrs.channel >= member->params.num_channels) {
    return ffi::Error::InvalidArgument("jax_ep: attribute channel: expected one of the " +
                                       std::to_string(member->params.num_channels) +
                                       " channels of the group, got " +
                                       std::to_string(attrs.channel));
  }
  if (auto failure = transport::TheRegistry().failure(*member)) {
    return ffi::Error(ffi::ErrorCode::kAborted, *failure);
  }
  group.member = member;
  group.params = member->ParamsOn(attrs.channel);
  group.params.op = op;
  group.params.coords = static_cast<const int32_t*>(coords.untyped_data());
  group.params.tag = OpTag(op, agreed, attrs.ordinal);
  return ffi::Error::Success();
}

void CheckScratch(Checker& check, ffi::AnyBuffer scratch, int64_t bytes) {
  if (static_cast<int64_t>(scratch.size_bytes()) < bytes) {
    check.Fail("result scratch", std::to_string(bytes) + " bytes",
               std::to_string(scratch.size_bytes()));
  }
}

int32_t DeviceGroup::NumBlocks(const GroupAttrs& attrs, int32_t fallback) const {
  return std::clamp(attrs.num_sms > 0 ? attrs.num_sms : fallback, 2, member->max_blocks);
}

const void* SharedOperands::Place(const char* name, const void* pointer, int64_t bytes, bool copy) {
  if (pointer == nullptr || bytes == 0 || member_.IsReachable(pointer, bytes)) return pointer;
  const uint64_t begin = used_;
  used_ += (static_cast<uint64_t>(bytes) + 127) / 128 * 128;
  if (used_ > member_.staging.size) {
    failure_ = std::string(name);
    if (member_.staging.size == 0) {
      failure_ +=
          ": expected memory of XLA's arena, which the peers have mapped, got an address outside "
          "of it; make the group with XLA_PYTHON_CLIENT_PREALLOCATE=false, so that operands are "
          "copied to where peers can read them";
    } else {
      failure_ += ": expected at most " + std::to_string(member_.staging.size) +
                  " bytes of operands that peers read, since they are copied to staging memory, "
                  "got " +
                  std::to_string(used_) +
                  " so far; set JAX_EP_STAGING_BYTES to more before the group is made, or let XLA "
                  "preallocate its memory (see python -m jax_ep.doctor)";
    }
    return pointer;
  }
  void* place = reinterpret_cast<void*>(member_.staging.base + begin);
  if (copy) {
    const cudaError_t error =
        cudaMemcpyAsync(place, pointer, bytes, cudaMemcpyDeviceToDevice, stream_);
    if (error != cudaSuccess) failure_ = std::string(name) + ": " + cudaGetErrorString(error);
  }
  return place;
}

ffi::Error SharedOperands::error() const {
  if (failure_.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_ep: argument " + failure_);
}

ffi::Error ToError(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_ep.") + op +
                              ": launch failed: " + cudaGetErrorString(error));
}

}  // namespace jax_ep
