#!/usr/bin/env bash
# Trains on one node: sbatch launch/slurm.sh --config=configs/pretrain.py ... --workdir=DIR
#SBATCH --job-name=omnifusion
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

if [[ "${SLURM_JOB_NUM_NODES:-1}" -ne 1 || "${SLURM_NTASKS:-1}" -ne 1 ]]; then
    echo "error: ${SLURM_JOB_NUM_NODES:-1} nodes and ${SLURM_NTASKS:-1} tasks, one of each is supported" >&2
    exit 1
fi
exec .venv/bin/python -m omnifusion_jax.train "$@"
