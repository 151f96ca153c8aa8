#!/bin/bash
# Train on the GPUs of one or more nodes; what follows the script are options of `mimo train`:
#
#   sbatch --nodes=4 examples/slurm.sh --preset mimo-xl-k600 --data latents --out runs/xl-k600 --train.strategy fsdp
#
# The run folder has to be on a file system that all nodes share. The job may be resubmitted, also with another number of
# nodes: --resume continues from the newest checkpoint, or starts where there is none.
#
#SBATCH --job-name=mimo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time is up this script is told, and what it starts below: the step at hand is finished and saved.
#SBATCH --signal=B:TERM@300
set -euo pipefail

# The launcher gives its processes 30 seconds to save, unless it knows this option.
patience=()
if torchrun --help | grep -q -- --shutdown-timeout; then patience=(--shutdown-timeout 240); fi

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc-per-node="${PROCESSES_PER_NODE:-auto}" \
  --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$first_node:${RENDEZVOUS_PORT:-29500}" \
  "${patience[@]}" \
  -m mimo train "$@" --resume &
step=$!

# srun passes a signal on to torchrun, and torchrun to the processes that train.
stopped=false
trap 'stopped=true; kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
if $stopped; then
  wait "$step" || true # the first one ended with the signal, not with the step
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
