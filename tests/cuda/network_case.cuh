// Shared by network_test and network_failures_test: ranks of several hosts (kernels_case.cuh) with
// network memory and routes, and the ops of a group that spans hosts.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cuda/network/combine.h"
#include "cuda/network/combine_vjp.h"
#include "cuda/network/dispatch.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "network.h"

namespace {

// A rank's network memory and routes.
struct NetworkRank {
  char* memory;
  Buffer<cuda::Counterpart> counterparts;
  Buffer<int32_t> recv_start, recv_token, recv_row;
};

// Processing elements need not be in the order of ranks.
inline int PeOf(int rank, int num_ranks) { return num_ranks - 1 - rank; }

// The routes that follow from the handles of a plan for one host.
inline void RoutesOf(const Workload& w, std::vector<Rank>& ranks,
                     std::vector<NetworkRank>& network) {
  for (int r = 0; r < w.R; ++r) {
    NetworkRank& self = network[r];
    for (Buffer<int32_t>* entries : {&self.recv_token, &self.recv_row}) {
      std::fill(entries->host.begin(), entries->host.end(), plan::kNone);
    }
    int entries = 0;
    for (int s = 0; s < w.R; ++s) {
      self.recv_start.host[s] = entries;
      for (int t = 0; t < w.T; ++t) {
        for (int m = 0; m < w.M; ++m) {
          const int32_t row = ranks[r].recv_rows.host[(size_t(s) * w.T + t) * w.M + m];
          if (row < 0) continue;
          self.recv_token.host[entries] = t;
          self.recv_row.host[entries++] = row;
        }
      }
    }
    self.recv_start.host[w.R] = entries;
    for (Buffer<int32_t>* buffer : {&self.recv_start, &self.recv_token, &self.recv_row}) {
      buffer->ToDevice();
    }
  }
}

// The parameters that are the same for every op: the group as rank `r` sees it.
inline cuda::NetworkParams NetworkOf(const std::vector<Rank>& ranks,
                                     const std::vector<NetworkRank>& network,
                                     const cuda::NetworkShape& shape, int r, cuda::OpKind op) {
  const int n = shape.host_ranks;
  cuda::NetworkParams params{};
  params.node = GroupOf(ranks[r], op);
  params.node.rank = r % n;
  params.node.num_ranks = n;
  params.node.first_rank = r / n * n;
  for (int j = 0; j < n; ++j) {
    params.node.peers[j] = ranks[r / n * n + j].channel;
    params.memory[j] = network[r / n * n + j].memory;
  }
  params.shape = shape;
  params.host = r / n;
  params.counterparts = network[r].counterparts.device;
  return params;
}

// The arguments of an op with the entries of a rank, as the handlers have them.
template <typename Args>
Args WithEntries(Args args, const NetworkRank& self) {
  args.handle.recv_start = self.recv_start.device;
  args.handle.recv_token = self.recv_token.device;
  args.handle.recv_row = self.recv_row.device;
  return args;
}

inline cuda::NetworkDispatchParams NetworkDispatchParamsOf(const Workload& w, const Rank& rank,
                                                           const NetworkRank& self,
                                                           const cuda::NetworkParams& network) {
  auto p = cuda::NetworkParamsOf(WithEntries(DispatchArgsOf(w, rank, OnDevice()), self));
  p.network = network;
  p.experts_per_host = w.E / network.shape.num_hosts;
  p.num_blocks = w.blocks;
  return p;
}

inline cuda::NetworkCombineParams NetworkCombineParamsOf(const Workload& w, const Rank& rank,
                                                         const NetworkRank& self,
                                                         const cuda::NetworkParams& network) {
  auto p = cuda::NetworkParamsOf(WithEntries(CombineArgsOf(w, rank, OnDevice()), self));
  p.network = network;
  p.num_blocks = w.blocks;
  return p;
}

inline cuda::NetworkCombineVjpParams NetworkCombineVjpParamsOf(const Workload& w, const Rank& rank,
                                                               const NetworkRank& self,
                                                               const cuda::NetworkParams& network) {
  auto p = cuda::NetworkParamsOf(WithEntries(CombineVjpArgsOf(w, rank, OnDevice()), self));
  p.network = network;
  p.experts_per_host = w.E / network.shape.num_hosts;
  p.num_blocks = w.blocks;
  return p;
}

// Expert outputs, and values that go home, some of them negative zeros.
inline void FillRows(const Workload& w, Rank& rank, std::mt19937& generator) {
  for (size_t i = 0; i < rank.d_rows.host.size() / w.width; ++i) {
    const float value = i % 29 == 5 ? -0.0f : float(generator()) / 4e9f - 0.5f;
    if (w.width == 4) {
      reinterpret_cast<float*>(rank.d_rows.host.data())[i] = value;
    } else if (w.dtype == "f16") {
      reinterpret_cast<cpu::Float16*>(rank.d_rows.host.data())[i] =
          cpu::FromFloat<cpu::Float16>(value);
    } else {
      reinterpret_cast<cpu::BFloat16*>(rank.d_rows.host.data())[i] =
          cpu::FromFloat<cpu::BFloat16>(value);
    }
  }
  rank.d_rows.ToDevice();
  for (float& value : rank.d_weights.host) {
    value = generator() % 9 == 0 ? -0.0f : float(generator()) / 4e9f - 0.5f;
  }
  rank.d_weights.ToDevice();
}

// Small workloads, for the emulator.
inline void SetDefaults(Options& options) {
  const auto otherwise = [&](const char* name, const char* value) {
    options.given.emplace(name, value);
  };
  for (const auto& [name, value] : {std::pair{"ranks", "4"},
                                    {"tokens", "40"},
                                    {"hidden", "264"},
                                    {"topk", "4"},
                                    {"experts", "24"},
                                    {"blocks", "2"},
                                    {"alignment", "8"},
                                    {"timeout", "60"}}) {
    otherwise(name, value);
  }
}

// Room for the routes of any step.
inline int EnoughCapacity(const Workload& w) {
  return plan::RoundUp(w.R * w.T * (w.by_expert ? std::min(w.K, w.L) : 1) + w.L * w.alignment,
                       w.alignment);
}

inline cuda::NetworkShape ShapeOf(const Workload& w, const Options& options) {
  const int hosts = options.Int("hosts", 2);
  return {hosts, w.R / hosts, options.Int("lanes", w.blocks), options.Int("chunk_kib", 4) << 10};
}

// Which hosts reach each other's memory: option direct=0 none (the default), 1 all, 2 those whose
// numbers differ by an odd number.
inline bool IsDirect(const Options& options, int host, int other) {
  const int direct = options.Int("direct", 0);
  return direct == 1 || (direct == 2 && (host + other) % 2 == 1);
}

// Each rank with network memory, and `more_bytes` behind it.
inline std::vector<NetworkRank> MakeNetwork(const Workload& w, const Options& options,
                                            const cuda::NetworkShape& shape,
                                            const std::vector<Rank>& ranks,
                                            int64_t more_bytes = 0) {
  const int hosts = shape.num_hosts, n = shape.host_ranks;
  std::vector<NetworkRank> network(w.R);
  for (int r = 0; r < w.R; ++r) {
    CHECK_CUDA(cudaSetDevice(ranks[r].device));
    CHECK_CUDA(cuda::LoadNetworkDispatch());
    CHECK_CUDA(cuda::LoadNetworkCombine());
    CHECK_CUDA(cuda::LoadNetworkCombineVjp());
    NetworkRank& self = network[r];
    const int64_t bytes = shape.bytes() + more_bytes;
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&self.memory), bytes));
    FillDevice(self.memory, 0xAB, shape.bytes());
    FillDevice(self.memory, 0, shape.word_bytes());
    FillDevice(self.memory + shape.bytes(), 0, more_bytes);
    emulator::AddHeap(PeOf(r, w.R), self.memory, bytes);
    self.recv_start.Resize(w.R + 1);
    self.recv_token.Resize(w.C);
    self.recv_row.Resize(w.C);
  }
  for (int r = 0; r < w.R; ++r) {
    CHECK_CUDA(cudaSetDevice(ranks[r].device));
    NetworkRank& self = network[r];
    self.counterparts.Resize(hosts);
    for (int h = 0; h < hosts; ++h) {
      const int other = h * n + r % n;
      char* const memory = IsDirect(options, r / n, h) ? network[other].memory : nullptr;
      self.counterparts.host[h] = {PeOf(other, w.R), memory};
    }
    self.counterparts.ToDevice();
  }
  return network;
}

