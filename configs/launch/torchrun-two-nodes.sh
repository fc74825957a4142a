#!/usr/bin/env bash
# Two machines, by hand: run this on both, with the same HEAD, within a few minutes of each other.
#
#   HEAD=gpu1:29500 bash configs/launch/torchrun-two-nodes.sh
#
# Both need llamakit of the same version, the same model and data, and a folder that both see for the checkpoints.
# Lines to adapt are marked with <--. What it takes is said beforehand by: llamakit plan --nodes 2 ...
set -euo pipefail

: "${HEAD:?name the machine where the ranks meet, and a free port: HEAD=gpu1:29500}"
NODES=${NODES:-2}
GPUS=${GPUS:-8} # <-- GPUs of each machine
RUN=${RUN:-/shared/run} # <-- a folder that all machines see
BASE=${BASE:-/shared/base.gguf} # <--
DATA=${DATA:-/shared/chat.jsonl} # <--

mkdir -p "$RUN"
cd "$RUN"

# A rank that dies ends all of them; the launcher starts them again, and they go on from the newest checkpoint.
# --batch is that of all ranks together: a multiple of NODES x GPUS.
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id llamakit --rdzv-endpoint "$HEAD" \
  -m llamakit finetune \
  --model-base "$BASE" --train-data "$DATA" \
  --checkpoint-in checkpoint-LATEST.gguf --checkpoint-out checkpoint-ITERATION.gguf --keep-last 2 \
  --lora-out lora-ITERATION.gguf --lora-r 16 \
  --batch 64 --ctx 4096 --adam-iter 1000 --save-every 100
