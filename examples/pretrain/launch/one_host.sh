#!/usr/bin/env bash
# Starts one training process for each GPU of this host:
#
#   examples/pretrain/launch/one_host.sh --config 16b --data rows/ --out runs/16b --resume
#
# On several hosts, start it on each with the same arguments and
#
#   NUM_HOSTS=4 HOST_INDEX=0 JAX_COORDINATOR_ADDRESS=host0:9911
#
# In a pod of an indexed Job HOST_INDEX may be missing. PROCESSES_PER_HOST sets another number than that of
# the GPUs. SIGTERM goes on to all processes. Exit status: 0, or the first other one of any process; the
# others then have GRACE_SECONDS to end.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$launch/../../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$launch/settings.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

count_gpus() {
  nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || {
    echo "one_host.sh: nvidia-smi finds no GPU here; set PROCESSES_PER_HOST to go on without." >&2
    exit 2
  }
}
per_host=${PROCESSES_PER_HOST:-$(count_gpus)}
hosts=${NUM_HOSTS:-1}
host=${HOST_INDEX:-${JOB_COMPLETION_INDEX:-0}}
if ((hosts > 1)) && [[ -z "${JAX_COORDINATOR_ADDRESS:-}" ]]; then
  echo "one_host.sh: NUM_HOSTS=$hosts needs JAX_COORDINATOR_ADDRESS=host:port of the first host." >&2
  exit 2
fi
export JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS:-127.0.0.1:9911}"
export JAX_NUM_PROCESSES=$((hosts * per_host))

declare -A running=()
for ((index = 0; index < per_host; index++)); do
  JAX_PROCESS_ID=$((host * per_host + index)) CUDA_VISIBLE_DEVICES=$index \
    "${PYTHON:-python3}" -m examples.pretrain.train "$@" &
  running[$!]=$index
done

trap 'kill -TERM "${!running[@]}" 2>/dev/null || true' TERM INT

status=0
while ((${#running[@]} > 0)); do
  code=0 finished=
  wait -n -p finished "${!running[@]}" || code=$?
  if [[ -z "${finished:-}" ]]; then
    continue # a signal came, which the trap has passed on
  fi
  echo "one_host.sh: process ${running[$finished]} of host $host ended with status $code" >&2
  unset "running[$finished]"
  if ((code != 0 && status == 0)); then
    status=$code
    if ((${#running[@]} > 0)); then
      (sleep "${GRACE_SECONDS:-120}" && kill -KILL "${!running[@]}") >/dev/null 2>&1 &
      killer=$!
    fi
  fi
done
if [[ -n "${killer:-}" ]]; then
  kill "$killer" 2>/dev/null || true
fi
exit "$status"
