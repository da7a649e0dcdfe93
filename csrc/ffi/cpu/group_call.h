// The way of a CPU call from its handler to the meeting of its ranks.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/rendezvous.h"
#include "cpu/status.h"
#include "ffi/checker.h"
#include "ffi/cpu/call_state.h"
#include "ffi/cpu/test_hooks.h"
#include "ffi/decode.h"
#include "ffi/targets.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// The context that XLA gives a handler.
struct CallContext {
  CallState* state;
  ::xla::ffi::RunId run_id;
  ::xla::ffi::ThreadPool& pool;  // valid until the handler returns
};

// Starts the binding of a group op: context, then attributes; operands and results follow.
template <typename Attrs>
auto BindGroupCall() {
  return ::xla::ffi::Ffi::Bind()
      .Ctx<::xla::ffi::State<CallState>>()
      .Ctx<::xla::ffi::RunId>()
      .Ctx<::xla::ffi::ThreadPool>()
      .template Attrs<Attrs>();
}

// What XLA calls with what was bound: has `call` get the buffers as a struct.
template <typename Attrs, typename Buffers>
auto WithBuffers(::xla::ffi::Future (*call)(const CallContext&, const Attrs&, const Buffers&)) {
  return [call](CallState* state, ::xla::ffi::RunId run_id, ::xla::ffi::ThreadPool pool,
                Attrs attrs, auto... buffers) {
    return call({state, run_id, pool}, attrs, Buffers{BufferOf(buffers)...});
  };
}

cpu::ThreadPool PoolFrom(::xla::ffi::ThreadPool& pool);

// The outcome of an op as XLA takes it.
::xla::ffi::Error ToError(const cpu::Status& status);

// Checks a call and brings its arguments to the meeting of the group's ranks.
template <typename Args, cpu::RowWork (*kMakeWork)(std::vector<const Args*>), typename Attrs,
          typename Buffers>
::xla::ffi::Future JoinGroup(Target target, const CallContext& context, const Attrs& attrs,
                             const Buffers& buffers) {
  ::xla::ffi::Promise promise;
  ::xla::ffi::Future future(promise);
  try {
    OnCall(target);
    const char* op = kTargets[static_cast<int>(target)].op;
    Checker check(op);
    const GroupAttrs& group = attrs.group;
    CheckGroup(check, group);
    const Coords coords = CheckCoords(check, group, buffers.coords);
    auto args = std::make_shared<Args>();
    if (check.ok()) Decode(check, attrs, buffers, *args);
    if (!check.ok()) {
      promise.SetError(check.error());
      return future;
    }
    cpu::Arrival arrival{
        {context.state->call_id, context.run_id.run_id, coords.group_index},
        op,
        group.group_id,
        coords.rank,
        group.num_ranks,
        group.timeout_ms,
        std::move(args),
        [promise](const cpu::Status& status) mutable {
          if (status.ok()) {
            promise.SetAvailable();
          } else {
            promise.SetError(ToError(status));
          }
        },
    };
    const cpu::MakeWork make_work = [](const std::vector<std::shared_ptr<const void>>& all) {
      std::vector<const Args*> ranks;
      for (const auto& args : all) ranks.push_back(static_cast<const Args*>(args.get()));
      return kMakeWork(std::move(ranks));
    };
    cpu::Arrive(std::move(arrival), make_work, PoolFrom(context.pool));
  } catch (const std::exception& error) {
    promise.SetError(::xla::ffi::Error::Internal(std::string("jax_ep: ") + error.what()));
  }
  return future;
}

}  // namespace jax_ep
