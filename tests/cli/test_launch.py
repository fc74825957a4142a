"""How a rank leaves."""

from __future__ import annotations

import os

import pytest

from llamakit.cli import launch


def test_a_rank_that_joined_leaves_without_the_end_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """There gloo's threads, which outlive their group, would abort it: one run in six did after all was written."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    launch.end(0)
    assert not codes
    monkeypatch.setattr(launch._State, "was_joined", True)
    launch.end(0)
    launch.end(3)
    assert codes == [0, 3]
