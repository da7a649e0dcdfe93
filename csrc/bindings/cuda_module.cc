// Python module jax_ep._cuda: the GPU backend's FFI targets, and the life of its groups.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <set>

#include "bindings/signatures.h"
#include "bindings/version.h"
#include "cuda/core/workspace.h"
#include "cuda/node/combine_vjp.h"
#include "cuda/plan/plan.h"
#include "cuda/rows/quantize.h"
#include "ffi/cuda/async_targets.h"
#include "ffi/cuda/gpu_targets.h"
#include "ffi/cuda/load_kernels.h"
#include "ffi/cuda/op_tag.h"
#include "ffi/targets.h"
#include "transport/copy_rate.h"
#include "transport/error_text.h"
#include "transport/failures.h"
#include "transport/groups.h"
#include "transport/liveness.h"
#include "transport/registry.h"
#include "transport/shared_memory.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict Targets() {
  nb::dict targets;
  for (const TargetInfo& target : kTargets) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.execute));
  }
  for (const TargetInfo& target : kAsyncTargets) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.execute));
  }
  for (const GpuTargetInfo& target : kGpuTargets) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.execute));
  }
  return targets;
}

nb::dict CapturedTargets() {
  nb::dict captured;
  for (const TargetInfo& target : kTargets) captured[target.name] = IsCapturable(target.execute);
  for (const TargetInfo& target : kAsyncTargets) {
    captured[target.name] = IsCapturable(target.execute);
  }
  for (const GpuTargetInfo& target : kGpuTargets) {
    captured[target.name] = IsCapturable(target.execute);
  }
  return captured;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_EP_VERSION;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["cuda"] = CUDART_VERSION;
  return info;
}

nb::dict Limits() {
  nb::dict limits;
  limits["max_ranks"] = cuda::kMaxRanks;
  limits["max_experts"] = cuda::kMaxExperts;
  limits["ring_bytes"] = cuda::kRingBytes;
  limits["max_channels"] = cuda::kMaxChannels;
  limits["max_vjp_row_bytes"] = cuda::MaxCombineVjpRowBytes();
  return limits;
}

std::string RecordText(uint32_t kind, uint32_t rank, uint32_t peer, uint32_t op, uint32_t word,
                       uint64_t expected, uint64_t seen) {
  cuda::ErrorRecord error{};
  error.kind = kind;
  error.rank = rank;
  error.peer = peer;
  error.op = op;
  error.word = word;
  error.expected = expected;
  error.seen = seen;
  return transport::ErrorText(error);
}

using Text = std::optional<std::string>;
using RegionTuple = std::tuple<uint64_t, uint64_t>;
using RankTuple = std::tuple<int, int, uint64_t, std::vector<RegionTuple>>;
using StagingTuple = std::tuple<int, uint64_t, uint64_t>;

Text CreateGroup(int64_t group_id, const std::map<int, std::vector<RankTuple>>& instances,
                 double arrival_timeout_s, double op_timeout_s, int max_blocks, int ranks_per_gpu,
                 const std::vector<StagingTuple>& staging, int first_rank, int num_channels,
                 int latency_tokens, int latency_hidden, const std::vector<int>& absent_ranks) {
  transport::GroupSpec spec;
  std::set<int> devices;
  spec.id = group_id;
  for (const auto& [number, ranks] : instances) {
    std::vector<transport::RankSpec>& instance = spec.instances[number];
    for (const auto& [device, process, workspace, regions] : ranks) {
      transport::RankSpec& rank = instance.emplace_back();
      rank.device = device;
      if (device >= 0) devices.insert(device);
      rank.process = process;
      rank.workspace = workspace;
      for (const auto& [base, size] : regions) rank.regions.push_back({base, size});
    }
  }
  spec.arrival_timeout_s = arrival_timeout_s;
  spec.op_timeout_s = op_timeout_s;
  spec.max_blocks = max_blocks;
  spec.ranks_per_gpu = ranks_per_gpu;
  spec.first_rank = first_rank;
  spec.num_channels = num_channels;
  spec.latency_tokens = latency_tokens;
  spec.latency_hidden = latency_hidden;
  spec.absent_ranks = absent_ranks;
  for (const auto& [device, base, size] : staging) spec.staging.push_back({device, {base, size}});
  if (Text error = LoadKernels(devices)) return error;
  return transport::CreateGroup(spec);
}

std::tuple<uint64_t, Text> AllocateExportable(int device, const std::vector<int>& devices,
                                              uint64_t size) {
  uint64_t base = 0;
  const Text error = transport::AllocateExportable(device, devices, size, base);
  return {base, error};
}

