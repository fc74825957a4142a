"""A real run tells enough for its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import UsageError
from llamakit.training.config import FinetuneConfig
from llamakit.training.finetune import finetune
from llamakit.training.recorder import Recorder, write_run_reports
from llamakit.training.report import Evaluation, Finished, Remark, Sample
from tests.tiny import cached_tiny_gguf, tiny_text


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    (tmp_path / "text.txt").write_text(tiny_text(4000), encoding="utf-8")
    return FinetuneConfig(
        model_base=str(cached_tiny_gguf()), train_data=str(tmp_path / "text.txt"), checkpoint_in="", checkpoint_out="",
        lora_out=str(tmp_path / "out" / "lora-ITERATION.gguf"), log_file=str(tmp_path / "out" / "log.jsonl"),
        adam_iter=3, batch=1, ctx=8, seed=1, threads=1, warmup=1,
    )  # fmt: skip


def test_a_run_of_finetune_becomes_its_report(tmp_path: Path, config: FinetuneConfig) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    recorder = Recorder("llamakit finetune", "llamakit finetune --model-base 'a b'", config, machine={"cores": 2})
    reports = list(recorder.follow(finetune(config)))
    said = list(write_run_reports(recorder, folder, config.log_file))
    assert said == [Remark("note", f"the report of this run: {folder / 'report.html'}")]
    assert {"loss.png", "report.html", "report.json", "log.jsonl", "lora-3.gguf"} <= {p.name for p in folder.iterdir()}
    told: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="ascii"))
    first, *_, last = [report for report in reports if isinstance(report, Evaluation)]
    assert told["perplexity"] == {"before": first.ppl, "after": last.ppl}
    assert told["outcome"] == "all iterations are done" and told["duration_s"] > 0
    assert told["curves"]["n_steps"] == 3 and told["curves"]["evaluations"]["step"] == [3]
    assert told["settings"]["adam_iter"] == 3 and {"adam_iter", "model_base", "seed"} <= set(told["changed"])
    assert not {"adam_beta1", "lora_r", "device"} & set(told["changed"])
    assert told["model"]["base"] == config.model_base and told["model"]["trained parameters"] > 0
    assert told["data"]["validation tokens"] > 0 and told["machine"] == {"cores": 2}
    assert "loss.png" in [file["name"] for file in told["files"]]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "--model-base &#x27;a b&#x27;" in page


def test_samples_and_warnings_are_kept(config: FinetuneConfig) -> None:
    recorder = Recorder("t", "c", config)
    samples = [Sample(0, "p", "before"), Sample(9, "p", "after")]
    assert recorder.summary().outcome == "not finished"
    list(recorder.follow([*samples, Remark("warning", "w"), Remark("note", "n"), Finished("over", 2.0, 9, ())]))
    summary = recorder.summary()
    assert list(summary.samples) == samples and summary.remarks == ("w",) and summary.outcome == "over"


def test_a_report_is_written_without_curves_and_without_matplotlib(
    tmp_path: Path, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder("t", "c", config)
    said = [report.text for report in write_run_reports(recorder, tmp_path)]
    assert said[0].startswith("the report has no curves: ") and "has no metrics.jsonl" in said[0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = [report.text for report in write_run_reports(recorder, tmp_path)]
    assert said[0] == "there is no loss.png: pictures of curves need the package matplotlib (pip install matplotlib)"
    assert "<svg" in (tmp_path / "report.html").read_text() and not (tmp_path / "loss.png").exists()
    with pytest.raises(UsageError, match="none: cannot be read"):
        list(write_run_reports(recorder, tmp_path / "none"))
