// A chain of ops of every rank as a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "kernels_case.cuh"

namespace {

class Graphs {
 public:
  // Of `count` times what `launch` launches on a rank's stream.
  template <typename Launch>
  Graphs(std::vector<Rank>& ranks, int count, Launch&& launch)
      : ranks_(ranks), graphs_(ranks.size()) {
    for (size_t r = 0; r < ranks.size(); ++r) {
      cudaGraph_t graph;
      CHECK_CUDA(cudaSetDevice(ranks[r].device));
      CHECK_CUDA(cudaStreamBeginCapture(ranks[r].stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < count; ++i) launch(ranks[r]);
      CHECK_CUDA(cudaStreamEndCapture(ranks[r].stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&graphs_[r], graph, 0));
      CHECK_CUDA(cudaGraphUpload(graphs_[r], ranks[r].stream));
      CHECK_CUDA(cudaStreamSynchronize(ranks[r].stream));
    }
  }

  // Runs them once. Returns the microseconds of the slowest rank.
  double Run() {
    std::vector<std::thread> threads;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      threads.emplace_back([this, r] {
        const Rank& k = ranks_[r];
        CHECK_CUDA(cudaSetDevice(k.device));
        CHECK_CUDA(cudaEventRecord(k.begin, k.stream));
        CHECK_CUDA(cudaGraphLaunch(graphs_[r], k.stream));
        CHECK_CUDA(cudaEventRecord(k.end, k.stream));
        CHECK_CUDA(cudaStreamSynchronize(k.stream));
      });
    }
    for (std::thread& thread : threads) thread.join();
    float slowest = 0;
    for (const Rank& k : ranks_) {
      float ms = 0;
      CHECK_CUDA(cudaEventElapsedTime(&ms, k.begin, k.end));
      slowest = std::max(slowest, ms);
    }
    return slowest * 1e3;
  }

 private:
  std::vector<Rank>& ranks_;
  std::vector<cudaGraphExec_t> graphs_;
};

}  // namespace
