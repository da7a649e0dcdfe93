#!/usr/bin/env bash
# Builds tests/cuda/kernels_test, plan_test, races_test and failures_test into the folder given
# (default: build/cuda).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/cuda}
rm -rf "$out/library" "$out/stopping" "$out/tests"  # no object of a source that is gone
mkdir -p "$out/library" "$out/stopping" "$out/tests"
for source in csrc/plan/*.cc csrc/cpu/*.cc csrc/transport/error_text.cc; do
  g++ -std=c++17 -O3 -ffp-contract=off -Icsrc -c "$source" \
    -o "$out/library/$(echo "$source" | tr / _).o" &
done
compile() {
  nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -Icsrc -c "$1" -o "$2" "${@:3}"
}
for source in csrc/cuda/*/*.cu; do
  compile "$source" "$out/library/$(echo "$source" | tr / _).o" &
  compile "$source" "$out/stopping/$(echo "$source" | tr / _).o" -DJAX_EP_TEST_STOPS &
done
for name in kernels_test plan_test races_test failures_test; do
  compile "tests/cuda/$name.cu" "$out/tests/$name.o" &
done
# A bare wait would forget what failed.
for job in $(jobs -p); do wait "$job"; done
for name in kernels_test plan_test races_test; do
  nvcc -gencode=arch=compute_90a,code=sm_90a "$out"/library/*.o "$out/tests/$name.o" -o "$out/$name"
done
nvcc -gencode=arch=compute_90a,code=sm_90a "$out"/library/csrc_{plan,cpu,transport}_*.o "$out"/stopping/*.o \
  "$out/tests/failures_test.o" -o "$out/failures_test"
