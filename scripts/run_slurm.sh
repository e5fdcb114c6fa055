#!/usr/bin/env bash
#SBATCH --job-name=finchtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# Train under SLURM, one task per GPU, and resume in a new job when the time is up or the job is
# preempted:
#
#   sbatch scripts/run_slurm.sh --load_model ... --proj_dir /shared/run --save_every 500
#
# 300 seconds before the end SLURM sends SIGTERM to every task; train.py finishes its step, saves and
# exits with 75, and the job is queued again. Any other failure ends it.
set -euo pipefail
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
trap '' TERM # preemption signals this shell as well, which has to outlive its tasks

status=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train.py --resume auto "$@"' finchtune "$@" || status=$?
if [ "$status" -eq 75 ]; then
    echo "stopped by a signal, checkpoint saved: queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
