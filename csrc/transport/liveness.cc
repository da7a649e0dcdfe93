#include "transport/liveness.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "transport/groups.h"

namespace jax_ep::transport {
namespace {

constexpr char kGoodbye = 'g';

struct Watch {
  std::mutex mutex;
  std::map<int, int> descriptors;  // of the processes that are alive
  int wake[2] = {-1, -1};          // a pipe: there are new descriptors
};

// Whether a readable socket brought a goodbye, its end, or nothing yet.
enum class News { kNone, kGoodbye, kClosed };

News Read(int descriptor) {
  char byte = 0;
  const ssize_t count = recv(descriptor, &byte, 1, MSG_DONTWAIT);
  if (count == 1) return byte == kGoodbye ? News::kGoodbye : News::kNone;
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return News::kNone;
  return News::kClosed;
}

void Run(Watch& watch) {
  while (true) {
    std::vector<pollfd> sockets{{watch.wake[0], POLLIN, 0}};
    std::vector<int> processes{-1};
    {
      std::lock_guard<std::mutex> lock(watch.mutex);
      for (const auto& [process, descriptor] : watch.descriptors) {
        sockets.push_back({descriptor, POLLIN, 0});
        processes.push_back(process);
      }
    }
    if (poll(sockets.data(), sockets.size(), -1) < 0) continue;
    char ignored[64];
    if (sockets[0].revents != 0) static_cast<void>(!read(watch.wake[0], ignored, sizeof(ignored)));
    for (size_t i = 1; i < sockets.size(); ++i) {
      if (sockets[i].revents == 0) continue;
      const News news = Read(sockets[i].fd);
      if (news == News::kNone) continue;
      ReportProcess(processes[i], news == News::kGoodbye);
      std::lock_guard<std::mutex> lock(watch.mutex);
      watch.descriptors.erase(processes[i]);
      close(sockets[i].fd);
    }
  }
}

Watch*& Slot() {
  static Watch* watch = nullptr;
  return watch;
}

// A fork that outlives this process must not keep its sockets open, nor say its goodbye.
void BeforeFork() { Slot()->mutex.lock(); }
void AfterForkInParent() { Slot()->mutex.unlock(); }
void AfterForkInChild() {
  for (const auto& [process, descriptor] : Slot()->descriptors) close(descriptor);
  Slot()->descriptors.clear();
  Slot()->mutex.unlock();
}

// Started with the first socket. Never stopped: it holds nothing that needs an end.
bool Start() {
  auto* watch = new Watch;
  if (pipe2(watch->wake, O_CLOEXEC) != 0) {
    delete watch;
    return false;
  }
  Slot() = watch;
  pthread_atfork(BeforeFork, AfterForkInParent, AfterForkInChild);
  std::thread([watch] { Run(*watch); }).detach();
  return true;
}

// Null if it could not be started.
Watch* Get() {
  static const bool started = Start();
  return started ? Slot() : nullptr;
}

}  // namespace

std::optional<std::string> WatchProcess(int process, int descriptor) {
  Watch* watch = Get();
  const int duplicate = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (watch == nullptr || duplicate < 0) {
    return std::string("the socket to a peer cannot be watched: ") + std::strerror(errno);
  }
  {
    std::lock_guard<std::mutex> lock(watch->mutex);
    watch->descriptors[process] = duplicate;
  }
  static_cast<void>(!write(watch->wake[1], "", 1));
  return std::nullopt;
}

void SayGoodbye() {
  Watch* watch = Get();
  if (watch == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(watch->mutex);
    if (watch->descriptors.empty()) return;  // nobody is there, or this is a fork
  }
  FinishOps();
  std::lock_guard<std::mutex> lock(watch->mutex);
  for (const auto& [process, descriptor] : watch->descriptors) {
    static_cast<void>(send(descriptor, &kGoodbye, 1, MSG_DONTWAIT | MSG_NOSIGNAL));
  }
}

}  // namespace jax_ep::transport