// Runs an op of the CPU backend for all ranks: arguments_of(rank), work_of(arguments).
template <typename ArgumentsOf, typename WorkOf>
inline void RunOnCpu(const std::vector<Rank>& ranks, ArgumentsOf&& arguments_of, WorkOf&& work_of) {
  using Args = decltype(arguments_of(ranks[0]));
  std::vector<Args> arguments;
  for (const Rank& k : ranks) arguments.push_back(arguments_of(k));
  std::vector<const Args*> pointers;
  for (const Args& of_rank : arguments) pointers.push_back(&of_rank);
  cpu::RowWork work = work_of(pointers);
  work.run(0, work.num_rows);
}

// Plans and dispatches on the CPU: the results are on the host, the handle and routes on the device
// too.
inline void PlanOnCpu(const Workload& w, std::vector<Rank>& ranks,
                      std::vector<NetworkRank>& network) {
  RunOnCpu(ranks, [&](const Rank& k) { return PlanArgsOf(w, k, OnHost()); }, cpu::PlanWork);
  RunOnCpu(ranks, [&](const Rank& k) { return DispatchArgsOf(w, k, OnHost()); }, cpu::DispatchWork);
  RoutesOf(w, ranks, network);
  for (Rank& rank : ranks) {
    rank.topk.ToDevice();
    rank.recv_src.ToDevice();
    rank.expert_idx.ToDevice();
  }
}

}  // namespace
