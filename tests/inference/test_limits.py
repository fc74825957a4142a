from __future__ import annotations

import pytest

from llamakit.errors import MemoryError_
from llamakit.inference import limits


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_READ_BYTES", 1 << 20), ("_MATRIX", 64), ("_SECONDS", 0.01)):
        monkeypatch.setattr(limits, name, value)


def test_both_limits_are_measured() -> None:
    found = limits.measure_limits()
    assert 1e8 < found.read_bandwidth < 1e13 and 1e6 < found.gemm_peak < 1e16


def test_little_memory_is_read_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 40)
    monkeypatch.setattr(limits, "available_memory_bytes", lambda: 8 << 20)
    assert limits.measure_limits().read_bandwidth > 1e8
    monkeypatch.setattr(limits, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(MemoryError_, match="no memory left"):
        limits.measure_limits()
