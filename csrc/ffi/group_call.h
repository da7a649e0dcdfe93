// What all handlers of group ops have in common: attributes, coordinates, the handle, and the way
// from a decoded call to the meeting of its ranks.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/rendezvous.h"
#include "ffi/call_state.h"
#include "ffi/checker.h"
#include "ffi/targets.h"
#include "ffi/test_hooks.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Attributes of every target.
struct GroupAttrs {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t layout;      // plan::Layout
  int64_t group_id;    // for messages
  int64_t timeout_ms;  // for the arrival of all ranks
};

// The members of GroupAttrs, for XLA_FFI_REGISTER_STRUCT_ATTR_DECODING of a struct that begins with
// a GroupAttrs: its braces may be left out when the struct is initialised from the flat list.
#define JAX_EP_GROUP_ATTRS                                                                        \
  ::xla::ffi::StructMember<int32_t>("num_ranks"),                                                 \
      ::xla::ffi::StructMember<int32_t>("num_experts"),                                           \
      ::xla::ffi::StructMember<int32_t>("layout"), ::xla::ffi::StructMember<int64_t>("group_id"), \
      ::xla::ffi::StructMember<int64_t>("timeout_ms")

// The context that XLA gives a handler.
struct CallContext {
  CallState* state;
  ::xla::ffi::RunId run_id;
  ::xla::ffi::ThreadPool& pool;  // valid until the handler returns
};

// The place of one rank: operand coords, s32[2].
struct Coords {
  int32_t rank;         // within its group
  int32_t group_index;  // among the groups that lie side by side in the mesh
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

void CheckGroup(Checker& check, const GroupAttrs& attrs);
Coords CheckCoords(Checker& check, const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords);

// Checks what int32 indices need: T, K >= 1, and R * T * K and R * C below 2^31.
void CheckExtents(Checker& check, const GroupAttrs& attrs, int64_t num_tokens, int64_t top_k,
                  int64_t capacity);

// Operands that carry a handle, in the order in which they are bound.
struct HandleBuffers {
  ::xla::ffi::AnyBuffer topk, dest_row, recv_rows, recv_src, expert_idx;
};

// Fills `geometry` (all but hidden and dtype) from the attributes and the handle's shapes.
cpu::Handle CheckHandle(Checker& check, const GroupAttrs& attrs, const HandleBuffers& buffers,
                        cpu::Geometry& geometry);

// Checks that `x` is [num_rows, H] of a dtype that rows may have; sets geometry.hidden and
// geometry.dtype.
void CheckRows(Checker& check, const char* name, ::xla::ffi::AnyBuffer x, int64_t num_rows,
               cpu::Geometry& geometry);

// The same for rows to compute with: bf16, f16 or f32.
void CheckSummableRows(Checker& check, const char* name, ::xla::ffi::AnyBuffer x, int64_t num_rows,
                       cpu::Geometry& geometry);

// Checks float32 values that belong to rows: [C] in layout "expert", [C, K] in layout "token".
// `what` is "argument name" or "result name".
void CheckRowValues(Checker& check, const char* what, ::xla::ffi::AnyBuffer values,
                    const cpu::Geometry& geometry);

cpu::ThreadPool PoolFrom(::xla::ffi::ThreadPool& pool);
::xla::ffi::Error ToError(const cpu::Status& status);

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
