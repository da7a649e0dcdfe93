#!/usr/bin/env bash
# Builds tests/cuda/kernels_test, plan_test, races_test, failures_test, decode_test,
# decode_failures_test and network_test into the folder given (default: build/cuda). With a second
# argument, "once", kernels are compiled only as failures_test has them, and all but network_test are
# linked with these: enough to know that everything compiles and links (kernels between hosts are
# compiled with NVSHMEM for the library, and network_test for the emulator). With "stamps" it builds decode_test and plan_test only, with
# clock stamps (csrc/cuda/core/clock_stamps.cuh).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/cuda}
variants=(library stopping)
names=(kernels_test plan_test races_test decode_test)
failing=(failures_test decode_failures_test)
between_hosts=(csrc/cuda/network/{dispatch,combine,combine_vjp}.cu tests/cuda/network_test.cu)
stamps=()
if [ "${2:-}" = once ]; then
  variants=(stopping)
  between_hosts=()
fi
if [ "${2:-}" = stamps ]; then
  variants=(library)
  names=(plan_test decode_test)
  failing=()
  between_hosts=()
  stamps=(-DJAX_EP_CLOCK_STAMPS)
fi
rm -rf "$out"/{library,stopping,tests,network}  # no object of a source that is gone
mkdir -p "$out"/{library,stopping,tests,network}
for source in csrc/plan/*.cc csrc/cpu/*.cc csrc/transport/error_text.cc; do
  g++ -std=c++17 -O3 -ffp-contract=off -Icsrc -c "$source" \
    -o "$out/library/$(echo "$source" | tr / _).o" &
done
compile() {
  nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -Icsrc "${stamps[@]}" -c "$1" -o "$2" \
    "${@:3}"
}
for source in csrc/cuda/{decode,measure,node,plan,rows}/*.cu; do
  for variant in "${variants[@]}"; do
    defines=()
    [ "$variant" = stopping ] && defines=(-DJAX_EP_TEST_STOPS)
    compile "$source" "$out/$variant/$(echo "$source" | tr / _).o" "${defines[@]}" &
  done
done
for name in "${names[@]}" "${failing[@]}"; do
  compile "tests/cuda/$name.cu" "$out/tests/$name.o" &
done
for source in "${between_hosts[@]}"; do
  compile "$source" "$out/network/$(echo "$source" | tr / _).o" -Itests/cuda/without_nvshmem &
done
# A bare wait would forget what failed.
for job in $(jobs -p); do wait "$job"; done
host=("$out"/library/csrc_{plan,cpu,transport}_*.o)
link() {  # link NAME FOLDER, that of its kernels
  nvcc -gencode=arch=compute_90a,code=sm_90a "${host[@]}" "$out/$2"/csrc_cuda_*.o "$out/tests/$1.o" -o "$out/$1"
}
for name in "${names[@]}"; do link "$name" "${variants[0]}"; done
for name in "${failing[@]}"; do link "$name" stopping; done
if [ ${#between_hosts[@]} -gt 0 ]; then
  nvcc -gencode=arch=compute_90a,code=sm_90a "${host[@]}" "$out"/library/csrc_cuda_*.o \
    "$out"/network/*.o -o "$out/network_test"
fi
