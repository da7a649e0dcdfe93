#!/usr/bin/env bash
# Builds the stress test as it is, with delays, and once for each wait that is taken out.
#
#   tests/cuda/mutations.sh build FOLDER     compiles all of them (no GPU needed)
#   tests/cuda/mutations.sh run FOLDER       the first two must pass, all others fail
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${2:-build/mutations}
flags=(-std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -cudart static -Icsrc)
kernels=(csrc/cuda/plan/*.cu csrc/cuda/node/dispatch.cu csrc/cuda/node/combine.cu
         tests/cuda/stress_test.cu)
# Name, then the arguments of the run that must notice.
variants=(
  "plain layout=expert" "delays layout=expert"
  "1 layout=token" "2 layout=token" "3 layout=expert" "4 layout=expert tokens=4000 hidden=64 steps=60"
  "5 layout=expert plan=push" "6 layout=expert plan=pull"
  "21 layout=token behind=1 ranks=4" "22 layout=expert behind=1"
)

build() {
  mkdir -p "$folder"
  for variant in "${variants[@]}"; do
    name=${variant%% *}
    defines=(-DJAX_EP_TEST_DELAYS)
    [ "$name" = plain ] && defines=()
    [[ $name =~ ^[0-9]+$ ]] && defines+=(-DJAX_EP_MUTATION="$name")
    nvcc "${flags[@]}" "${defines[@]}" "${kernels[@]}" -o "$folder/stress_$name" || return 1
  done
}

run() {
  status=0
  for name in plain delays; do
    for layout in expert token; do
      for arguments in "plan=push" "plan=pull" "plan=push ranks=4" "behind=1" "behind=1 ranks=4" "tokens=4000 hidden=64 steps=30"; do
        # shellcheck disable=SC2086
        timeout 60 "$folder/stress_$name" layout=$layout $arguments >"$folder/log" 2>&1 ||
          { echo "$name layout=$layout $arguments: FAILED"; cat "$folder/log"; status=1; }
      done
    done
    echo "$name: done"
  done
  for variant in "${variants[@]:2}"; do
    name=${variant%% *}
    # shellcheck disable=SC2086
    if timeout 60 "$folder/stress_$name" ${variant#* } timeout=2 >"$folder/log" 2>&1; then
      echo "mutation $name: NOT NOTICED"; status=1
    else
      echo "mutation $name: noticed: $(head -n 1 "$folder/log")"
    fi
  done
  return $status
}

"$1"
