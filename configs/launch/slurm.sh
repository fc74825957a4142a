#!/usr/bin/env bash
# Slurm: sbatch configs/launch/slurm.sh
#
# Two minutes before its time is over (USR1, below) the job has its ranks save and end, and puts itself into the queue
# again; the next one goes on from the newest checkpoint. Lines to adapt are marked with <--.
#SBATCH --job-name=llamakit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=llamakit-%j.log
set -euo pipefail

RUN=${RUN:-$SLURM_SUBMIT_DIR/run} # <-- a folder that all nodes see
BASE=${BASE:-$SLURM_SUBMIT_DIR/base.gguf} # <--
DATA=${DATA:-$SLURM_SUBMIT_DIR/chat.jsonl} # <--
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not meet

mkdir -p "$RUN"
cd "$RUN"

requeue=0
again() {
  requeue=1
  # Slurm's step gets SIGTERM, which torchrun hands to its ranks: the step is finished, saved, and the run ends.
  kill -TERM "$step" 2>/dev/null || true
}
trap again USR1

# One launcher for each node; --batch is that of all ranks together: a multiple of nodes x GPUs.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:$PORT" \
  -m llamakit finetune \
  --model-base "$BASE" --train-data "$DATA" \
  --checkpoint-in checkpoint-LATEST.gguf --checkpoint-out checkpoint-ITERATION.gguf --keep-last 2 \
  --lora-out lora-ITERATION.gguf --lora-r 16 \
  --batch 64 --ctx 4096 --adam-iter 1000 --save-every 100 &
step=$!

# The trap ends the first wait; the second one waits for what is being saved.
code=0
wait "$step" || code=$?
if [ "$requeue" = 1 ]; then
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
