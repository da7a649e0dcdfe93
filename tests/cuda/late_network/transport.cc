// What NVSHMEM 3.4 loads instead of its InfiniBand transport: a network without a network, for
// tests (README.md). Here NVSHMEM's calls become calls of Network, and exceptions become its error
// codes.
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "abi.h"
#include "control.h"
#include "network.h"

// NVSHMEM takes PEs whose hosts have other names for PEs of other hosts.
extern "C" int gethostname(char* name, size_t size) noexcept {
  utsname system;
  const char* host = std::getenv("JAX_EP_LATE_HOST");
  if (host == nullptr) {
    if (uname(&system) != 0) return -1;
    host = system.nodename;
  }
  if (std::strlen(host) >= size) {
    errno = ENAMETOOLONG;
    return -1;
  }
  std::strcpy(name, host);
  return 0;
}

namespace jax_ep::late {
namespace {

// Programs that this process starts have no part in the network, but get what else was preloaded.
__attribute__((constructor)) void KeepFromChildren() {
  const char* preloaded = std::getenv("LD_PRELOAD");
  if (preloaded == nullptr) return;
  const std::string all = preloaded, mine = "nvshmem_transport_ibrc.so.3";
  std::string others;
  for (size_t at = 0, end = 0; at < all.size(); at = end + 1) {
    end = std::min(all.find_first_of(" :", at), all.size());
    const std::string one = all.substr(at, end - at);
    if (one.find(mine) == one.npos && !one.empty()) others += (others.empty() ? "" : " ") + one;
  }
  if (others.empty()) {
    unsetenv("LD_PRELOAD");
  } else {
    setenv("LD_PRELOAD", others.c_str(), 1);
  }
}

// Of the process, while NVSHMEM has one.
std::mutex current_mutex;
Network* current = nullptr;

template <typename Work>
int Guard(const char* what, Work work) {
  try {
    work();
    return abi::kOk;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "late network: %s: %s\n", what, error.what());
    return abi::kInternalError;
  }
}

Network& Of(abi::Transport* transport) { return *static_cast<Network*>(transport->state); }

uint64_t Number(const void* address) { return reinterpret_cast<uint64_t>(address); }

int CanReachPeer(int* access, void*, abi::Transport*) {
  *access = abi::kCanWrite | abi::kCanRead | abi::kCanUpdate;
  return abi::kOk;
}

int Connect(abi::Transport* transport, int*, int) {
  return Guard("connect", [&] {
    Of(transport).Connect(transport->my_pe, transport->num_pes, *transport->bootstrap);
  });
}

int Register(abi::MemoryHandle* handle, void* address, size_t, abi::Transport*, bool) {
  *handle = {};
  std::memcpy(handle->bytes, &address, sizeof address);
  return abi::kOk;
}

int Release(abi::MemoryHandle*, abi::Transport*) { return abi::kOk; }

int Finalize(abi::Transport* transport) {
  {
    const std::lock_guard<std::mutex> lock(current_mutex);
    current = nullptr;
  }
  delete &Of(transport);
  delete transport;
  return abi::kOk;
}

int ShowInfo(abi::Transport*, int) { return abi::kOk; }

int Progress(abi::Transport* transport) {
  return Guard("progress", [&] { Of(transport).Progress(); });
}

int Rma(abi::Transport* transport, int pe, abi::RmaVerb verb, abi::Place* remote, abi::Place* local,
        abi::RmaSize size, int) {
  return Guard("put or get", [&] {
    const bool is_get = verb.operation == abi::kGet || verb.operation == abi::kGetValue;
    Operation operation = {};
    operation.message.kind = is_get ? Kind::kGet : Kind::kPut;
    operation.message.address = Number(remote->address);
    operation.message.bytes = size.count * size.bytes_each;
    operation.is_inline = verb.operation == abi::kPutValue;
    if (operation.is_inline) {
      if (operation.message.bytes > sizeof(uint64_t)) {
        throw std::runtime_error("a value of more than 8 bytes");
      }
      std::memcpy(&operation.message.value, local->address, operation.message.bytes);
    } else {
      // So would a real network card refuse it.
      if (local->handle == nullptr) throw std::runtime_error("memory that is not registered");
      operation.local = Number(local->address);
    }
    Of(transport).Add(pe, operation);
    if (!verb.is_nonblocking && !operation.is_inline) Of(transport).Quiet(pe);
  });
}

int Amo(abi::Transport* transport, int pe, void*, abi::AmoVerb verb, abi::AmoPlace* place,
        abi::AmoSize size, int) {
  return Guard("atomic", [&] {
    Operation operation = {};
    operation.message.kind = Kind::kAtomic;
    operation.message.amo = verb.operation;
    operation.message.address = Number(place->remote.address);
    operation.message.bytes = size.bytes;
    operation.message.value = place->value;
    operation.message.compare = place->compare;
    if (verb.operation > abi::kLastWithoutResult) {
      operation.local = Number(place->return_place);
      operation.return_flag = place->return_flag;
    }
    Of(transport).Add(pe, operation);
  });
}

int Fence(abi::Transport* transport, int pe, int) {
  return Guard("fence", [&] { Of(transport).Fence(pe); });
}

int Quiet(abi::Transport* transport, int pe, int) {
  return Guard("quiet", [&] { Of(transport).Quiet(pe); });
}

template <typename Work>
int WithCurrent(Work work) {
  const std::lock_guard<std::mutex> lock(current_mutex);
  if (current == nullptr) return 1;
  try {
    work(*current);
    return 0;
  } catch (const std::out_of_range&) {
    return 1;
  }
}

}  // namespace
}  // namespace jax_ep::late

namespace late = jax_ep::late;

extern "C" int nvshmemt_init(late::abi::Transport** out, void*, int api_version) {
  return late::Guard("start", [&] {
    if (api_version / 10000 != late::abi::kMajorVersion) {
      throw std::runtime_error("expected version 3 of the plug-in interface, got " +
                               std::to_string(api_version) + "; use NVSHMEM 3.4");
    }
    auto network = std::make_unique<late::Network>();
    auto transport = std::make_unique<late::abi::Transport>();
    *transport = {};
    transport->api_version = api_version;
    transport->operations = {
        late::CanReachPeer, late::Connect,  late::Register, late::Release, late::Finalize,
        late::ShowInfo,     late::Progress, late::Rma,      late::Amo,     late::Fence,
        late::Quiet,        nullptr,        nullptr,        nullptr};
    transport->attributes = late::abi::kNeedsConnection;
    transport->num_devices = 1;
    transport->max_operation_bytes = uint64_t{1} << 30;
    transport->is_initialized = true;
    const std::lock_guard<std::mutex> lock(late::current_mutex);
    late::current = network.get();
    transport->state = network.release();
    *out = transport.release();
  });
}

extern "C" int jax_ep_late_counts(int pe, uint64_t* counts) {
  return late::WithCurrent([&](late::Network& network) {
    const auto numbers = network.CountsOf(pe);
    std::memcpy(counts, numbers.data(), sizeof numbers);
  });
}

extern "C" int jax_ep_late_drop_signal(int pe, uint64_t number) {
  return late::WithCurrent([&](late::Network& network) { network.DropSignal(pe, number); });
}

extern "C" int jax_ep_late_stop_after(uint64_t operations) {
  return late::WithCurrent([&](late::Network& network) { network.StopAfter(operations); });
}
