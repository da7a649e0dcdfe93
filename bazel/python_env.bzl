"""The Python to build for and to test with: $JAX_EP_PYTHON, or python3 on the path.

Its environment must have jaxlib (for the XLA FFI headers), nanobind (for its sources) and what the
tests import. Exposes headers, sources, and that interpreter as a toolchain.
"""

_PROBE = """
import importlib.util, os, sys, sysconfig

def folder(module):
    return os.path.dirname(importlib.util.find_spec(module).origin)

print(sys.executable)
print(sysconfig.get_paths()["include"])
print(os.path.join(folder("jaxlib"), "include"))
print(folder("nanobind"))
print(sys.version_info.minor)
"""

_BUILD = """
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python_headers",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["jaxlib/xla/ffi/api/*.h"]),
    includes = ["jaxlib"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    copts = [
        "-Iexternal/{name}/nanobind/ext/robin_map/include",
        "-fdata-sections",
        "-ffunction-sections",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
    ],
    defines = {defines},
    includes = ["nanobind/include"],
    linkstatic = True,
    local_defines = ["NB_COMPACT_ASSERTIONS"],
    textual_hdrs = glob([
        "nanobind/ext/robin_map/include/**/*.h",
        "nanobind/include/**/*.h",
        "nanobind/src/*",
    ]),
    deps = [":python_headers"],
)

py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def find_python(repository):
    """The interpreter that a repository rule takes; its environ has JAX_EP_PYTHON and PATH."""
    return repository.os.environ.get("JAX_EP_PYTHON") or str(repository.which("python3"))

def _python_env_impl(repository):
    python = find_python(repository)
    probe = repository.execute([python, "-c", _PROBE])
    if probe.return_code:
        fail("{} needs jaxlib and nanobind; set JAX_EP_PYTHON to a Python that has them:\n{}".format(
            python,
            probe.stderr,
        ))
    executable, headers, jaxlib, nanobind, minor = probe.stdout.strip().split("\n")
    repository.symlink(headers, "python")
    repository.symlink(jaxlib, "jaxlib")
    repository.symlink(nanobind, "nanobind")

    # As in the CMake build: one module for 3.12 and later; nanobind has no stable ABI before.
    stable_abi = int(minor) >= 12
    repository.file("BUILD", _BUILD.format(
        name = repository.name,
        python = executable,
        defines = ["Py_LIMITED_API=0x030C0000"] if stable_abi else [],
    ))
    repository.file("defs.bzl", 'MODULE_SUFFIX = "{}"\n'.format(".abi3.so" if stable_abi else ".so"))

python_env = repository_rule(
    implementation = _python_env_impl,
    environ = ["JAX_EP_PYTHON", "PATH"],
    local = True,
)
