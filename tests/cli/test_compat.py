"""Command lines that people really have, in the spellings of the tools that they come from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from llamakit.cli import build_app, compat
from llamakit.errors import UsageError


def leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield from leaves(command, f"{name} ") if hasattr(command, "commands") else [(before + name, command)]


def rewritten(line: str) -> str:
    return shlex.join(compat.rewrite(shlex.split(line))[0])


def notes(line: str) -> list[compat.Note]:
    return compat.rewrite(shlex.split(line))[1]


@pytest.mark.parametrize(("old", "new"), [
    # llama.cpp's README of 2023 and 2024 for finetune
    ("finetune --model-base open-llama-3b-v2-q8_0.gguf --checkpoint-in chk-lora-LATEST.gguf --checkpoint-out chk-lora-ITERATION.gguf"
     " --lora-out lora-ITERATION.bin --train-data shakespeare.txt --save-every 10 --threads 6 --adam-iter 30 --batch 4 --ctx 64 --use-checkpointing",
     "finetune --model-base open-llama-3b-v2-q8_0.gguf --checkpoint-in chk-lora-LATEST.gguf --checkpoint-out chk-lora-ITERATION.gguf"
     " --lora-out lora-ITERATION.bin --train-data shakespeare.txt --save-every 10 --threads 6 --adam-iter 30 --batch 4 --ctx 64 --use-checkpointing"),
    ("finetune -t 6 -b 4 -c 64 -s 42 -ngl 33", "finetune --threads 6 --batch 4 --ctx 64 --seed 42 --n-gpu-layers 33"),
    ("finetune --model_base a.gguf --train_data=t_x.txt --adam_iter=30", "finetune --model-base a.gguf --train-data=t_x.txt --adam-iter=30"),
    ("finetune --rank-ffn_gate 8 --rank-ffn-up 8 --rank_ffn_down 4", "finetune --rank-ffn-gate 8 --rank-ffn-up 8 --rank-ffn-down 4"),
    ("finetune --sample-start '--_x' --escape", "finetune --sample-start --_x --escape"),
    ("finetune --checkpoint-in '' --enable-restart", "finetune --checkpoint-in '' --enable-restart"),
    ("finetune --separate-with-eos --no-separate-with-bos", "finetune --separate-with-eos --no-separate-with-bos"),
    ("finetune -m m.gguf -f t.txt -epochs 2 -lr 1e-4 -wd 0.1 -val-split 0.05",
     "finetune --model-base m.gguf --train-data t.txt --epochs 2 --adam-alpha 1e-4 --adam-decay 0.1 --val-split 0.05"),
    ("finetune --use-flash --train-data t --no-flash", "finetune --train-data t"),
    # llama.cpp's main and llama-completion
    ("generate -m m.gguf -p 'I believe' -n 64 --temp 0", "generate -m m.gguf -p 'I believe' -n 64 -t 0"),
    ("generate --model m.gguf --prompt '--a_b' --n-predict 64 --ctx-size 512 --temperature=0.7 --top_k 40 --repeat_penalty=1.1",
     "generate -m m.gguf -p --a_b -n 64 --ctx 512 -t 0.7 --top-k 40 --repeat-penalty=1.1"),
    ("generate -m m.gguf --predict 5 -c 128 -s 7 --file p_q.txt", "generate -m m.gguf -n 5 --ctx 128 --seed 7 -f p_q.txt"),
    ("generate -m m -l 5+1 --sampler-seq kt --top_n_sigma 1 --typical-p=0.9 --dry-sequence-breaker --_",
     "generate -m m --logit-bias 5+1 --sampling-seq kt --top-nsigma 1 --typical=0.9 --dry-sequence-breaker --_"),
    ("generate -m m --lora a.gguf --lora-scaled b.gguf 0.5 -p x", "generate -m m --lora a.gguf --lora-scaled b.gguf:0.5 -p x"),
    ("generate -m m --lora-scaled b.gguf:0.5 7", "generate -m m --lora-scaled b.gguf:0.5 7"),
    ("generate -m m --lora_scaled=b.gguf:0.5", "generate -m m --lora-scaled b.gguf:0.5"),
    ("generate -m m -no-cnv -p x", "generate -m m -p x"),
    ("generate -m m --conversation", "generate -m m -cnv"),
    ("generate -m m -ngl 99 --mlock --no-mmap -fa on -fa -b 512 -p x", "generate -m m --device auto -p x"),
    ("generate -m m --gpu-layers=0", "generate -m m --device cpu"),
    ("generate -m m -cnv -st -sys --_x -sysf a_b --jinja", "generate -m m -cnv --single-turn --system --_x --system-file a_b"),
    ("chat m_f.gguf --temp 0 -c 64 -st -cnv -ngl 0 --system-prompt=a_b --chat-template-file t_x.jinja",
     "chat -m m_f.gguf -t 0 --ctx 64 --single-turn --device cpu --system=a_b --chat-template t_x.jinja"),
    ("chat -hf u/r:Q8_0 -p x", "chat -m hf:u/r:Q8_0 -p x"),
    # llama2.c's run
    ("generate stories15M.bin -z tok.bin -t 0.8 -n 256 -i 'One day' -s 5", "generate -m stories15M.bin -z tok.bin -t 0.8 -n 256 -p 'One day' --seed 5"),
    ("generate c.bin -m chat -z tok.bin -y '-a b' -i hi",
     "generate -m c.bin -cnv --chat-template llama2-sys-bos -z tok.bin --system '-a b' -p hi"),
    ("generate stories15M.bin -m generate", "generate -m stories15M.bin"),
    ("generate a.bin -m m.gguf", "generate a.bin -m m.gguf"),
    ("generate 'Once upon' -m m.gguf", "generate 'Once upon' -m m.gguf"),
    # llama-tokenize
    ("tokenize -m m.gguf -p 'a_b' --ids --no-bos --no_parse_special --log-disable", "tokenize -m m.gguf -p a_b --ids --no-bos --no-parse-special"),
    ("tokenize --model m.gguf --stdin --show_count", "tokenize -m m.gguf --stdin --show-count"),
    # llama-export-lora, of 2024 and of today
    ("merge --model_base b.gguf --model-out o.gguf -l a.gguf -s c_d.gguf 0.5 -t 4",
     "merge -m b.gguf -o o.gguf --lora a.gguf --lora-scaled c_d.gguf:0.5 --threads 4"),
    ("merge -m b.gguf --lora a.gguf,c.gguf --lora-scaled d.gguf:0.5,e.gguf:2 -o o_x.gguf",
     "merge -m b.gguf --lora a.gguf,c.gguf --lora-scaled d.gguf:0.5,e.gguf:2 -o o_x.gguf"),
    # llama.cpp's Hub options
    ("generate -hf u/r:Q8_0 -p x", "generate -m hf:u/r:Q8_0 -p x"),
    ("generate --hf_repo=u/r:Q8_0 -p -hf --hf-file f.gguf", "generate -m hf:u/r/f.gguf -p -hf"),
    ("finetune -hfr u/r --train-data t", "finetune --model-base hf:u/r --train-data t"),
    ("convert -hf u/r:Q8_0 --outfile x.gguf", "convert hf:u/r:Q8_0 -o x.gguf"),
    ("convert --remote u/r --outfile x.gguf", "convert hf:u/r -o x.gguf"),
    ("inspect -hf u/r", "inspect hf:u/r"),
    # llama-quantize
    ("quantize --allow-requantize --imatrix a_b.gguf --tensor-type attn_v=q8_0 --max-buffer-size 64 m_f.gguf o_q.gguf q4_k 8",
     "quantize --allow-requantize --imatrix a_b.gguf --tensor-type attn_v=q8_0 m_f.gguf o_q.gguf q4_k 8"),
    ("quantize --override-kv general.name=str:a_b m.gguf 7 -t 4", "quantize --override-kv general.name=str:a_b m.gguf 7 --threads 4"),
    ("quantize -hf u/r:F16 q.gguf Q4_K_M", "quantize hf:u/r:F16 q.gguf Q4_K_M"),
    # llama-imatrix
    ("imatrix -m m_f.gguf -f t_x.txt --output-file o_i.gguf --from-chunk 2 -ofreq 5 -ngl 9 -fa on -ub 8 --in-file a_b.gguf",
     "imatrix -m m_f.gguf -f t_x.txt -o o_i.gguf --chunk 2 --output-frequency 5 --device auto --in-file a_b.gguf"),
    # llama-perplexity
    ("perplexity --model m_f.gguf -f t_x.txt --ctx-size 128 -t 4 -ngl 9 --save-all-logits b_l.kl",
     "perplexity -m m_f.gguf -f t_x.txt --ctx 128 --threads 4 --device auto --kl-divergence-base b_l.kl"),
    ("perplexity -hf u/r:Q8_0 --kl-divergence-base b.kl --kl-divergence -np 4",
     "perplexity -m hf:u/r:Q8_0 --kl-divergence-base b.kl --kl-divergence"),
    # everything else stays
    ("inspect -m m.gguf", "inspect m.gguf"),
    ("inspect -- --a_b.gguf", "inspect -- --a_b.gguf"),
    ("--version", "--version"),
    ("", ""),
    ("nonsense --a_b", "nonsense --a_b"),
    ("generate -", "generate -"),
])  # fmt: skip
def test_rewriting(old: str, new: str) -> None:
    assert rewritten(old) == new
    assert rewritten(new) == new  # ours is a fixed point


def test_no_effect_is_said() -> None:
    said = notes("generate -m m --mlock --no-flash -ngl 99 -fa off")
    assert [kind for kind, _ in said] == ["note"] * 3
    assert said[0][1].startswith("--mlock has no effect: ")
    assert said[1][1].startswith("-ngl 99 means --device auto")
    assert not notes("finetune --model-base m --threads 6 --use-checkpointing")


def test_old_letters_are_warned_about() -> None:
    (note,) = notes("generate -t 8")
    assert note == ("warning", "-t is the temperature, 8 a high one; llama.cpp's -t is --threads 8")
    assert notes("generate -t 2") and not notes("generate -t 1") and not notes("generate -t 2.0")
    assert not notes("generate --temp 8") and not notes("finetune -t 8")
    assert notes("chat -t 8") and notes("chat -p 0.9")
    (note,) = notes("generate -p 0.9")
    assert note == ("warning", "-p is the prompt; llama2.c's -p is --top-p 0.9, or llamakit run")
    assert not notes("generate -p 7") and not notes("generate -p hello") and not notes("generate -p")
    for mode in ("chat", "generate"):
        (note,) = notes(f"generate -m {mode}")
        assert note == ("warning", f"-m is the model; llama2.c's -m is: llamakit run MODEL -m {mode}")
    assert not notes("generate -m chat.gguf") and not notes("generate -m")


def test_run_keeps_its_own_dialect() -> None:
    line = ["run", "m.bin", "-t", "8", "-p", "0.9", "-i", "--a_b=c", "-m", "chat", "-y", "--"]
    assert compat.rewrite(line) == (line, [])


@pytest.mark.parametrize("line", ["generate -ngl", "generate --numa", "generate --lora-scaled"])
def test_a_missing_value_is_a_usage_error(line: str) -> None:
    with pytest.raises(UsageError, match="requires an argument"):
        compat.rewrite(line.split())


def test_every_target_is_a_real_option_and_no_alias_hides_one() -> None:
    commands = dict(leaves(get_command(build_app())))
    assert set(compat.ALIASES) == set(compat.NO_OPS) == set(commands)
    for name, table in compat.ALIASES.items():
        real = {option for p in commands[name].params for option in (*p.opts, *p.secondary_opts)}
        for old, new in table.items():
            assert not new or new in real, f"{name}: {old} -> {new}, which does not exist"
        assert not compat.NO_OPS[name].keys() & real


def test_rewriting_does_not_change_its_argument() -> None:
    argv = ["finetune", "-t", "6", "--use_flash"]
    compat.rewrite(argv)
    assert argv == ["finetune", "-t", "6", "--use_flash"]
