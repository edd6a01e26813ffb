#!/usr/bin/env bash
# Trains on all GPUs of this machine: launch/gpu.sh [--dry-run] --config=sft ... --workdir=DIR
# On several machines, on each of them with its own number:
#   launch/gpu.sh --hosts=FIRST_MACHINE:8476 --host=0 --of=2 --config=sft ... --workdir=DIR_THAT_ALL_SHARE
set -euo pipefail
cd "$(dirname "$0")/.."

run=()
if [[ "${1:-}" == --dry-run ]]; then
    run=(echo)
    shift
fi
if [[ ! -x .venv/bin/python ]]; then
    "${run[@]}" "${PYTHON:-python3}" -m venv .venv
    "${run[@]}" .venv/bin/pip install -q -e '.[cuda]'
fi
# JAX takes three quarters of the memory of each GPU at the start, and no more later
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
if ((${#run[@]})); then
    printf '%q ' env "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" \
        .venv/bin/python -m omnifusion_jax.train "$@"
    echo
    exit
fi
exec .venv/bin/python -m omnifusion_jax.train "$@"
