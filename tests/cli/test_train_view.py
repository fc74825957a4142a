"""How `train` looks: samples as text, warnings, what to do next, and `--print-config` that can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamakit.cli.train_view import TrainView
from llamakit.dataset.prepare import Reading, VocabularyReady
from llamakit.training.report import Finished, Sample
from llamakit.training.train_config import TrainConfig
from tests.helpers import called


def _shown(capfd: pytest.CaptureFixture[str], *reports: object, **options: object) -> tuple[str, str]:
    with TrainView(TrainConfig(**options), json=False) as view:  # type: ignore[arg-type]
        for report in reports:
            view.show(report)  # type: ignore[arg-type]
    return capfd.readouterr()


def test_a_sample_keeps_its_lines_and_nothing_that_moves_a_cursor(capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = _shown(capfd, Sample(7, "ROMEO:\n", "O, speak again\n\x1b[2Jbright angel"))
    assert out == "sample 7:\n    ROMEO:\n    O, speak again\n    \\x1b[2Jbright angel\n"


def test_what_is_odd_about_text_and_vocabulary_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    reports = (Reading(1, 2000, 3), VocabularyReady(300, "llama", None, ("it has no token for a space",)))
    out, err = _shown(capfd, *reports)
    assert out.splitlines() == ["reading 1 file, 2.0 kB", "vocabulary: 300 tokens"]
    assert "warning: 3 files of the folder are left out" in err
    assert "warning: it has no token for a space" in err


def test_the_end_says_what_can_follow(capfd: pytest.CaptureFixture[str]) -> None:
    files = ("-run/checkpoint-LATEST.gguf", "-run/model-LATEST.gguf")
    out, err = _shown(capfd, Finished("all iterations are done", 2.0, 9, files), out_dir="-run")
    assert out.splitlines() == ["9 iterations, 2.0 s", *(f"wrote {file}" for file in files)]
    assert err == "hint: llamakit generate -m ./-run/model-LATEST.gguf; curves: llamakit plot ./-run\n"


def test_an_interrupted_run_gives_no_such_hint(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = _shown(capfd, Finished("interrupted", 2.0, 9, ("out/model-LATEST.gguf",), signal=2))
    assert out.startswith("ended: interrupted\n") and not err


def test_a_printed_configuration_is_one_that_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = (
        "--embd",
        "64",
        "--head",
        "4",
        "--sample-prompt",
        "a\nb",
        "--sample-prompt",
        "c",
        "--export",
        "hf",
        "--no-tie",
    )
    first = called(capfd, "train", *options, "--print-config")
    assert first.returncode == 0 and 'sample_prompt = ["a\\nb", "c"]' in first.stdout.splitlines()
    config = tmp_path / "all.toml"
    config.write_text(first.stdout, encoding="utf-8")
    assert called(capfd, "train", "--config", config, "--print-config").stdout == first.stdout
