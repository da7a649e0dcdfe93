"""Checks of ``.ci/package``: the files of the sdist and of the wheel, and an installed wheel.

``check_package.py sdist FILE`` compares the list of files with those in git, and ``wheel FILE`` with
those of the sdist beside it. ``installed [EXTRA]`` runs in an environment that has the wheel and no
compiler: it dispatches on eight CPU devices and loads the GPU libraries, which need no GPU for that.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = ("_cpu", "_cuda", "_nvshmem")
BESIDE = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}


def version() -> str:
    """The version that the package states."""
    text = (ROOT / "jax_ep" / "_version.py").read_text()
    (found,) = re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    return found


def committed(*folders: str) -> set[str]:
    """The files of these folders in git, with those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def compare(what: str, found: set[str], want: set[str]) -> None:
    """Exit with the difference, if there is one."""
    if found != want:
        missing, more = sorted(want - found), sorted(found - want)
        raise SystemExit(f"{what}: missing are {missing}; not expected are {more}")
    print(f"{what}: {len(found)} files, as expected")


def check_sdist(path: pathlib.Path) -> None:
    """What the build needs, and what a reader of the archive needs to know; nothing else."""
    top = f"jax_ep-{version()}"
    with tarfile.open(path) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    sources = {
        name for name in committed("jax_ep", "csrc") if pathlib.Path(name).name not in ("BUILD",)
    }
    compare(path.name, names, {f"{top}/{name}" for name in sources | BESIDE | {"PKG-INFO"}})


def check_wheel(path: pathlib.Path) -> None:
    """The package of the sdist beside it with the three libraries, under one tag."""
    name, number, python, abi, platform = path.stem.split("-")
    if (name, number) != ("jax_ep", version()):
        raise SystemExit(f"{path.name}: expected jax_ep {version()}")
    tags = ("cp311", "cp311"), ("cp312", "abi3")
    if (python, abi) not in tags or not platform.startswith("manylinux_"):
        raise SystemExit(f"{path.name}: expected a tag of {tags} and manylinux")
    ending = ".abi3.so" if abi == "abi3" else f".cpython-{python[2:]}-x86_64-linux-gnu.so"
    with zipfile.ZipFile(path) as archive:
        names = {entry for entry in archive.namelist() if not entry.endswith("/")}
    (sdist,) = path.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sources = {member.name.partition("/")[2] for member in archive.getmembers()}
    about = f"jax_ep-{version()}.dist-info/"
    files = {entry for entry in names if not entry.startswith(about)}
    package = {entry for entry in sources if entry.startswith("jax_ep/") and "." in entry}
    compare(path.name, files, package | {f"jax_ep/{library}{ending}" for library in LIBRARIES})
    if not {f"{about}METADATA", f"{about}RECORD", f"{about}licenses/LICENSE"} <= names:
        raise SystemExit(f"{path.name}: no metadata, no record or no licence in {sorted(names)}")


def check_installed(extra: str) -> None:
    """Import, a dispatch on the CPU, and the libraries for GPUs."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import functools
    import importlib
    import importlib.metadata

    import jax
    import jax.numpy as jnp

    import jax_ep
    from jax_ep._core import libraries

    found = [program for program in ("cc", "c++", "gcc", "g++", "nvcc") if shutil.which(program)]
    if found:
        raise SystemExit(f"this environment has compilers: {found}")
    home = pathlib.Path(jax_ep.__file__)
    if not home.is_relative_to(sys.prefix):
        raise SystemExit(f"jax_ep came from {home}, not from the wheel")
    if jax_ep.__version__ != importlib.metadata.version("jax_ep"):
        raise SystemExit(f"jax_ep.__version__ is {jax_ep.__version__}; the wheel says otherwise")

    mesh = jax.sharding.Mesh(jax.devices(), ("expert",))
    group = jax_ep.create_group(mesh, "expert", backend="cpu")
    spec = jax.sharding.PartitionSpec("expert")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    def there_and_back(x, topk_idx):
        out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=16)
        return jax_ep.combine(out.tokens, out.handle, group=group)

    x = jnp.arange(8 * 4 * 128, dtype=jnp.float32).reshape(32, 128)
    topk_idx = (jnp.arange(32)[:, None] * 5 + jnp.array([0, 3])) % 16
    if not bool(jnp.array_equal(there_and_back(x, topk_idx), 2 * x)):
        raise SystemExit("dispatch and combine on eight CPU devices gave wrong values")
    print(f"{group}: dispatch and combine are exact")

    cuda = libraries.why_unavailable("cuda", compile_only=True)
    network = libraries.why_unavailable("nvshmem", compile_only=True)
    print(f"_cuda: {cuda or importlib.import_module('jax_ep._cuda').build_info()}")
    print(f"_nvshmem: {network or importlib.import_module('jax_ep._nvshmem').build_info()}")
    if cuda is not None:
        raise SystemExit("the GPU library does not load")
    says_what_to_type = network is not None and "pip install" in network
    if (network is not None) if extra == "cuda13" else not says_what_to_type:
        raise SystemExit(
            "NVSHMEM's library loads with the extra cuda13, and else says what to type"
        )


def main() -> None:
    """The check that the command line names."""
    what, argument = sys.argv[1], "".join(sys.argv[2:])
    if what == "installed":
        check_installed(argument)
    else:
        {"sdist": check_sdist, "wheel": check_wheel}[what](pathlib.Path(argument))


if __name__ == "__main__":
    main()
