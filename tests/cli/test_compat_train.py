"""Command lines of llama2.c's train.py and of llama.cpp's train-text-from-scratch, as their READMEs have them."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from typing import Any

import pytest
from typer.main import get_command

from llamakit.cli import build_app, compat
from llamakit.errors import LlamakitError, UnsupportedError, UsageError
from llamakit.training.train_config import TrainConfig

LLAMA2C = """train --out_dir=out --eval_interval=2000 --log_interval=1 --eval_iters=100 --eval_only=False
 --always_save_checkpoint=False --init_from=scratch --wandb_log=False --wandb_project=llamac --wandb_run_name=run1
 --batch_size=128 --max_seq_len=256 --vocab_source=custom --vocab_size=4096 --dim=288 --n_layers=6 --n_heads=6
 --n_kv_heads=6 --multiple_of=32 --dropout=0.0 --gradient_accumulation_steps=4 --learning_rate=5e-4 --max_iters=100000
 --weight_decay=0.1 --beta1=0.9 --beta2=0.95 --grad_clip=1.0 --decay_lr=True --warmup_iters=1000 --device=cuda
 --dtype=bfloat16 --compile=True"""
LLAMA2C_OURS = """train --out-dir=out --eval-every=2000 --eval-iters=100 --init-from=scratch --batch=128 --ctx=256
 --vocab-size 4096 --embd=288 --layer=6 --head=6 --head-kv=6 --multiple-of=32 --dropout=0.0 --grad-acc=4
 --adam-alpha=5e-4 --adam-iter=100000 --adam-decay=0.1 --adam-beta1=0.9 --adam-beta2=0.95 --adam-gclip=1.0
 --lr-schedule cosine --warmup=1000 --device cuda --dtype bf16 --compile"""


def rewritten(line: str) -> str:
    return shlex.join(compat.rewrite(shlex.split(line))[0])


def values(line: str) -> dict[str, Any]:
    """What the command's function would be given for a line in any spelling."""
    words, _ = compat.rewrite(shlex.split(line))
    command: Any = get_command(build_app())
    context = command.commands["train"].make_context("train", words[1:])
    return context.params


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LLAMA2C, LLAMA2C_OURS),
        # its README: a custom tokenizer, a small model on a laptop, going on
        (
            "train --out_dir=stories260K --batch_size=128 --max_seq_len=512 --gradient_accumulation_steps=1"
            " --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8 --n_kv_heads=4"
            " --multiple_of=4 --learning_rate=1e-3 --dropout=0.05 --weight_decay=0.01 --max_iters=100000"
            " --beta2=0.99 --warmup_iters=1000 --eval_interval=2000 --eval_iters=100 --compile=True",
            "train --out-dir=stories260K --batch=128 --ctx=512 --grad-acc=1 --vocab-size 512 --embd=64 --layer=5"
            " --head=8 --head-kv=4 --multiple-of=4 --adam-alpha=1e-3 --dropout=0.05 --adam-decay=0.01"
            " --adam-iter=100000 --adam-beta2=0.99 --warmup=1000 --eval-every=2000 --eval-iters=100 --compile",
        ),
        ("train --compile=False --eval_iters=10 --batch_size=8", "train --eval-iters=10 --batch=8"),
        ("train --init_from=resume --decay_lr=False", "train --init-from=resume --lr-schedule constant"),
        ("train --eval_only=True --device=cuda:0", "train --eval-only --device cuda"),
        ("train --dtype float32 --vocab_source=llama2 --vocab_size=32000 --vocab-model tok.model",
         "train --dtype f32 --vocab-model tok.model"),
        # train-text-from-scratch's README
        (
            "train --vocab-model ../models/ggml-vocab-llama.gguf --ctx 64 --embd 256 --head 8 --layer 16"
            " --checkpoint-in chk-shakespeare-256x16-LATEST.gguf --checkpoint-out chk-shakespeare-256x16-ITERATION.gguf"
            " --model-out ggml-shakespeare-256x16-f32-ITERATION.gguf --train-data shakespeare.txt -t 6 -b 16"
            " --seed 1 --adam-iter 256 --no-checkpointing",
            "train --vocab-model ../models/ggml-vocab-llama.gguf --ctx 64 --embd 256 --head 8 --layer 16"
            " --checkpoint-in chk-shakespeare-256x16-LATEST.gguf --checkpoint-out chk-shakespeare-256x16-ITERATION.gguf"
            " --model-out ggml-shakespeare-256x16-f32-ITERATION.gguf --train-data shakespeare.txt --threads 6 --batch 16"
            " --seed 1 --adam-iter 256 --no-checkpointing --no-tie",
        ),
        ("train --model-out m.gguf --tie", "train --model-out m.gguf --tie"),
        ("train --use-flash --norm-rms-eps 1e-6 --rope-freq-base 5000 --rope-freq-scale 1.0 -ngl 0",
         "train --norm-rms-eps 1e-6 --rope-freq-base 5000 --device cpu"),
    ],
)  # fmt: skip
def test_rewriting(old: str, new: str) -> None:
    assert rewritten(old) == shlex.join(shlex.split(new))
    assert rewritten(new) == shlex.join(shlex.split(new))  # ours is a fixed point


