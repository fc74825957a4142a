"""The shipped configurations: all of their keys are options, and their models have the sizes that their names say."""

from __future__ import annotations

import dataclasses
import os
import struct
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llamakit.cli import run
from llamakit.training.blueprint import from_scratch
from llamakit.training.train_config import TrainConfig, as_toml
from tests.helpers import ROOT

FOLDER = ROOT / "configs"
SHARED = Path(os.environ.get("LLAMAKIT_SHARED", ROOT.parent / "shared"))
#: configuration -> tokens of its vocabulary, numbers in the model; those of the stories are llama2.c's published ones
MODELS = {
    "tinyshakespeare": (2048, 3_737_856),
    "shakespeare-288": (32000, 15_191_712),
    "stories260K": (512, 260_032),
    "stories15M": (32000, 15_191_712),
    "stories42M": (32000, 41_689_600),
    "stories110M": (32000, 109_529_856),
    "thai": (512, 668_544),
}


def _values(name: str) -> dict[str, Any]:
    with (FOLDER / f"{name}.toml").open("rb") as file:
        return {key.replace("-", "_"): value for key, value in tomllib.load(file).items()}


def _config(name: str) -> TrainConfig:
    lists = {key: tuple(value) for key, value in _values(name).items() if isinstance(value, list)}
    options: dict[str, Any] = {**_values(name), **lists}
    return TrainConfig(**options)


def _count(vocab: int, config: TrainConfig) -> int:
    """Llama's numbers by hand: one matrix for both ends, four of attention, three of the feed-forward, the norms."""
    d, kv = config.embd, config.embd * (config.head_kv or config.head) // config.head
    ff = config.multiple_of * ((8 * d // 3 + config.multiple_of - 1) // config.multiple_of)
    block = 2 * d * d + 2 * d * kv + 3 * d * ff + 2 * d
    return vocab * d + config.layer * block + d


def test_each_configuration_of_train_is_tested_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*MODELS, "demo", "instruct"}  # these two are finetune's


@pytest.mark.parametrize("name", MODELS)
def test_the_command_takes_it(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--config", str(FOLDER / f"{name}.toml"), "--print-config"]) == 0
    assert capfd.readouterr().out.strip() == as_toml(_config(name))


@pytest.mark.parametrize("name", MODELS)
def test_its_model_has_the_size_that_is_told(name: str) -> None:
    n_vocab, n_parameters = MODELS[name]
    config = _config(name)
    shapes = from_scratch(config, {}, n_vocab, seed=0).names
    assert sum(_product(shape) for shape in shapes.values()) == n_parameters == _count(n_vocab, config)
    if config.vocab_size:
        assert config.vocab_size == n_vocab


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_that_a_configuration_tells_are_right(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert f"{MODELS[name][1]:,} parameters" in text


def test_the_defaults_are_those_of_shakespeare_288() -> None:
    values = _values("shakespeare-288")
    defaults = dataclasses.asdict(TrainConfig())
    assert values == {key: defaults[key] for key in values}
    shape = {"ctx", "embd", "layer", "head", "head_kv", "ff", "multiple_of", "tie", "dropout", "norm_rms_eps"}
    schedule = {"adam_iter", "batch", "grad_acc", "adam_alpha", "warmup", "lr_schedule", "cos_decay_steps"}
    assert shape | schedule <= set(values)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the published stories260K.bin of {SHARED}")
def test_stories260k_has_the_shape_of_the_published_file() -> None:
    with (SHARED / "models" / "stories260K.bin").open("rb") as file:
        dim, hidden, layers, heads, kv_heads, vocab, ctx = struct.unpack("<7i", file.read(28))
    config = _config("stories260K")
    assert (dim, hidden, layers, heads, kv_heads) == (
        config.embd, config.n_ff, config.layer, config.head, config.n_head_kv,
    )  # fmt: skip
    assert (abs(vocab), ctx) == (config.vocab_size, config.ctx)


def test_the_thai_text_is_there_and_is_thai() -> None:
    text = Path(ROOT, _config("thai").train_data).read_text(encoding="utf-8")
    letters = [character for character in text if character not in " \n"]
    assert sum("\u0e00" <= character <= "\u0e7f" for character in letters) > 0.98 * len(letters)
    assert text.count("ปฏิญญาสากลว่าด้วยสิทธิมนุษยชน") >= 2  # the title of each translation
