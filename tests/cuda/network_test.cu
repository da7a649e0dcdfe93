// The kernels of groups that span hosts, on the emulator's network, bit by bit against the CPU
// backend, with other routes in every step.
//
//   network_test [hosts=2] [ranks=4] [layout=expert|token] [tokens=40] [hidden=264] [topk=4]
//                [experts=24] [blocks=2] [steps=3] [chunk_kib=4] [capacity=0 (what is received)]
//                [lanes=BLOCKS] [dtype=bf16|f32|f16] [fp8=0|1] [weighted=0|1] [alignment=8]
//                [masked=0|1|2] [timeout=60]
//
// masked=1: one rank has no tokens that go anywhere; masked=2: all but one.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/combine.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cuda/network/combine.h"
#include "cuda/network/dispatch.h"
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

// A rank's network memory and routes.
struct NetworkRank {
  char* memory;
  Buffer<int32_t> counterpart_pe, recv_start, recv_token, recv_row;
};

// Processing elements need not be in the order of ranks.
int PeOf(int rank, int num_ranks) { return num_ranks - 1 - rank; }

// The routes that follow from the handles of a plan for one host.
void RoutesOf(const Workload& w, std::vector<Rank>& ranks, std::vector<NetworkRank>& network) {
  for (int r = 0; r < w.R; ++r) {
    NetworkRank& self = network[r];
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

// How often a token's row must cross the network: once for each other host that it goes to.
size_t Crossings(const Workload& w, int hosts, const std::vector<Rank>& ranks) {
  size_t crossings = 0;
  for (int r = 0; r < w.R; ++r) {
    for (int i = 0; i < w.T * hosts; ++i) {
      const int32_t* topk = &ranks[r].topk.host[size_t(i / hosts) * w.K];
      const int host = i % hosts;
      crossings += host != r / (w.R / hosts) && std::any_of(topk, topk + w.K, [&](int32_t expert) {
                     return expert >= 0 && expert / (w.E / hosts) == host;
                   });
    }
  }
  return crossings;
}

// The same for every op: the group as rank `r` of it knows it.
cuda::NetworkParams NetworkOf(const std::vector<Rank>& ranks,
                              const std::vector<NetworkRank>& network,
                              const cuda::NetworkShape& shape, int r, cuda::OpKind op) {
  const int n = shape.host_ranks;
  cuda::NetworkParams params{};
  params.node = GroupOf(ranks[r], op);
  params.node.rank = r % n;
  params.node.num_ranks = n;
  for (int j = 0; j < n; ++j) {
    params.node.peers[j] = ranks[r / n * n + j].channel;
    params.memory[j] = network[r / n * n + j].memory;
  }
  params.shape = shape;
  params.host = r / n;
  params.counterpart_pe = network[r].counterpart_pe.device;
  return params;
}

cuda::NetworkRoutes RoutesOnDevice(const Rank& rank, const NetworkRank& self) {
  return {rank.topk.device, self.recv_start.device, self.recv_token.device, self.recv_row.device};
}

cuda::NetworkDispatchParams NetworkDispatchParamsOf(const Workload& w, const Rank& rank,
                                                    const NetworkRank& self,
                                                    const cuda::NetworkParams& network) {
  const cuda::DispatchParams same = cuda::ParamsOf(DispatchArgsOf(w, rank, OnDevice()));
  cuda::NetworkDispatchParams p{};
  p.network = network;
  p.routes = RoutesOnDevice(rank, self);
  p.layout = same.layout;
  p.num_tokens = same.num_tokens;
  p.top_k = same.top_k;
  p.experts_per_host = w.E / network.shape.num_hosts;
  p.capacity = same.capacity;
  p.row_bytes = same.row_bytes;
  p.row_stride = same.row_stride;
  p.scales_per_row = same.scales_per_row;
  p.x = same.x;
  p.scales = same.scales;
  p.weights = same.weights;
  p.recv_src = same.recv_src;
  p.expert_idx = same.expert_idx;
  p.rows = same.rows;
  p.row_scales = same.row_scales;
  p.row_weights = same.row_weights;
  p.num_blocks = w.blocks;
  return p;
}

cuda::NetworkCombineParams NetworkCombineParamsOf(const Workload& w, const Rank& rank,
                                                  const NetworkRank& self,
                                                  const cuda::NetworkParams& network) {
  const cuda::CombineParams same = cuda::ParamsOf(CombineArgsOf(w, rank, OnDevice()));
  cuda::NetworkCombineParams p{};
  p.network = network;
  p.routes = RoutesOnDevice(rank, self);
  p.layout = same.layout;
  p.type = same.type;
  p.num_tokens = same.num_tokens;
  p.top_k = same.top_k;
  p.row_bytes = w.H * w.width;
  p.rows = same.rows;
  p.row_weights = same.row_weights;
  p.values = same.values;
  p.recv_src = rank.recv_src.device;
  p.expert_idx = rank.expert_idx.device;
  p.y = same.y;
  p.home = same.home;
  p.num_blocks = w.blocks;
  return p;
}

// What combine gives on this topology: added in float32 and rounded once a rank, once a host and
// once at home. Into the host's side of `y`.
template <typename T>
void SumsOf(const Workload& w, int hosts, std::vector<Rank>& ranks) {
  const int n = w.R / hosts;
  const auto rows_of = [&](Buffer<char>& buffer) {
    return reinterpret_cast<T*>(buffer.host.data());
  };
  for (int s = 0; s < w.R; ++s) {
    for (int t = 0; t < w.T; ++t) {
      for (int i = 0; i < w.H; ++i) {
        float at_home = 0;
        for (int host = 0; host < hosts; ++host) {
          float on_host = 0;
          for (int r = host * n; r < (host + 1) * n; ++r) {
            float on_rank = 0;
            for (int m = 0; m < w.M; ++m) {
              const int32_t row = ranks[r].recv_rows.host[(size_t(s) * w.T + t) * w.M + m];
              if (row < 0) continue;
              float value = cpu::ToFloat(rows_of(ranks[r].d_rows)[size_t(row) * w.H + i]);
              if (w.weighted) value *= ranks[r].row_weights.host[row];
              on_rank += value;
            }
            on_host += cpu::ToFloat(cpu::FromFloat<T>(on_rank));
          }
          at_home += cpu::ToFloat(cpu::FromFloat<T>(on_host));
        }
        rows_of(ranks[s].y)[size_t(t) * w.H + i] = cpu::FromFloat<T>(at_home);
      }
    }
  }
}

void SumsOf(const Workload& w, int hosts, std::vector<Rank>& ranks) {
  if (w.dtype == "f32") return SumsOf<float>(w, hosts, ranks);
  if (w.dtype == "f16") return SumsOf<cpu::Float16>(w, hosts, ranks);
  SumsOf<cpu::BFloat16>(w, hosts, ranks);
}

// Expert outputs, and values that go home, some of them negative zeros.
void FillRows(const Workload& w, Rank& rank, std::mt19937& generator) {
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

template <typename T>
void Poison(Buffer<T>& buffer) {
  CHECK_CUDA(cudaMemset(buffer.device, 0xAB, buffer.host.size() * sizeof(T)));
}

// Waits for the op on all ranks; reports those that failed.
void Finish(const char* op, int step, const std::vector<Rank>& ranks) {
  for (size_t r = 0; r < ranks.size(); ++r) {
    CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    const cuda::ErrorRecord& error = *ranks[r].error;
    if (error.set == 0) continue;
    std::printf(
        "FAILED %s of rank %zu in step %d: kind %u, word %u, peer %u, expected %llx, saw %llx\n",
        op, r, step, error.kind, error.word, error.peer,
        static_cast<unsigned long long>(error.expected),
        static_cast<unsigned long long>(error.seen));
    ++num_wrong;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv);
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
  Workload w(options);
  const int hosts = options.Int("hosts", 2), n = w.R / hosts, steps = options.Int("steps", 3);
  const int masked = options.Int("masked", 0);
  std::mt19937 generator(options.Int("seed", 1));
  // Enough for the routes of any step.
  if (w.C == 0) {
    w.C = plan::RoundUp(w.R * w.T * (w.by_expert ? std::min(w.K, w.L) : 1) + w.L * w.alignment,
                        w.alignment);
  }
  std::vector<Rank> ranks = MakeRanks(w, generator);
  Prepare(w, options, ranks, generator);
  CHECK_CUDA(cuda::LoadNetworkDispatch());
  CHECK_CUDA(cuda::LoadNetworkCombine());
  const cuda::NetworkShape shape{hosts, n, options.Int("lanes", w.blocks),
                                 options.Int("chunk_kib", 4) << 10};
  std::vector<NetworkRank> network(w.R);
  for (int r = 0; r < w.R; ++r) {
    NetworkRank& self = network[r];
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&self.memory), shape.bytes()));
    CHECK_CUDA(cudaMemset(self.memory, 0xAB, shape.bytes()));
    CHECK_CUDA(cudaMemset(self.memory, 0, shape.word_bytes()));
    emulator::AddHeap(PeOf(r, w.R), self.memory, shape.bytes());
    self.counterpart_pe.Resize(hosts);
    for (int h = 0; h < hosts; ++h) self.counterpart_pe.host[h] = PeOf(h * n + r % n, w.R);
    self.counterpart_pe.ToDevice();
    self.recv_start.Resize(w.R + 1);
    self.recv_token.Resize(w.C);
    self.recv_row.Resize(w.C);
  }
  std::printf(
      "hosts=%d R=%d T=%d K=%d E=%d H=%d C=%d %s %s%s blocks=%d, %lld KiB of network memory\n",
      hosts, w.R, w.T, w.K, w.E, w.H, w.C, w.by_expert ? "expert" : "token", w.dtype.c_str(),
      w.fp8 ? " fp8" : "", w.blocks, static_cast<long long>(shape.bytes() >> 10));

  size_t expected_bytes = 0;
  for (int step = 0; step < steps && num_wrong == 0; ++step) {
    for (int r = 0; r < w.R; ++r) {
      for (int32_t& expert : ranks[r].topk_idx.host) {
        const uint32_t x = generator();
        // The later the step, the fewer ranks are wanted.
        expert = static_cast<int32_t>(x / 8 % (w.E - step * 5 % (w.E / 2)));
        if (x % 8 == 0 || (masked == 1 && r == step % w.R) || (masked == 2 && r != step % w.R)) {
          expert = -1;
        }
      }
    }
    const auto run_on_cpu = [&](auto arguments_of, auto work_of) {
      using Args = decltype(arguments_of(ranks[0]));
      std::vector<Args> arguments;
      for (const Rank& k : ranks) arguments.push_back(arguments_of(k));
      std::vector<const Args*> pointers;
      for (const Args& of_rank : arguments) pointers.push_back(&of_rank);
      cpu::RowWork work = work_of(pointers);
      work.run(0, work.num_rows);
    };
    run_on_cpu([&](const Rank& k) { return PlanArgsOf(w, k, OnHost()); }, cpu::PlanWork);
    run_on_cpu([&](const Rank& k) { return DispatchArgsOf(w, k, OnHost()); }, cpu::DispatchWork);
    RoutesOf(w, ranks, network);
    const size_t crossings = Crossings(w, hosts, ranks);
    const auto expect = [&](int row_bytes) {
      const int window = std::min((shape.chunk_bytes - 16) / row_bytes, cuda::kMaxWindow);
      const int chunks = (w.T + window - 1) / window * w.R * (hosts - 1);
      expected_bytes += crossings * row_bytes + chunks * sizeof(cuda::ChunkHeader);
    };
    for (Rank& rank : ranks) {
      rank.topk.ToDevice();
      rank.recv_src.ToDevice();
      rank.expert_idx.ToDevice();
      Poison(rank.rows);
      Poison(rank.y);
      for (Buffer<float>* side : {&rank.row_scales, &rank.row_weights, &rank.home}) Poison(*side);
    }
    const int values_bytes = plan::RoundUp(w.K * 4, 16);
    expect(w.H * (w.fp8 ? 1 : w.width) + plan::RoundUp(w.fp8 ? w.H / 128 * 4 : 0, 16) +
           values_bytes);
    for (int r = 0; r < w.R; ++r) {
      const cuda::NetworkDispatchParams p = NetworkDispatchParamsOf(
          w, ranks[r], network[r], NetworkOf(ranks, network, shape, r, cuda::OpKind::kDispatch));
      if (!cuda::FitsNetworkDispatch(p)) {
        std::printf("a chunk has no room for a row\n");
        return 2;
      }
      CHECK_CUDA(cuda::LaunchNetworkDispatch(p, ranks[r].stream));
    }
    Finish("dispatch", step, ranks);
    for (int r = 0; r < w.R; ++r) {
      Compare("rows", step, r, ranks[r].rows);
      if (w.fp8) Compare("row_scales", step, r, ranks[r].row_scales);
      Compare("row_weights", step, r, ranks[r].row_weights);
    }
    if (w.fp8 || num_wrong != 0) continue;

    for (Rank& rank : ranks) FillRows(w, rank, generator);
    run_on_cpu([&](const Rank& k) { return CombineArgsOf(w, k, OnHost()); }, cpu::CombineWork);
    SumsOf(w, hosts, ranks);
    expect(w.H * w.width + values_bytes);
    // A host that has dropped all rows of a token sends none.
    for (int r = 0; r < w.R; ++r) {
      for (int i = 0; i < w.T * hosts; ++i) {
        const int host = i % hosts, token = i / hosts;
        bool goes = false, comes = false;
        for (int k = 0; k < w.K; ++k) {
          const int32_t expert = ranks[r].topk.host[size_t(token) * w.K + k];
          if (expert < 0 || expert / (w.E / hosts) != host || host == r / n) continue;
          goes = true;
          comes = comes || ranks[r].dest_row.host[size_t(token) * w.K + k] >= 0;
        }
        if (goes && !comes) expected_bytes -= w.H * w.width + values_bytes;
      }
    }
    for (int r = 0; r < w.R; ++r) {
      const cuda::NetworkCombineParams p = NetworkCombineParamsOf(
          w, ranks[r], network[r], NetworkOf(ranks, network, shape, r, cuda::OpKind::kCombine));
      CHECK_CUDA(cuda::LaunchNetworkCombine(p, ranks[r].stream));
    }
    Finish("combine", step, ranks);
    for (int r = 0; r < w.R; ++r) {
      if (w.T == 0) continue;
      Compare("y", step, r, ranks[r].y);
      Compare("home", step, r, ranks[r].home);
    }
  }
  if (num_wrong == 0 && emulator::BytesCarried() != expected_bytes) {
    std::printf("WRONG: the network carried %llu bytes, not %zu\n",
                static_cast<unsigned long long>(emulator::BytesCarried()), expected_bytes);
    ++num_wrong;
  }
  std::printf("%d steps, %zu bytes over the network: %s\n", steps, expected_bytes,
              num_wrong == 0 ? "all right" : "WRONG");
  return num_wrong == 0 ? 0 : 1;
}
