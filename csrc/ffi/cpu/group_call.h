// The way of a CPU call from its handler to the meeting of its ranks.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/rendezvous.h"
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

cpu::ThreadPool PoolFrom(::xla::ffi::ThreadPool& pool);

// Checks the common part of a call, has `decode(check, args)` check and fill the rest, and brings
// `args` to the meeting of the group's ranks.
template <typename Args, cpu::RowWork (*kMakeWork)(std::vector<const Args*>), typename Decode>
::xla::ffi::Future JoinGroup(Target target, CallContext context, const GroupAttrs& attrs,
                             ::xla::ffi::AnyBuffer coords_buffer, Decode&& decode) {
  ::xla::ffi::Promise promise;
  ::xla::ffi::Future future(promise);
  try {
    OnCall(target);
    const char* op = kTargets[static_cast<int>(target)].op;
    Checker check(op);
    CheckGroup(check, attrs);
    const Coords coords = CheckCoords(check, attrs, coords_buffer);
    auto args = std::make_shared<Args>();
    if (check.ok()) decode(check, *args);
    if (!check.ok()) {
      promise.SetError(ToError(check.status()));
      return future;
    }
    cpu::Arrival arrival{
        {context.state->call_id, context.run_id.run_id, coords.group_index},
        op,
        attrs.group_id,
        coords.rank,
        attrs.num_ranks,
        attrs.timeout_ms,
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
