"""Predicted and measured peak memory of runs on a real model, each in a process of its own, with the command's defaults."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from llamakit.dataset.plays import find_plays, plain_text
from llamakit.errors import UsageError
from tests.helpers import ROOT, cli
from tests.smollm import smollm2_path

#: name -> options; the held-out part of a text is small, since it is evaluated whole at the end
RUNS = {
    "4 x 64": "--batch 4 --ctx 64 --val-split 0.02",
    "4 x 64, cache none": "--batch 4 --ctx 64 --val-split 0 --weight-cache none",
    "4 x 64, cache bf16, no checkpointing": "--batch 4 --ctx 64 --val-split 0 --weight-cache bf16 --no-checkpointing",
    "4 x 64, bf16": "--batch 4 --ctx 64 --val-split 0 --dtype bf16",
    "4 x 512": "--batch 4 --ctx 512 --val-split 0",
    "4 x 512, no checkpointing": "--batch 4 --ctx 512 --val-split 0 --no-checkpointing",
    "chat, packed, 2 x 256": "--batch 2 --ctx 256 --val-split 0.01",
    "8 x 128 in 1 GB": "--batch 8 --ctx 128 --val-split 0 --max-memory 1G",
    "1 x 2048": "--batch 1 --ctx 2048 --val-split 0",
}
#: bytes that it must not take
LIMITS = {"1 x 2048": 4 * 10**9, "8 x 128 in 1 GB": 10**9}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        play = plain_text(find_plays()[0].read_text(encoding="utf-8"))
    except UsageError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(play[:60000], encoding="utf-8")
    return path


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNS)
def test_peak_memory_is_what_was_predicted(
    name: str, text: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data = ROOT / "data" / "llamakit-instruct.jsonl" if name.startswith("chat") else text
    files = ["--model-base", smollm2_path(), "--train-data", data, "--checkpoint-in", ""]
    words = [*files, "--adam-iter", "3", "--seed", "1", *shlex.split(RUNS[name])]
    planned = cli("plan", *words, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    before = json.loads(planned.stdout)["memory_bytes"]
    done = cli("finetune", *words, "--json", cwd=tmp_path, timeout_s=1700)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["plan"]
    peak, predicted = told["peak_bytes"], told["predicted_bytes"]
    record_property("measured_MB", round(peak / 1e6))
    record_property("predicted_MB", round(predicted / 1e6))
    record_property("off_percent", round(100 * (predicted / peak - 1), 1))
    assert abs(predicted / peak - 1) <= 0.15
    assert abs(before / peak - 1) <= 0.15, "the plan alone says the same"
    assert peak <= LIMITS.get(name, peak)
