// The lists of ops/signatures.h for Python.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "ops/signatures.h"

namespace jax_ep {

// target -> attributes, operands, results, after and scratch, each a list of names.
inline nanobind::dict SignaturesByTarget(const std::vector<ops::Signature>& signatures) {
  const auto names = [](const std::vector<const char*>& given) {
    nanobind::list list;
    for (const char* name : given) list.append(name);
    return list;
  };
  nanobind::dict by_target;
  for (const ops::Signature& signature : signatures) {
    nanobind::dict lists;
    lists["attributes"] = names(signature.attributes);
    lists["operands"] = names(signature.operands);
    lists["results"] = names(signature.results);
    lists["after"] = names(signature.after);
    lists["scratch"] = names(signature.scratch);
    by_target[signature.target] = lists;
  }
  return by_target;
}

}  // namespace jax_ep
