#!/usr/bin/env bash
# A sweep on a SLURM allocation, from a checkout that every node sees: its results folder is what the workers share.
#   sbatch --nodes 4 --gpus-per-node 8 configs/slurm.sh configs/sweeps/gsr.yaml [options of rotlib.study.sweep]
#SBATCH --job-name=rotlib
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# starts Ray on every node, the sweep on the first, and stops Ray with it
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    python -m rotlib.study.sweep "$@" --engine ray --address auto
