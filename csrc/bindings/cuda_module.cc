// Python module jax_ep._cuda: the GPU backend's FFI targets, and the life of its groups.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/version.h"
#include "cuda/plan.h"
#include "ffi/targets.h"
#include "transport/peers.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict Targets() {
  nb::dict targets;
  for (const TargetInfo& target : kTargets) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.execute));
  }
  return targets;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_EP_VERSION;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["cuda"] = CUDART_VERSION;
  return info;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "FFI targets of jax_ep's GPU backend, and the life of its groups.";
  m.def("targets", &Targets, "FFI targets: name -> capsule, for register_ffi_target.");
  m.def("build_info", &BuildInfo,
        "Version of jax_ep, (major, minor) of the FFI API, CUDA runtime.");
  m.def(
      "create_group", &transport::CreateGroup, nb::arg("group_id"), nb::arg("instances"),
      nb::arg("arrival_timeout_s"), nb::arg("op_timeout_s"),
      nb::call_guard<nb::gil_scoped_release>(),
      "Makes a group of GPUs of this process: CUDA ordinals in rank order, for each of the groups "
      "side by side. Returns an error text or None.");
  m.def("group_failure", &transport::GroupFailure, nb::arg("group_id"),
        "The first failure of the group in this process as a text, or None.");
  m.def("workspace_bytes", &transport::WorkspaceBytes,
        "Bytes of device memory that a group takes on each of its GPUs.");
  m.def("plan_scratch_size", &cuda::PlanScratchSize, nb::arg("num_experts"), nb::arg("num_ranks"),
        "Number of int32 in the scratch result of target jax_ep_plan.");
}

}  // namespace jax_ep
