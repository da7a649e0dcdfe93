#!/usr/bin/env bash
# Builds tests/cuda/kernels_test, plan_test, races_test, failures_test, decode_test and
# decode_failures_test into the folder given (default: build/cuda). With a second argument, "once",
# kernels are compiled only as failures_test has them, and all are linked with these: enough to know
# that everything compiles and links. With "stamps" it builds decode_test and plan_test only, with
# clock stamps (csrc/cuda/core/clock_stamps.cuh).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/cuda}
variants=(library stopping)
names=(kernels_test plan_test races_test decode_test)
failing=(failures_test decode_failures_test)
stamps=()
[ "${2:-}" = once ] && variants=(stopping)
if [ "${2:-}" = stamps ]; then
  variants=(library)
  names=(plan_test decode_test)
  failing=()
  stamps=(-DJAX_EP_CLOCK_STAMPS)
fi
rm -rf "$out/library" "$out/stopping" "$out/tests"  # no object of a source that is gone
mkdir -p "$out/library" "$out/stopping" "$out/tests"
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
# A bare wait would forget what failed.
for job in $(jobs -p); do wait "$job"; done
host=("$out"/library/csrc_{plan,cpu,transport}_*.o)
link() {  # link NAME FOLDER, that of its kernels
  nvcc -gencode=arch=compute_90a,code=sm_90a "${host[@]}" "$out/$2"/csrc_cuda_*.o "$out/tests/$1.o" -o "$out/$1"
}
for name in "${names[@]}"; do link "$name" "${variants[0]}"; done
for name in "${failing[@]}"; do link "$name" stopping; done