std::tuple<int, uint64_t, uint64_t, Text> ExportAllocation(int device, uint64_t pointer) {
  transport::ExportedMemory memory;
  const Text error = transport::ExportAllocation(device, pointer, memory);
  return {memory.descriptor, memory.base, memory.size, error};
}

std::tuple<uint64_t, Text> ImportMemory(int descriptor, uint64_t size,
                                        const std::vector<int>& devices) {
  uint64_t base = 0;
  const Text error = transport::ImportMemory(descriptor, size, devices, base);
  return {base, error};
}

std::tuple<std::string, Text> DeviceUuid(int device) {
  std::string uuid;
  const Text error = transport::DeviceUuid(device, uuid);
  return {uuid, error};
}

std::tuple<std::map<int, uint64_t>, Text> CompletedOps(int64_t group_id) {
  std::map<int, uint64_t> ops;
  const Text error = transport::CompletedOps(group_id, ops);
  return {ops, error};
}

std::tuple<int, uint64_t, Text> NamePlace(int64_t group_id, int device, uint64_t pointer,
                                          int64_t bytes) {
  transport::Place place;
  const Text error = transport::NamePlace(group_id, device, pointer, bytes, place);
  return {place.region, place.offset, error};
}

using CopyTuple = std::tuple<int, int, int, uint64_t, uint64_t>;

std::tuple<std::vector<double>, Text> TimeCopies(int64_t group_id,
                                                 const std::vector<CopyTuple>& copies,
                                                 int64_t bytes, int mover, int blocks, int count) {
  std::vector<transport::Copy> wanted;
  for (const auto& [device, rank, region, offset, to] : copies) {
    wanted.push_back({device, rank, {region, offset}, to});
  }
  std::vector<double> seconds;
  const Text error = transport::TimeCopies(group_id, wanted, bytes, static_cast<cuda::Mover>(mover),
                                           blocks, count, seconds);
  return {seconds, error};
}

int64_t PlanScratchSize(int32_t layout, int32_t num_tokens, int32_t top_k, int32_t num_experts,
                        int32_t num_ranks) {
  cuda::PlanParams params{};
  params.layout = static_cast<plan::Layout>(layout);
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.num_experts = num_experts;
  params.group.num_ranks = num_ranks;
  params.alignment = 1;  // any
  return cuda::PlanScratchSize(params);
}

int64_t DispatchScratchSize(int64_t num_tokens, int32_t hidden, int64_t num_dequantized) {
  return cuda::QuantizedRows::Bytes(num_tokens, hidden) +
         cuda::DequantizeParams::ScaleBytes(num_dequantized, hidden);
}

uint32_t Tag(int op, const std::vector<int64_t>& shape, int32_t ordinal) {
  return OpTag(static_cast<cuda::OpKind>(op), shape, ordinal);
}

}  // namespace

