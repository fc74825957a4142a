"""Broken and hostile vocabularies of every format: an error of one line, or success; never a hang."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import LlamakitError
from llamakit.files import escape_control
from llamakit.formats.huggingface_vocab import read_vocabulary, write_vocabulary
from llamakit.formats.llama2c_vocab import read_llama2c_vocabulary, write_llama2c_vocabulary
from llamakit.formats.sentencepiece_model import read_sentencepiece_model
from llamakit.formats.vocabulary import vocabulary_only
from tests.formats.vocabulary_folders import make_folder
from tests.fuzz.mutate import scrambled
from tests.tokenizer.vocabularies import bpe_metadata, spm_metadata

_VALUES = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**25, 1.5, -0.0, "", "a", "\x1b[2J", "\0", "<s>", "\u2581", "x" * 5000, [], [[]], {}, [0],
    ["a", "b"], {"type": "Sequence"}, {"type": "ByteLevel"}, {"content": 5}, {"id": "x"}, {"type": "Split"}, {"": None},
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below a value; of a large container only the first few."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found = [(value, key) for key, _ in items[:12]]
    return found + [place for _, inner in items[:12] for place in _places(inner)]


def broken_json(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(["", "}", "NaN", '"', "[" * 20000, "\\ud800", text[at : at + 9] * 3])
    value = json.loads(text)
    for _ in range(rng.randrange(1, 4)):
        places = _places(value)
        if not places:
            break
        container, key = rng.choice(places)
        if rng.random() < 0.2:
            container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(value)


def _guarded(call: Callable[[], Any]) -> Any:
    """What a call gives, None where it refused."""
    start = time.process_time()
    try:
        result = call()
    except LlamakitError as error:
        assert "\n" not in str(error) and escape_control(str(error)) == str(error) and len(str(error)) < 1000
        result = None
    assert time.process_time() - start < 5  # a hang, not a benchmark: most take milliseconds
    return result


def _written(metadata: Any, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    if metadata is not None:
        _guarded(lambda: write_vocabulary(directory, metadata))
        _guarded(lambda: write_llama2c_vocabulary(directory / "tokenizer.bin", metadata))


def folders(tmp_path: Path, numbers: range) -> int:
    accepted = 0
    for number in numbers:
        rng = random.Random(number)
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        make_folder(number % 40, directory)
        path = rng.choice(sorted(p for p in directory.iterdir() if p.suffix != ".jinja"))
        if path.suffix == ".json":
            path.write_text(broken_json(path.read_text(), rng))
        else:
            path.write_bytes(scrambled(path.read_bytes(), number, 4000))
        n_vocab = rng.choice([None, None, 270, 300])
        metadata = _guarded(lambda d=directory, n=n_vocab: read_vocabulary(d, n))
        _written(metadata, tmp_path / "out")
        accepted += metadata is not None
    return accepted


def binaries(tmp_path: Path, numbers: range) -> int:
    accepted, path = 0, tmp_path / "tokenizer.bin"
    write_llama2c_vocabulary(path, spm_metadata([("\u2581", -1.0), ("a", -2.0)]))
    sound_bin = path.read_bytes()
    make_folder(0 if random.Random(0).random() < 0.5 else 1, tmp_path / "sound")
    sound_model = next((tmp_path / "sound").glob("*.model")).read_bytes()
    for number in numbers:
        path.write_bytes(scrambled(sound_bin, number, 60))
        accepted += _guarded(lambda: read_llama2c_vocabulary(path, 261)) is not None
        _guarded(lambda: vocabulary_only(path, 261))
        path.write_bytes(scrambled(sound_model, number, len(sound_model)))
        accepted += _guarded(lambda: read_sentencepiece_model(path)) is not None
    return accepted


def metadata_mutants(tmp_path: Path, numbers: range) -> None:
    for number in numbers:
        rng = random.Random(number)
        sound = spm_metadata([("\u2581", -1.0), ("a", -2.0)]) if rng.random() < 0.5 else bpe_metadata(["a b"])
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice([k for k in sound if k.startswith("tokenizer.")])
            sound[key] = rng.choice([*_VALUES, ["\ud800"], sound[key]])
        sound[
            f"tokenizer.{rng.choice(['ggml.add_bos_token', 'chat_template', 'ggml.bos_token_id', 'ggml.merges'])}"
        ] = rng.choice(_VALUES)
        _written(sound, tmp_path / "out")


@pytest.mark.slow
def test_hostile_vocabularies(tmp_path: Path) -> None:
    assert 0 < folders(tmp_path, range(120)) < 110
    assert 0 < binaries(tmp_path, range(60)) < 110
    metadata_mutants(tmp_path, range(100))


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_two_thousand_of_each(tmp_path: Path) -> None:
    folders(tmp_path, range(120, 4120))
    binaries(tmp_path, range(60, 2060))
    metadata_mutants(tmp_path, range(100, 2100))