def test_one_set_of_defaults_whichever_spelling_is_used() -> None:
    ours, theirs, old = (
        values(f"train {line}") for line in ("--out-dir x", "--out_dir=x", "--out-dir x --model-out m")
    )
    assert ours == theirs
    assert {name for name in ours if ours[name] != old[name]} == {"model_out", "tie"} and old["tie"] is False
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert all(
        ours[name] == default for name, default in fields.items() if name not in ("out_dir", "export", "sample_prompt")
    )


def test_values_arrive() -> None:
    found = values(LLAMA2C)
    assert (found["embd"], found["head_kv"], found["ctx"], found["batch"], found["grad_acc"]) == (288, 6, 256, 128, 4)
    assert (found["adam_alpha"], found["adam_decay"], found["adam_beta2"]) == (5e-4, 0.1, 0.95)
    assert (found["dtype"], found["compile"], found["vocab_size"], found["eval_only"]) == ("bf16", True, 4096, False)
    assert inspect.signature(TrainConfig).parameters.keys() >= {"embd"}


def test_what_has_no_effect_is_said() -> None:
    said = [
        text for kind, text in compat.rewrite(shlex.split("train --log_interval=1 --vocab-model v --vocab_size=9"))[1]
    ]
    assert any("--log-interval" in text or "--log_interval" in text for text in said)
    assert any("--vocab-size 9 has no effect" in text for text in said)
    (note,) = compat.rewrite(shlex.split("train --model-out m.gguf"))[1]
    assert "--tie" in note[1]


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("train config/mine.py --dim=64", UsageError, "configuration in Python"),
        ("train --compile=maybe", UsageError, "expected True or False"),
        ("train --wandb_log=True", UnsupportedError, "--wandb-log"),
        ("train --dtype=float16", UnsupportedError, "float16"),
        ("train --vocab_source=llama2", UsageError, "needs the vocabulary itself"),
        ("train --vocab_source=gpt2", UsageError, "expected llama2 or custom"),
        ("train --rope-freq-scale 0.5", UnsupportedError, "--rope-freq-scale"),
        ("train --rope-freq-scale half", UnsupportedError, "--rope-freq-scale"),
        ("train --dtype", UsageError, "requires an argument"),
        ("train --vocab_size", UsageError, "requires an argument"),
        ("train --lora-out x", UnsupportedError, "finetune trains an adapter"),
        ("train --enable-restart", UnsupportedError, "--lr-schedule"),
    ],
)
def test_what_cannot_be_is_refused(line: str, error: type[LlamakitError], said: str) -> None:
    with pytest.raises(error) as caught:
        compat.rewrite(shlex.split(line))
    assert said in f"{caught.value} {caught.value.hint}" and caught.value.exit_code == 2
