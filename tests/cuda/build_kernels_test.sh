#!/usr/bin/env bash
# Builds tests/cuda/kernels_test into the folder given (default: build/cuda).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/cuda}
mkdir -p "$out"
for source in csrc/plan/*.cc csrc/cpu/*.cc; do
  g++ -std=c++17 -O3 -ffp-contract=off -Icsrc -c "$source" -o "$out/$(echo "$source" | tr / _).o" &
done
for source in csrc/cuda/*.cu tests/cuda/kernels_test.cu; do
  nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -Icsrc -c "$source" \
    -o "$out/$(echo "$source" | tr / _).o" &
done
wait
nvcc -gencode=arch=compute_90a,code=sm_90a "$out"/*.o -o "$out/kernels_test"
