"""NVSHMEM to build the library of groups that span hosts with, found as CMake finds it.

It comes from $NVSHMEM_HOME or from the package nvidia.nvshmem of the Python that python_env.bzl takes.
$JAX_EP_NVSHMEM is "AUTO" (the library is built where there are NVSHMEM and nvcc of CUDA 13 or later),
"ON" (it is an error if one is missing) or "OFF". Where the library is not built, the targets here are
there, but incompatible with every platform: `bazel build //...` skips all that depends on them.
"""

load("//bazel:python_env.bzl", "find_python")

_OLDEST_CUDA = (13, 0)  # nvlink of an earlier one refuses the device code of the wheel for CUDA 13

_PROBE = """
import importlib.util

try:
    print(*list(importlib.util.find_spec("nvidia.nvshmem").submodule_search_locations)[:1])
except (AttributeError, ModuleNotFoundError):
    print()
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

filegroup(
    name = "device_library",
    srcs = ["lib/libnvshmem_device.a"],
)

cc_library(
    name = "nvshmem",
    srcs = [
        "lib/libnvshmem_device.a",
        "lib/libnvshmem_host.so.3",
    ],
    hdrs = glob(["include/**"]),
    includes = ["include"],
    # Beside the package, as pip installs it; jax_ep loads it from elsewhere too.
    linkopts = ["-Wl,-rpath,'$$ORIGIN/../nvidia/nvshmem/lib'"],
)
"""

_BUILD_WITHOUT = """
package(default_visibility = ["//visibility:public"])

constraint_setting(name = "nvshmem_is")

constraint_value(
    name = "found",
    constraint_setting = ":nvshmem_is",
)

alias(
    name = "device_library",
    actual = ":nvshmem",
)

cc_library(
    name = "nvshmem",
    target_compatible_with = [":found"],
)
"""

def _find_nvshmem(repository):
    """The folder with NVSHMEM's include and lib, or None."""
    home = repository.os.environ.get("NVSHMEM_HOME")
    if home:
        if not repository.path(home + "/include/nvshmem_host.h").exists:
            fail("NVSHMEM_HOME is {}, which has no include/nvshmem_host.h".format(home))
        return repository.path(home)
    probe = repository.execute([find_python(repository), "-c", _PROBE])
    if probe.return_code:
        fail("cannot look for the package nvidia.nvshmem:\n" + probe.stderr)
    home = probe.stdout.strip()
    if home and repository.path(home + "/include/nvshmem_host.h").exists:
        return repository.path(home)
    return None

def _nvshmem_env_impl(repository):
    choice = repository.os.environ.get("JAX_EP_NVSHMEM") or "AUTO"
    if choice not in ["AUTO", "ON", "OFF"]:
        fail("JAX_EP_NVSHMEM is AUTO, ON or OFF, not " + choice)
    cuda = repository.read(Label("@cuda_env//:version.txt"))  # nothing: no CUDA
    nvshmem = None if choice == "OFF" else _find_nvshmem(repository)
    obstacle = None
    if not cuda:
        obstacle = "the GPU library is not built"
    elif not nvshmem:
        obstacle = ("there is no NVSHMEM; pip install nvidia-nvshmem-cu13 into the Python to build for, " +
                    "or set NVSHMEM_HOME")
    elif tuple([int(part) for part in cuda.split(".")]) < _OLDEST_CUDA and choice == "AUTO":
        # buildifier: disable=print
        print(("the library of groups that span hosts is left out: nvcc is {}, and NVSHMEM's device code " +
               "needs {}.{} or later; set CUDA_HOME to one, or JAX_EP_NVSHMEM=ON for an NVSHMEM that " +
               "suits this nvcc").format(cuda, *_OLDEST_CUDA))
        nvshmem = None
    if obstacle and choice == "ON":
        fail("JAX_EP_NVSHMEM=ON, but " + obstacle)
    found = bool(nvshmem and cuda)
    repository.file("defs.bzl", "HAVE_NVSHMEM = {}\n".format(found))
    repository.file("BUILD", _BUILD if found else _BUILD_WITHOUT)
    if not found:
        return
    repository.symlink(nvshmem.get_child("include"), "include")
    for name in ["libnvshmem_device.a", "libnvshmem_host.so.3"]:
        library = nvshmem.get_child("lib").get_child(name)
        if not library.exists:
            fail("{} has no lib/{}".format(nvshmem, name))
        repository.symlink(library, "lib/" + name)

nvshmem_env = repository_rule(
    implementation = _nvshmem_env_impl,
    environ = ["JAX_EP_NVSHMEM", "JAX_EP_PYTHON", "NVSHMEM_HOME", "PATH"],
    local = True,
)
