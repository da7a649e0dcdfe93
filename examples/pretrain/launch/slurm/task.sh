#!/usr/bin/env bash
# One task of a Slurm job, which srun starts: a training process with the GPU of its number on the host.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$launch/../../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../settings.sh
source "$launch/settings.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Slurm lets each task see all GPUs of its host, so that processes can map each other's memory. XLA gets one.
export CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
exec "${PYTHON:-python3}" -m examples.pretrain.train "$@"