NB_MODULE(_cuda, m) {
  transport::UseRegistry(transport::OwnRegistry());
  m.doc() = "FFI targets of jax_ep's GPU backend, and the life of its groups.";
  m.def("targets", &Targets, "FFI targets: name -> capsule, for register_ffi_target.");
  m.def("captured_targets", &CapturedTargets,
        "Whether XLA puts calls of a target into command buffers (CUDA graphs): name -> bool.");
  m.def(
      "gpu_signatures", [] { return SignaturesByTarget(ops::GpuSignatures()); },
      "For tests: target that only GPUs have -> names, as in signatures of jax_ep._cpu.");
  m.def("build_info", &BuildInfo,
        "Version of jax_ep, (major, minor) of the FFI API, CUDA runtime.");
  m.def("limits", &Limits,
        "What the kernels have room for: max_ranks of a group on one host, max_experts of it, "
        "ring_bytes of the sums of rows under way, max_channels of a group, max_vjp_row_bytes of a "
        "row in combine_vjp.");
  m.def("create_group", &CreateGroup, nb::arg("group_id"), nb::arg("instances"),
        nb::arg("arrival_timeout_s"), nb::arg("op_timeout_s"), nb::arg("max_blocks"),
        nb::arg("ranks_per_gpu"), nb::arg("staging"), nb::arg("first_rank") = 0,
        nb::arg("num_channels") = 1, nb::arg("latency_tokens") = 0, nb::arg("latency_hidden") = 0,
        nb::arg("absent_ranks") = std::vector<int>{}, nb::call_guard<nb::gil_scoped_release>(),
        "Makes a group. Each of the groups side by side, by number, is a list of ranks: (CUDA "
        "ordinal or -1, process, address of the workspace or 0, regions as (base, size)). Staging "
        "memory is (CUDA ordinal, base, size). Where a group spans hosts, these are the ranks of "
        "this host, and first_rank is what the first of them is in the group. num_channels - 1 ops "
        "may run beside the others. Workspaces are as large as workspace_bytes says. absent_ranks "
        "take no part in latency mode, and may have no workspace here. Returns an error text or "
        "None.");
  m.def(
      "registry",
      [] {
        return nb::capsule(static_cast<const void*>(transport::OwnRegistry()), "jax_ep.registry");
      },
      "The groups of this process, for use_registry of another native library.");
  m.def("allocate_exportable", &AllocateExportable, nb::arg("device"), nb::arg("devices"),
        nb::arg("size"),
        "Allocates zeros that other processes can map: (address, None) or (0, "
        "error text).");
  m.def("export_allocation", &ExportAllocation, nb::arg("device"), nb::arg("pointer"),
        "The allocation of an address: (descriptor, base, size, None) or (-1, 0, 0, error text).");
  m.def("import_memory", &ImportMemory, nb::arg("descriptor"), nb::arg("size"), nb::arg("devices"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Maps what another process exported: (address, None) or (0, error text).");
  m.def("device_uuid", &DeviceUuid, nb::arg("device"),
        "Names the physical GPU: (digits, None) or ('', error text).");
  m.def("watch_process", &transport::WatchProcess, nb::arg("process"), nb::arg("descriptor"),
        "Watches a connected socket to a process that shares a group. Returns an error text or "
        "None.");
  m.def("say_goodbye", &transport::SayGoodbye, nb::call_guard<nb::gil_scoped_release>(),
        "Waits for the GPUs of this process's groups, then tells all watched processes that this "
        "one ends.");
  m.def("gone_processes", &transport::GoneProcesses,
        "The watched processes that have gone: process -> whether it said goodbye.");
  m.def("group_failure", &transport::GroupFailure, nb::arg("group_id"),
        "The first failure of the group in this process as a text, or None.");
  m.def("completed_ops", &CompletedOps, nb::arg("group_id"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Ops of the group that each GPU of this process has completed: ({CUDA ordinal: ops}, None) "
        "or ({}, error text). Waits for its work.");
  m.def("name_place", &NamePlace, nb::arg("group_id"), nb::arg("device"), nb::arg("pointer"),
        nb::arg("bytes"),
        "How a rank names memory of its own to the others: (region, offset, None) or (0, 0, error "
        "text).");
  m.def(
      "time_copies", &TimeCopies, nb::arg("group_id"), nb::arg("copies"), nb::arg("bytes"),
      nb::arg("mover"), nb::arg("blocks"), nb::arg("count"),
      nb::call_guard<nb::gil_scoped_release>(),
      "Has GPUs copy at the same time: each copy is (CUDA ordinal, rank that is read, its region, "
      "offset, address to write). Returns (seconds of each for `count` copies, None) or ([], "
      "error text).");
  m.def("workspace_bytes", &transport::WorkspaceBytes, nb::arg("num_channels"),
        nb::arg("num_ranks") = 0, nb::arg("latency_tokens") = 0, nb::arg("latency_hidden") = 0,
        "Bytes of device memory that a group takes on each of its GPUs: its channels, and for each "
        "an inbox of latency mode for so many ranks on a host, tokens a rank and channels of 16 "
        "bits.");
  m.def("plan_scratch_size", &PlanScratchSize, nb::arg("layout"), nb::arg("num_tokens"),
        nb::arg("top_k"), nb::arg("num_experts"), nb::arg("num_ranks"),
        "Number of int32 in the scratch result of target jax_ep_plan.");
  m.def("dispatch_scratch_size", &DispatchScratchSize, nb::arg("num_tokens"), nb::arg("hidden"),
        nb::arg("num_dequantized"),
        "Bytes in the scratch result of target jax_ep_dispatch where it casts rows; else it has "
        "none. Target jax_ep_network_dispatch has scales too, for rows that it makes dense where "
        "they were received.");
  m.def("op_tag", &Tag, nb::arg("op"), nb::arg("shape"), nb::arg("ordinal"),
        "For tests: what tells an op from others in its flags.");
  m.def("error_text", &RecordText, nb::arg("kind"), nb::arg("rank"), nb::arg("peer"), nb::arg("op"),
        nb::arg("word"), nb::arg("expected"), nb::arg("seen"),
        "For tests: what the record of a failure says.");
}

}  // namespace jax_ep
