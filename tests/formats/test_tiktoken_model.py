"""Llama 3's vocabulary file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamakit.errors import FormatError, MismatchError
from llamakit.formats.tiktoken_model import is_tiktoken, read_tiktoken_vocabulary
from llamakit.formats.vocabulary_keys import read_keys
from tests.formats.torch_models import TIKTOKENS, tiktoken_file

N = len(TIKTOKENS)


def test_keys(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "tokenizer.model")
    assert is_tiktoken(path)
    keys = read_keys(read_tiktoken_vocabulary(path, N + 256, tools=False))
    assert (keys.model, keys.pre, len(keys.tokens)) == ("gpt2", "llama-bpe", N + 256)
    assert keys.tokens[256:N] == ["th", "Ġt", "he", "Ġthe", "the", "Ã©"]
    assert keys.merges[:3] == ["t h", "Ġ t", "h e"] and keys.merges[-1] == "Ã ©"
    assert sorted(keys.merges[3:-1]) == sorted(["Ġ the", "Ġt he", "t he", "th e"])
    assert keys.types == [1] * N + [3] * 256 and keys.adds_bos
    assert {name: keys.tokens[id] for name, id in keys.ids.items()} == {
        "bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>",
    }  # fmt: skip
    # positions in the published vocabularies, counted from 128000
    special = keys.tokens[N:]
    assert special[5:11] == [
        "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>",
        "<|eot_id|>", "<|reserved_special_token_5|>",
    ]  # fmt: skip
    assert special[255] == "<|reserved_special_token_250|>"


def test_the_later_names(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "tokenizer.model")
    keys = read_keys(read_tiktoken_vocabulary(path, N + 256, tools=True))
    special = keys.tokens[N:]
    assert special[4] == "<|finetune_right_pad_id|>" and special[5] == "<|reserved_special_token_2|>"
    assert special[8:12] == ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>"]
    assert special[255] == "<|reserved_special_token_247|>"
    assert keys.tokens[keys.ids["eom"]] == "<|eom_id|>"


def test_broken_files(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "tokenizer.model")
    sound = path.read_text()
    for text, reason in [
        ("IQ== 0\n" + sound, "has the rank 0"), (sound + f"!! {N}\n", "no token"), (sound + f"A=== {N}\n", "no token"),
        (sound + f"IQ== {N}\n", "again"), (sound.replace("IQ== 33\n", f"{'QQ' * 900} 33\n"), "no token"),
        (sound.replace("IQ== 33\n", "QUFB 33\n"), "no token for the byte 33"), ("", "for the byte 0"),
    ]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(FormatError, match=reason):
            read_tiktoken_vocabulary(path, N + 256, tools=False)
    path.write_text(sound)
    with pytest.raises(MismatchError, match="special ones"):
        read_tiktoken_vocabulary(path, N, tools=False)
    path.write_bytes(b"\n\x0e\n\x05<unk>")
    assert not is_tiktoken(path)
