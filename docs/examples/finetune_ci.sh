#!/usr/bin/env bash
# Fine-tune a chat model on questions and answers, and hand it on only where it did no harm.
#
#   finetune_ci.sh MODEL DATA TEXT OUT [OPTION OF FINETUNE]...
#
# TEXT has nothing to do with DATA; the perplexity on it may rise by MAX_RISE percent (5). Exit code 0: OUT holds
# model-q8_0.gguf, Modelfile, lora.gguf, report/ and perplexity.json. 1: it rose by more; the report, the adapter and
# perplexity.json are there, the model is not. Any other code is that of the command that failed.
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: finetune_ci.sh MODEL DATA TEXT OUT [OPTION OF FINETUNE]..." >&2
  exit 2
fi
model=$1 data=$2 text=$3 out=$4
shift 4
llamakit=${LLAMAKIT:-llamakit}

mkdir -p "$out"
rm -f "$out/model-q8_0.gguf" "$out/Modelfile" # those of an earlier run are no result of this one
work=$(mktemp -d "$out/work-XXXXXX")
trap 'rm -rf "$work"' EXIT

$llamakit finetune --model-base "$model" --train-data "$data" --lora-out "$out/lora.gguf" \
  --checkpoint-in "" --checkpoint-out "" --report "$out/report" "$@"
$llamakit merge -m "$model" --lora "$out/lora.gguf" --outtype f16 -o "$work/f16.gguf"
$llamakit quantize "$work/f16.gguf" "$work/model-q8_0.gguf" Q8_0
$llamakit perplexity -m "$model" -m "$work/model-q8_0.gguf" -f "$text" -c "${PPL_CTX:-512}" \
  --chunks "${PPL_CHUNKS:-16}" --max-rise "${MAX_RISE:-5}" --json >"$out/perplexity.json"
mv "$work/model-q8_0.gguf" "$out/model-q8_0.gguf"
$llamakit convert "$out/model-q8_0.gguf" -o "$out/Modelfile"
