"""The CUDA toolkit to build the GPU library with, found as CMake finds it.

nvcc comes from $CUDA_HOME, /usr/local/cuda or the path. $JAX_EP_CUDA is "AUTO" (the GPU library is
built where there is nvcc of CUDA 12.3 or later), "ON" (it is an error if there is none) or "OFF". Where
the GPU library is not built, the targets here are there, but incompatible with every platform: `bazel build //...` skips
all that depends on them.
"""

_OLDEST = (12, 3)  # the first whose nvcc knows all that the kernels ask of sm_90a

_BUILD = """
package(default_visibility = ["//visibility:public"])

filegroup(
    name = "compiler",
    srcs = glob([
        "bin/**",
        "nvvm/**",
    ]),
)

# Static, so that the library loads where there is no GPU.
cc_library(
    name = "runtime",
    srcs = ["lib/libcudart_static.a"],
    hdrs = glob(["include/**"]),
    includes = ["include"],
    linkopts = [
        "-ldl",
        "-lrt",
        "-pthread",
    ],
)
"""

_BUILD_WITHOUT = """
package(default_visibility = ["//visibility:public"])

constraint_setting(name = "cuda")

constraint_value(
    name = "cuda_compiler",
    constraint_setting = ":cuda",
)

filegroup(name = "compiler")

cc_library(
    name = "runtime",
    target_compatible_with = [":cuda_compiler"],
)
"""

def _find_nvcc(repository):
    for home in [repository.os.environ.get("CUDA_HOME"), "/usr/local/cuda"]:
        if home and repository.path(home + "/bin/nvcc").exists:
            return repository.path(home + "/bin/nvcc")
    return repository.which("nvcc")

def _version(repository, nvcc):
    """What nvcc says its version is, such as (13, 0), or None."""
    said = repository.execute([nvcc, "--version"])
    for word in said.stdout.replace("release ", "release=").replace(",", " ").split(" "):
        parts = word[len("release="):].split(".")
        if word.startswith("release=") and len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit():
            return (int(parts[0]), int(parts[1]))
    return None

def _too_old(nvcc, version):
    """What is wrong with the version of nvcc, or None."""
    if version and version >= _OLDEST:
        return None
    return "{} is {}, and the GPU library needs nvcc of CUDA {}.{} or later".format(
        nvcc,
        "{}.{}".format(*version) if version else "of a version that it does not tell",
        *_OLDEST
    )

def _toolkit(repository, nvcc):
    """The folder of the toolkit: nvcc on the path may be a script that calls the one in there."""
    probe = repository.execute([nvcc, "-v", "-E", "-x", "cu", "/dev/null"])
    for line in probe.stderr.split("\n"):
        if line.startswith("#$ TOP="):
            return repository.path(line[len("#$ TOP="):]).realpath
    fail("{} does not say where its toolkit is:\n{}".format(nvcc, probe.stderr))

def _cuda_env_impl(repository):
    choice = repository.os.environ.get("JAX_EP_CUDA") or "AUTO"
    if choice not in ["AUTO", "ON", "OFF"]:
        fail("JAX_EP_CUDA is AUTO, ON or OFF, not " + choice)
    nvcc = None if choice == "OFF" else _find_nvcc(repository)
    if choice == "ON" and not nvcc:
        fail("JAX_EP_CUDA=ON, but there is no nvcc; set CUDA_HOME")
    version = _version(repository, nvcc) if nvcc else None
    too_old = _too_old(nvcc, version) if nvcc else None
    if too_old and choice == "ON":
        fail("JAX_EP_CUDA=ON, but {}; set CUDA_HOME to one".format(too_old))
    if too_old:
        # buildifier: disable=print
        print("the GPU library is left out: {}; set CUDA_HOME to one".format(too_old))
        nvcc = None
    repository.file("defs.bzl", "HAVE_CUDA = {}\n".format(bool(nvcc)))
    repository.file("version.txt", "{}.{}".format(*version) if nvcc else "")
    repository.file("BUILD", _BUILD if nvcc else _BUILD_WITHOUT)
    if not nvcc:
        return

    toolkit = _toolkit(repository, nvcc)
    for folder in ["bin", "include", "nvvm"]:
        repository.symlink(toolkit.get_child(folder), folder)
    for folder in ["lib64", "lib"]:
        library = toolkit.get_child(folder).get_child("libcudart_static.a")
        if library.exists:
            repository.symlink(library, "lib/libcudart_static.a")
            return
    fail("{} has no libcudart_static.a".format(toolkit))

cuda_env = repository_rule(
    implementation = _cuda_env_impl,
    environ = ["CUDA_HOME", "JAX_EP_CUDA", "PATH"],
    local = True,
)
