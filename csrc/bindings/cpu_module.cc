// Python module jax_ep._cpu: hands the CPU backend's FFI targets, and its test hooks, to Python.

#include <nanobind/nanobind.h>

#include <vector>

#include "bindings/signatures.h"
#include "bindings/version.h"
#include "cpu/rendezvous.h"
#include "ffi/cpu/call_state.h"
#include "ffi/cpu/test_hooks.h"
#include "ffi/targets.h"
#include "ops/signatures.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

#if defined(__clang__)
constexpr char kCompiler[] = __VERSION__;  // begins with the compiler's name
#else
constexpr char kCompiler[] = "GCC " __VERSION__;
#endif

// Whether this build also makes the libraries of GPUs and of groups that span hosts, so that one
// that lacks them is noticed.
#ifdef JAX_EP_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif
#ifdef JAX_EP_WITH_NVSHMEM
constexpr bool kWithNvshmem = true;
#else
constexpr bool kWithNvshmem = false;
#endif

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Targets() {
  nb::dict targets;
  for (const TargetInfo& target : kTargets) {
    nb::dict stages;
    stages["instantiate"] = Capsule(jax_ep_instantiate);
    stages["execute"] = Capsule(target.execute);
    targets[target.name] = stages;
  }
  return targets;
}

nb::dict Types() {
  nb::dict registration;
  registration["type_id"] = nb::capsule(static_cast<void*>(&CallState::id));
  registration["type_info"] = nb::capsule(static_cast<void*>(&CallState::info));
  nb::dict types;
  types[CallState::kTypeName] = registration;
  return types;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_EP_VERSION;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["compiler"] = kCompiler;
  info["with_cuda"] = kWithCuda;
  info["with_nvshmem"] = kWithNvshmem;
  return info;
}

nb::dict CallCountsByName() {
  const auto counts = CallCounts();
  nb::dict by_name;
  for (int i = 0; i < kNumTargets; ++i) by_name[kTargets[i].name] = counts[i];
  return by_name;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "FFI targets of jax_ep's CPU backend, and hooks for its tests.";
  m.def("targets", &Targets, "FFI targets: name -> {stage: capsule}, for register_ffi_target.");
  m.def(
      "signatures", [] { return SignaturesByTarget(ops::Signatures()); },
      "Names in the order in which each target takes them: name -> {attributes, operands, "
      "results, after and scratch (operands and results that only GPUs have, after the others)}.");
  m.def("types", &Types, "FFI state types: name -> {type_id, type_info}, for register_ffi_type.");
  m.def(
      "build_info", &BuildInfo,
      "Version of jax_ep, (major, minor) of the FFI API, compiler, whether there is a GPU library "
      "and one of groups that span hosts.");
  m.def("call_counts", &CallCountsByName,
        "Executions of each target, one per rank and call, since reset_call_counts().");
  m.def("reset_call_counts", &ResetCallCounts, "Sets all call counts to zero.");
  m.def("set_test_delay_us", &SetTestDelay, nb::arg("max_us"),
        "Has every call sleep a random time up to max_us microseconds before it joins its group; "
        "0 turns it off.");
  m.def("open_rendezvous", &cpu::NumOpenMeetings, "Meetings that wait for ranks.");
}

}  // namespace jax_ep
