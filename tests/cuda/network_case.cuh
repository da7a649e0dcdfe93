// What tests of groups that span hosts run on: ranks on the emulator's network.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/network/params.h"
#include "cuda/network/plan.h"
#include "cuda/network/routes.h"
#include "kernels_case.cuh"
#include "kernels_ops.cuh"
#include "network.h"

namespace {

int num_wrong = 0;

template <typename T>
void Compare(const char* what, int step, int rank, const Buffer<T>& buffer) {
  const std::vector<T> got = buffer.FromDevice();
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &buffer.host[i], sizeof(T)) != 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return;
  std::printf("WRONG %s of rank %d in step %d: %zu of %zu, first at %zu\n", what, rank, step, wrong,
              got.size(), first);
  ++num_wrong;
}

template <typename T>
void Poison(Buffer<T>& buffer) {
  CHECK_CUDA(cudaMemset(buffer.device, 0xAB, buffer.host.size() * sizeof(T)));
}

// Waits for the op on all ranks; reports those that failed.
inline void Finish(const char* op, int step, const std::vector<Rank>& ranks) {
  for (size_t r = 0; r < ranks.size(); ++r) {
    CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    const cuda::ErrorRecord& error = *ranks[r].error;
    if (error.set == 0) continue;
    std::printf("FAILED %s of rank %zu in step %d: kind %u, word %u, peer %u, expected %llx, ", op,
                r, step, error.kind, error.word, error.peer,
                static_cast<unsigned long long>(error.expected));
    std::printf("saw %llx\n", static_cast<unsigned long long>(error.seen));
    ++num_wrong;
  }
}

// A rank's network memory and routes.
struct NetworkRank {
  char* memory;
  Buffer<int32_t> counterpart_pe, recv_start, recv_token, recv_row;
};

// Processing elements need not be in the order of ranks.
inline int PeOf(int rank, int num_ranks) { return num_ranks - 1 - rank; }

inline Options WithDefaults(Options options) {
  for (const auto& [name, value] : {std::pair{"ranks", "4"},
                                    {"tokens", "40"},
                                    {"hidden", "264"},
                                    {"topk", "4"},
                                    {"experts", "24"},
                                    {"blocks", "2"},
                                    {"alignment", "8"},
                                    {"timeout", "60"}}) {
    options.given.emplace(name, value);
  }
  return options;
}

// The ranks of `hosts` hosts, and a network between them.
struct NetworkCase {
  Options options;
  Workload w;
  std::mt19937 generator;
  int hosts, host_ranks;
  int64_t message_bytes;
  std::vector<Rank> ranks;
  cuda::NetworkShape shape;
  std::vector<NetworkRank> network;

  explicit NetworkCase(const Options& given)
      : options(WithDefaults(given)), w(options), generator(options.Int("seed", 1)) {
    hosts = options.Int("hosts", 2);
    host_ranks = w.R / hosts;
    message_bytes = (w.T * w.K * 2 + 127) / 128 * 128;
    if (w.C == 0) {  // enough for any choices
      w.C = plan::RoundUp(w.R * w.T * (w.by_expert ? std::min(w.K, w.L) : 1) + w.L * w.alignment,
                          w.alignment);
    }
    ranks = MakeRanks(w, generator);
    Prepare(w, options, ranks, generator);
    shape = {hosts, host_ranks, options.Int("lanes", w.blocks), options.Int("chunk_kib", 4) << 10};
    network = std::vector<NetworkRank>(w.R);
    for (int r = 0; r < w.R; ++r) {
      NetworkRank& self = network[r];
      const int64_t bytes = shape.bytes() + cuda::PlanMemory(nullptr, shape, message_bytes).bytes();
      CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&self.memory), bytes));
      CHECK_CUDA(cudaMemset(self.memory, 0, bytes));
      emulator::AddHeap(PeOf(r, w.R), self.memory, bytes);
      self.counterpart_pe.Resize(hosts);
      for (int h = 0; h < hosts; ++h) {
        self.counterpart_pe.host[h] = PeOf(h * host_ranks + r % host_ranks, w.R);
      }
      self.counterpart_pe.ToDevice();
      self.recv_start.Resize(w.R + 1);
      self.recv_token.Resize(w.C);
      self.recv_row.Resize(w.C);
    }
    std::printf("hosts=%d R=%d T=%d K=%d E=%d H=%d C=%d %s %s%s blocks=%d, %lld KiB a rank\n",
                hosts, w.R, w.T, w.K, w.E, w.H, w.C, w.by_expert ? "expert" : "token",
                w.dtype.c_str(), w.fp8 ? " fp8" : "", w.blocks,
                static_cast<long long>(shape.bytes() >> 10));
  }

  // Every rank's choices in a step, some of them invalid. The later the step, the fewer ranks are
  // wanted.
  void Choose(int step) {
    const int masked = options.Int("masked", 0);
    for (int r = 0; r < w.R; ++r) {
      for (int32_t& expert : ranks[r].topk_idx.host) {
        const uint32_t x = generator();
        expert = static_cast<int32_t>(x / 8 % (w.E - step * 5 % (w.E / 2)));
        if (x % 8 == 0 || (masked == 1 && r == step % w.R) || (masked == 2 && r != step % w.R)) {
          expert = -1;
        } else if (x % 97 == 1) {
          expert = w.E + 1;
        }
      }
    }
  }

  // On the host, the routes that follow from the handles of a plan for one host.
  void MakeRoutes() {
    for (int r = 0; r < w.R; ++r) {
      NetworkRank& self = network[r];
      std::fill(self.recv_token.host.begin(), self.recv_token.host.end(), -1);
      std::fill(self.recv_row.host.begin(), self.recv_row.host.end(), -1);
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
    }
  }

  // The group as rank `r` of it knows it.
  cuda::NetworkParams NetworkOf(int r, cuda::OpKind op) const {
    cuda::NetworkParams params{};
    params.node = GroupOf(ranks[r], op);
    params.node.rank = r % host_ranks;
    params.node.num_ranks = host_ranks;
    for (int j = 0; j < host_ranks; ++j) {
      params.node.peers[j] = ranks[r / host_ranks * host_ranks + j].channel;
      params.memory[j] = network[r / host_ranks * host_ranks + j].memory;
    }
    params.shape = shape;
    params.host = r / host_ranks;
    params.counterpart_pe = network[r].counterpart_pe.device;
    return params;
  }
};

}  // namespace
