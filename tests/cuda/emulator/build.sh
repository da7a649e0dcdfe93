#!/usr/bin/env bash
# Builds tests of kernels against the emulator: build.sh [--more] FOLDER [NAME...] (default: kernels_test).
#
# --more adds programs to a folder that a call without it has made, from the same sources.
# Needs g++ and the headers of the CUDA toolkit (CUDA_HOME, default /usr/local/cuda), no nvcc and no
# GPU. CXXFLAGS are added. Blocks wait at random (JAX_EP_TEST_DELAYS), and a test may let a rank stop
# (JAX_EP_TEST_STOPS) or ask for clock stamps (JAX_EP_CLOCK_STAMPS).
set -euo pipefail
more=
if [ "$1" = --more ]; then
  more=1
  shift
fi
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(kernels_test)
headers=${CUDA_HOME:-/usr/local/cuda}/include
flags=(-std=c++17 -O2 -pthread -fno-strict-aliasing -ffp-contract=off -DJAX_EP_TEST_DELAYS -DJAX_EP_CLOCK_STAMPS
       -DJAX_EP_TEST_STOPS -isystem "$headers" -I"$here" -I"$out/source" -I"$root/csrc")
read -ra given <<<"${CXXFLAGS:-}"
flags+=("${given[@]}")
if [ -z "$more" ]; then
  rm -rf "$out/source" "$out/objects" "$out/headers"
  mkdir -p "$out/objects" "$out/headers"
  for room in "$root"/csrc/cuda/*/; do
    ${PYTHON:-python3} "$here/rewrite.py" "$room" "$out/source/cuda/$(basename "$room")"
  done
  ${PYTHON:-python3} "$here/rewrite.py" "$root/tests/cuda" "$out/source/tests"
  cp "$here/ptx.cuh" "$here/launch.cuh" "$out/source/cuda/core/"
  cp "$here/net.cuh" "$out/source/cuda/network/net.cuh"
  # A file with kernels takes a good part of its time for these headers, so they are compiled once.
  printf '#include <%s>\n' cuda_runtime.h cuda_bf16.h cuda_fp16.h cuda_fp8.h algorithm map random string vector \
    >"$out/headers/kernels.h"
  g++ "${flags[@]}" -x c++-header "$out/headers/kernels.h" -o "$out/headers/kernels.h.gch"
fi
# As nvcc does, kernels include the runtime's header.
compile() {
  local kernels=
  case $1 in *.cu) kernels="-include $out/headers/kernels.h -x c++" ;; esac
  echo "g++ ${flags[*]} $kernels -c $1 -o $out/objects/$2.o"
}
{
  [ -n "$more" ] || for source in "$out"/source/cuda/*/*.cu "$here"/*.cc "$root"/csrc/plan/*.cc \
    "$root"/csrc/cpu/*.cc "$root"/csrc/transport/error_text.cc; do
    compile "$source" "library_$(basename "$(dirname "$source")")_$(basename "$source")"
  done
  for name in "${names[@]}"; do compile "$out/source/tests/$name.cu" "$name"; done
} | xargs -P "$(nproc)" -I{} sh -c '{}'
for name in "${names[@]}"; do
  g++ -pthread "$out"/objects/library_*.o "$out/objects/$name.o" -o "$out/$name"
done
