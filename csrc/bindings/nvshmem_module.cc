// Python module jax_ep._nvshmem: FFI targets of groups that span hosts, and the life of NVSHMEM.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/version.h"
#include "cuda/network/plan.h"
#include "ffi/network/load_kernels.h"
#include "ffi/network/targets.h"
#include "transport/network/network_groups.h"
#include "transport/network/nvshmem.h"
#include "transport/registry.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

using Text = std::optional<std::string>;
using VersionTuple = std::tuple<int, int, int>;

VersionTuple TupleOf(transport::Version version) {
  return {version.major, version.minor, version.patch};
}

nb::dict Targets() {
  nb::dict targets;
  for (const NetworkTargetInfo& target : kNetworkTargets) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.execute));
  }
  return targets;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_EP_VERSION;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["cuda"] = CUDART_VERSION;
  info["nvshmem"] = TupleOf(transport::BuiltVersion());
  return info;
}

nb::dict Limits() {
  nb::dict limits;
  limits["max_hosts"] = cuda::kMaxHosts;
  limits["max_host_ranks"] = cuda::kMaxRanks;
  limits["max_windows"] = cuda::kMaxChunks;
  limits["chunk_slots"] = cuda::kChunkSlots;
  return limits;
}

Text VersionObstacle(VersionTuple built, VersionTuple loaded) {
  const auto version = [](VersionTuple of) {
    return transport::Version{std::get<0>(of), std::get<1>(of), std::get<2>(of)};
  };
  return transport::VersionObstacle(version(built), version(loaded));
}

Text UseRegistry(nb::capsule registry) {
  return transport::UseRegistry(
      static_cast<const transport::Registry*>(registry.data("jax_ep.registry")));
}

std::tuple<nb::bytes, Text> UniqueId() {
  std::string id;
  const Text error = transport::MakeUniqueId(id);
  return {nb::bytes(id.data(), id.size()), error};
}

Text Start(int device, int pe, int num_pes, nb::bytes id, int64_t bytes) {
  const std::string copy(id.c_str(), id.size());
  const nb::gil_scoped_release release;  // it waits for the other processes
  return transport::StartNvshmem(device, pe, num_pes, copy, bytes);
}

int64_t NetworkBytes(int num_hosts, int host_ranks, int num_lanes, int chunk_bytes,
                     int64_t message_bytes) {
  return transport::NetworkBytes({num_hosts, host_ranks, num_lanes, chunk_bytes}, message_bytes);
}

Text AddNetwork(int64_t group_id, int device, int host, const std::vector<std::vector<int>>& pe,
                int num_lanes, int chunk_bytes, int64_t message_bytes, int64_t offset) {
  if (Text error = LoadNetworkKernels(device)) return error;
  transport::NetworkSpec spec;
  spec.group_id = group_id;
  spec.device = device;
  spec.host = host;
  spec.pe = pe;
  spec.num_lanes = num_lanes;
  spec.chunk_bytes = chunk_bytes;
  spec.message_bytes = message_bytes;
  spec.offset = offset;
  return transport::AddNetwork(spec);
}

}  // namespace

NB_MODULE(_nvshmem, m) {
  m.doc() = "FFI targets of groups that span hosts, and the life of NVSHMEM.";
  m.def("targets", &Targets, "FFI targets: name -> capsule, for register_ffi_target.");
  m.def("build_info", &BuildInfo,
        "Version of jax_ep, (major, minor) of the FFI API, CUDA runtime, version of NVSHMEM.");
  m.def("limits", &Limits,
        "What the kernels have room for: max_hosts of a group, max_host_ranks on each, max_windows "
        "of "
        "an op; and chunk_slots, the chunks under way from a rank to a host in one lane.");
  m.def(
      "loaded_version", [] { return TupleOf(transport::LoadedVersion()); },
      "Version of the NVSHMEM that was loaded.");
  m.def("version_obstacle", &VersionObstacle, nb::arg("built"), nb::arg("loaded"),
        "Why one version of NVSHMEM cannot be used by what was built with another, or None.");
  m.def("use_registry", &UseRegistry, nb::arg("registry"),
        "Has handlers find the groups that jax_ep._cuda makes. Returns an error text or None.");
  m.def("unique_id", &UniqueId, "What names a job: (bytes, None) or (b'', error text).");
  m.def("start", &Start, nb::arg("device"), nb::arg("pe"), nb::arg("num_pes"), nb::arg("id"),
        nb::arg("bytes"),
        "Starts NVSHMEM on a GPU (CUDA ordinal) with `bytes` of memory in every process, all of "
        "which call this. Returns an error text or None.");
  m.def("runs", &transport::NvshmemRuns, "Whether it has been started, and not been ended.");
  m.def(
      "reaches", [](int pe) { return transport::SymmetricMemoryOf(pe) != nullptr; }, nb::arg("pe"),
      "Whether this GPU reaches the memory of a processing element without the network.");
  m.def("end", &transport::EndNvshmem, nb::call_guard<nb::gil_scoped_release>(),
        "Ends it; all processes call this. Returns an error text or None.");
  m.def("network_bytes", &NetworkBytes, nb::arg("num_hosts"), nb::arg("host_ranks"),
        nb::arg("num_lanes"), nb::arg("chunk_bytes"), nb::arg("message_bytes"),
        "Bytes that a group takes of the memory of every process.");
  m.def(
      "add_network", &AddNetwork, nb::arg("group_id"), nb::arg("device"), nb::arg("host"),
      nb::arg("pe"), nb::arg("num_lanes"), nb::arg("chunk_bytes"), nb::arg("message_bytes"),
      nb::arg("offset"), nb::call_guard<nb::gil_scoped_release>(),
      "Adds the network to a group that jax_ep._cuda has made of the ranks of this host. `pe` has "
      "the processing elements of the ranks of each host. Returns an error text or None.");
  m.def("plan_scratch_size", &cuda::NetworkPlanScratchSize, nb::arg("num_local_experts"),
        "Number of int32 in the scratch result of target jax_ep_network_plan.");
}

}  // namespace jax_ep
