"""`llamakit verify A B`, as a script uses it."""

from __future__ import annotations

import json

import pytest

from tests.formats.torch_models import meta_model
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf


def test_equal_models(capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "verify", cached_tiny_gguf(), cached_tiny_gguf())
    assert result.returncode == 0 and not result.stderr
    assert result.stdout == "verified: 21 tensors, vocabulary equal, max |dlogit| = 0, KL = 0\n"


def test_rounded_models_name_the_largest_error(capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "verify", cached_tiny_gguf(), cached_tiny_gguf(type="Q8_0"))
    assert result.returncode == 0
    first, second = result.stdout.splitlines()
    assert first.startswith("verified: 21 tensors (5 equal), vocabulary equal, max |dlogit| = 0.")
    assert second.startswith("largest error: ") and second.endswith("(relative root mean square)")


def test_different_models(capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "verify", cached_tiny_gguf(), cached_tiny_gguf(seed=1), "--no-forward")
    assert result.returncode == 1 and not result.stderr
    assert result.stdout.startswith("different: tensor token_embd.weight (F32 -> F32) differs by ")
    assert "verified" not in result.stdout


def test_json_is_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    report = json.loads(called(capfd, "verify", cached_tiny_gguf(), cached_tiny_gguf(), "--json").stdout)
    assert report["passed"] is True and report["n_tensors"] == report["n_equal"] == 21
    assert report["kl"] == report["max_dlogit"] == 0 and report["failures"] == []


def test_what_is_no_model_is_one_line(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("text")
    assert_error(
        called(capfd, "verify", cached_tiny_gguf(), tmp_path / "x"), 2, f"error: {tmp_path / 'x'}@0: is a text"
    )


def test_a_source_that_states_no_context_has_the_others(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    meta, out = meta_model(tmp_path / "meta"), tmp_path / "m.gguf"
    assert called(capfd, "convert", meta, "-o", out, "--ctx", "96", "--outtype", "bf16").returncode == 0
    for pair in ((meta, out), (out, meta), (meta, meta), (meta, out, "--ctx", "96")):
        assert called(capfd, "verify", *pair).returncode == 0
    result = called(capfd, "verify", meta, out, "--ctx", "95")
    assert result.returncode == 1 and "n_ctx is 96, was 95" in result.stdout
