// One rank of a group, as its process sees it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/core/group_params.h"
#include "cuda/decode/inbox.h"

namespace jax_ep::transport {

// Memory that operands are copied into where peers cannot read them in place.
struct Staging {
  uint64_t base = 0;
  uint64_t size = 0;
};

// Stands for the process of a rank that is absent, whose end is nothing to the group.
constexpr int kNoProcess = -1;

// What one rank of a group needs to launch ops; lives until the process ends.
struct Member {
  cuda::GroupParams params;                  // without peers, channel, tag and op
  std::vector<cuda::Workspace*> workspaces;  // of the ranks; null: of an absent one
  cuda::DecodeInboxes inboxes;               // of channel 0, after the workspaces; or none
  int64_t inbox_bytes;                       // of a channel's inbox; those of all follow each other
  int device;                                // CUDA ordinal
  int max_blocks;                            // of an op
  int ranks_per_gpu;                         // at most
  // Of each rank's memory what peers can read, as this process has it.
  std::vector<std::vector<cuda::Region>> regions;
  Staging staging;
  std::vector<int> processes;  // of the ranks, or kNoProcess

  // What an op on `channel`, one of params.num_channels, needs to know, but for its tag and kind.
  cuda::GroupParams ParamsOn(int channel) const {
    cuda::GroupParams on_channel = params;
    for (size_t rank = 0; rank < workspaces.size(); ++rank) {
      if (workspaces[rank] == nullptr) continue;
      on_channel.peers[rank] = &workspaces[rank]->channels[channel];
    }
    on_channel.channel = channel;
    return on_channel;
  }

  // The inboxes of latency mode that an op on `channel` uses.
  cuda::DecodeInboxes InboxesOn(int channel) const {
    cuda::DecodeInboxes on_channel = inboxes;
    for (cuda::DecodeInbox*& inbox : on_channel.of) {
      if (inbox == nullptr) continue;
      inbox = reinterpret_cast<cuda::DecodeInbox*>(reinterpret_cast<char*>(inbox) +
                                                   channel * inbox_bytes);
    }
    return on_channel;
  }

  // Whether peers can read these bytes in place.
  bool IsReachable(const void* pointer, int64_t bytes) const {
    const uint64_t begin = reinterpret_cast<uint64_t>(pointer);
    const std::vector<cuda::Region>& own = regions[params.rank];
    return std::any_of(own.begin(), own.end(), [&](const cuda::Region& region) {
      return begin >= region.base && begin + bytes <= region.base + region.size;
    });
  }
};

}  // namespace jax_ep::transport
