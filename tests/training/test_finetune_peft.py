"""Adapters as PEFT folders: the contract of numbered files, kept by folders and links to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import SaveError, UsageError
from llamakit.formats.adapter import Adapter, read_adapter, write_adapter_folder
from llamakit.formats.open import open_model
from llamakit.formats.peft import CONFIG, FILES, WEIGHTS
from llamakit.training.report import Report, Verified
from llamakit.training.run_folder import keep_report
from tests.tiny import cached_tiny_gguf
from tests.training.runs import run, run_config
from tests.training.test_finetune_chat import of

BASE = cached_tiny_gguf(type="Q8_0")


def peft(directory: Path, **options: Any) -> list[Report]:
    defaults: dict[str, Any] = {"adam_alpha": 0.02, "warmup": 0, "adam_iter": 4}
    out = str(directory / "lora-ITERATION")
    named: dict[str, Any] = {"lora_format": "peft", "lora_out": out}
    return run(directory, **(defaults | named | options))


def adapter(path: Path) -> Adapter:
    with open_model(BASE) as base:
        return read_adapter(path, base)


def folders(directory: Path) -> dict[str, str]:
    """Name -> what a link leads to, empty for a folder."""
    found = sorted(directory.glob("lora-*"))
    return {path.name: os.readlink(path) if path.is_symlink() else "" for path in found}


@pytest.mark.parametrize("options", [{}, {"rslora": True, "lora_targets": ("attn_*=3", "ffn_up=2")}], ids=str)
def test_the_folder_is_the_adapter_that_a_file_would_be(tmp_path: Path, options: dict[str, Any]) -> None:
    reports = peft(tmp_path, **options)
    assert folders(tmp_path) == {"lora-2": "", "lora-4": "", "lora-LATEST": "lora-4"}
    assert sorted(os.listdir(tmp_path / "lora-4")) == sorted(FILES)
    (verified,) = of(Verified, reports)
    assert verified.path == str(tmp_path / "lora-4") and verified.difference <= 1e-4 < verified.change
    (tmp_path / "gguf").mkdir()
    run(tmp_path / "gguf", adam_alpha=0.02, warmup=0, adam_iter=4, **options)
    expected, found = read_adapter(tmp_path / "gguf" / "lora-4.bin"), adapter(tmp_path / "lora-LATEST")
    assert found.tensors.keys() == expected.tensors.keys()
    for name, (a, b) in expected.tensors.items():
        change = found.scale(name) * found.tensors[name][1] @ found.tensors[name][0]
        np.testing.assert_allclose(change, expected.scale(name) * b @ a, rtol=2e-5, atol=1e-8)


def test_links_stay_whole_when_the_run_moves(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    peft(tmp_path / "here", adam_iter=1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert adapter(tmp_path / "there" / "lora-LATEST").tensors


def test_retention_never_takes_what_a_link_leads_to(tmp_path: Path) -> None:
    """A run that gets no better: BEST stays with an early one, whose checkpoint is gone."""
    options = {"save_every": 1, "keep_last": 1, "val_split": 0.2, "save_best": True}
    peft(tmp_path, adam_iter=2, **options)
    assert folders(tmp_path) == {"lora-2": "", "lora-BEST": "lora-2", "lora-LATEST": "lora-2"}
    peft(tmp_path, adam_iter=3, adam_alpha=0.0, adam_decay=0.0, **options)
    assert folders(tmp_path) == {"lora-2": "", "lora-5": "", "lora-BEST": "lora-2", "lora-LATEST": "lora-5"}
    assert adapter(tmp_path / "lora-BEST").tensors and not (tmp_path / "chk-2.gguf").exists()
    (tmp_path / "lora-BEST").unlink()
    peft(tmp_path, adam_iter=1, **options | {"save_best": False})
    assert set(folders(tmp_path)) == {"lora-6", "lora-LATEST"}  # no longer linked: it goes with the others


def test_what_a_user_has_put_beside_is_not_removed(tmp_path: Path) -> None:
    peft(tmp_path, adam_iter=1)
    (tmp_path / "lora-1" / "README.md").write_text("mine")
    peft(tmp_path, adam_iter=1, keep_last=1)
    assert set(folders(tmp_path)) == {"lora-1", "lora-2", "lora-LATEST"}
    with pytest.raises(UsageError, match="is not empty"):
        peft(tmp_path, adam_iter=1, checkpoint_in="")


def test_a_folder_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    peft(tmp_path, adam_iter=1)
    before = (tmp_path / "lora-1" / WEIGHTS).read_bytes()
    peft(tmp_path, adam_iter=1, checkpoint_in="", seed=8)
    assert (tmp_path / "lora-1" / WEIGHTS).read_bytes() != before
    assert not list(tmp_path.glob(".*tmp*"))


def test_a_name_without_a_number_is_one_folder(tmp_path: Path) -> None:
    peft(tmp_path, lora_out=str(tmp_path / "adapter"), adam_iter=2, save_every=1)
    assert not (tmp_path / "adapter").is_symlink() and adapter(tmp_path / "adapter").tensors
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        peft(tmp_path, lora_out=str(tmp_path / "adapter"))


@pytest.mark.parametrize("old", [True, False])
def test_what_fails_on_the_way_leaves_the_older_folder(
    tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        peft(tmp_path, adam_iter=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora-1").glob("*")}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamakit.formats.peft.write_safetensors", full)
    with pytest.raises(SaveError, match="No space left"):
        peft(tmp_path, adam_iter=1, checkpoint_in="", seed=8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora-1").glob("*")} == before
    assert not list(tmp_path.glob(".lora*tmp*"))


def test_a_resume_is_exact_and_merges(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    peft(whole, adam_iter=3, merge_out=str(tmp_path / "merged.gguf"))
    for n in (1, 2):
        peft(parts, adam_iter=n)
    for name in FILES:
        assert (whole / "lora-3" / name).read_bytes() == (parts / "lora-LATEST" / name).read_bytes()
    assert (tmp_path / "merged.gguf").exists()
    again = peft(parts, only_write_lora=True, lora_out=str(parts / "again"))
    assert (parts / "again" / WEIGHTS).read_bytes() == (parts / "lora-3" / WEIGHTS).read_bytes() and again


def test_an_adapter_folder_is_gone_on_from(tmp_path: Path) -> None:
    peft(tmp_path, adam_iter=1)
    reports = run(tmp_path, checkpoint_in="", lora_init=str(tmp_path / "lora-LATEST"), adam_iter=1, warmup=0)
    assert of(Verified, reports)[0].difference <= 1e-4


def test_a_folder_names_its_base_where_that_is_a_folder(tmp_path: Path) -> None:
    peft(tmp_path, adam_iter=1)
    assert json.loads((tmp_path / "lora-1" / CONFIG).read_text())["base_model_name_or_path"] is None


def test_the_report_lists_the_folders(tmp_path: Path) -> None:
    config = run_config(tmp_path, lora_format="peft", lora_out=str(tmp_path / "lora-ITERATION"), adam_iter=1)
    from llamakit.training.finetune import finetune

    list(keep_report(finetune(config), config, "llamakit finetune", tmp_path / "report"))
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    (listed,) = [file for file in told["files"] if "lora" in file["name"]]
    assert listed["name"] == "../lora-LATEST/"
    assert listed["bytes"] == sum(path.stat().st_size for path in (tmp_path / "lora-1").iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank_att_norm": 1}, "has no pairs for norms: attn_norm"),
        ({"lora_out": "lora-ITERATION.gguf"}, "peft writes folders, and --lora-out is lora-ITERATION.gguf"),
        ({"full": True, "lora_out": "ggml-lora-ITERATION-f32.gguf"}, "--lora-format is for an adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_options_that_do_not_belong_together(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        peft(tmp_path, **options)


def test_what_stands_in_the_way_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "lora-LATEST").mkdir()
    with pytest.raises(UsageError, match="a link to the newest one"):
        peft(tmp_path)
    (tmp_path / "lora-LATEST").rmdir()
    (tmp_path / "lora-LATEST").write_text("a file")
    with pytest.raises(UsageError, match="is a file, a folder is to be written"):
        peft(tmp_path)
    (tmp_path / "lora-LATEST").unlink()
    peft(tmp_path, adam_iter=1)
    with pytest.raises(UsageError, match="is a directory, a file name is needed"):
        run(tmp_path, lora_out=str(tmp_path / "lora-ITERATION"))
    with pytest.raises(UsageError, match="is an input of this run"):
        peft(tmp_path, checkpoint_in="", lora_init=str(tmp_path / "lora-1"))


def test_without_an_exchange_of_names_three_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    with open_model(BASE) as base:
        made = [
            Adapter(1.0, {"blk.0.attn_v.weight": (np.full((1, 64), i, np.float32), np.ones((32, 1), np.float32))})
            for i in (1, 2)
        ]
        shape = base.tensors["blk.0.attn_v.weight"].shape
        for one in made:
            a, b = one.tensors["blk.0.attn_v.weight"]
            one.tensors["blk.0.attn_v.weight"] = (np.resize(a, (1, shape[1])), np.resize(b, (shape[0], 1)))
        write_adapter_folder(tmp_path / "a", made[0], base)
        monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
        write_adapter_folder(tmp_path / "a", made[1], base, replace=True)
        assert read_adapter(tmp_path / "a", base).tensors["blk.0.attn_v.weight"][0][0, 0] == 2
        with pytest.raises(UsageError, match="is not empty"):
            write_adapter_folder(tmp_path / "a", made[1], base)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
