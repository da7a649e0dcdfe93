#!/usr/bin/env bash
# Builds jax_ep's library of groups that span hosts with delays, and once for each wait that is left out
# or order that is given up (csrc/cuda/core/test_hooks.cuh). tests/test_hosts_mutants.py runs them.
#
#   tests/cuda/network_mutants.sh FOLDER [NUMBER...]   (default: plain and all numbers)
#
# writes FOLDER/NAME/_nvshmem.abi3.so. Only kernels that have the wait are compiled for each NAME. All else
# comes from a build with CMake and Ninja in $JAX_EP_BUILD, or one that this makes in FOLDER/base. Needs
# nvcc 13.0 or later and NVSHMEM (NVSHMEM_HOME, or the package of $PYTHON).
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -lt 1 ]; then
  echo "usage: $0 FOLDER [NUMBER...]" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
python=${PYTHON:-python3}
base=${JAX_EP_BUILD:-$out/base}
nvcc=${CUDACXX:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}
# The kernels that are compiled for each name, those that must show it. nvcc inlines all that a mutation
# changes, so other kernels have no part in it.
declare -A kernels=(
  [plain]="dispatch combine" [8]=dispatch [9]=dispatch [10]=dispatch [11]=dispatch [12]=combine
  [13]=combine [14]=combine [15]=dispatch [20]=dispatch
)
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(plain 8 9 10 11 12 13 14 15 20)
for name in "${names[@]}"; do
  [ -n "${kernels[$name]:-}" ] || { echo "$0: no mutation $name" >&2; exit 2; }
done

if [ -z "${JAX_EP_BUILD:-}" ]; then
  # Kernels of this build have no delays; those of another NVSHMEM would not fit.
  cmake -S csrc -B "$base" -G Ninja -DCMAKE_BUILD_TYPE=Release -DJAX_EP_NVSHMEM=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" >"$out/cmake.log" 2>&1 ||
    { cat "$out/cmake.log" >&2; exit 1; }
  cmake --build "$base" --target _nvshmem >"$out/base.log" 2>&1 || { cat "$out/base.log" >&2; exit 1; }
fi
nvshmem=$(sed -n 's/^NVSHMEM_HOME:PATH=//p' "$base/CMakeCache.txt")
nvshmem=${nvshmem:-${NVSHMEM_HOME:-$("$python" -c 'import nvidia.nvshmem as n; print(*n.__path__)')}}
architecture=(-gencode=arch=compute_90a,code=sm_90a)
network=$base/CMakeFiles/jax_ep_cuda_network.dir/cuda/network

jobs=()
for name in "${names[@]}"; do
  defines=-DJAX_EP_TEST_DELAYS
  [ "$name" = plain ] || defines+=" -DJAX_EP_MUTATION=$name"
  rm -rf "${out:?}/$name"
  mkdir -p "$out/$name"
  for kernel in ${kernels[$name]}; do
    jobs+=("$defines -c csrc/cuda/network/$kernel.cu -o $out/$name/$kernel.o")
  done
done
printf '%s\n' "${jobs[@]}" | xargs -P "$(nproc)" -I{} sh -c \
  "'$nvcc' -std=c++17 -O3 -DNDEBUG -rdc=true -Xcompiler=-fPIC,-fvisibility=hidden \
     ${architecture[*]} -Icsrc -isystem '$nvshmem/include' {}"

# Links NAME: nvcc links the device's code first, with that of NVSHMEM.
link() {
  local folder=$out/$1 objects=() kernel
  for source in csrc/cuda/network/*.cu; do
    kernel=$(basename "$source" .cu)
    if [ -e "$folder/$kernel.o" ]; then
      objects+=("$folder/$kernel.o")
    else
      objects+=("$network/$kernel.cu.o")
    fi
  done
  "$nvcc" "${architecture[@]}" -shared -cudart static -Xcompiler=-fPIC \
    -Xlinker=-s,--gc-sections,--start-group \
    "$base/CMakeFiles/_nvshmem.dir/bindings/nvshmem_module.cc.o" "${objects[@]}" \
    "$base"/lib{nanobind-static-abi3,jax_ep_ffi_network,jax_ep_ffi_cuda,jax_ep_ffi}.a \
    "$base"/libjax_ep_{transport_network,transport,cuda,plan}.a "$nvshmem/lib/libnvshmem_device.a" \
    -Xlinker=--end-group,"$nvshmem/lib/libnvshmem_host.so.3",-rpath,"$nvshmem/lib" \
    -ldl -lrt -lpthread -o "$folder/_nvshmem.abi3.so"
  rm "$folder"/*.o
}
for name in "${names[@]}"; do link "$name" & done
status=0
for job in $(jobs -p); do wait "$job" || status=1; done
exit $status
