"""The native library is found, checked and chosen; what is said where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llamakit import native
from llamakit.errors import UsageError
from llamakit.ggml import GGMLType
from llamakit.quant import quantize

BUILT = next(iter(sorted((Path(native.__file__).parent / "_native").glob("llamakit_native.*"))), None)
needs_library = pytest.mark.skipif(BUILT is None, reason="the native library is not built")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test looks for the library anew, with no LLAMAKIT_NATIVE but its own."""
    monkeypatch.delenv("LLAMAKIT_NATIVE", raising=False)
    for cached in (native._load, native._open):
        cached.cache_clear()
    yield
    for cached in (native._load, native._open):
        cached.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package elsewhere, as if it had been installed without native code."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_SOURCES", tmp_path.parent / "no sources")
    return tmp_path


def install(package: Path, content: bytes | None = None) -> Path:
    folder = package / "_native"
    folder.mkdir()
    assert BUILT is not None
    target = folder / BUILT.name
    if content is None:
        shutil.copy(BUILT, target)
    else:
        target.write_bytes(content)
    return target


@needs_library
def test_the_best_instruction_set_is_used() -> None:
    status, library = native.status(), native.library()
    assert status.isas[0] == "baseline" and status.isa == status.isas[-1]
    assert library is not None and library.isa == status.isa
    assert library.can_encode(GGMLType.Q8_0) and not library.can_encode(GGMLType.I32) and not library.can_encode(1000)
    assert status.reason is None and status.hint is None and not status.broken


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAKIT_NATIVE", "0")
    assert native.library() is None
    assert native.status() == native.Status(reason="LLAMAKIT_NATIVE=0 turns it off")


@needs_library
def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAKIT_NATIVE", "baseline")
    library = native.library()
    assert library is not None and library.isa == native.status().isa == "baseline"


@needs_library
def test_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAKIT_NATIVE", "avx1024")
    with pytest.raises(UsageError, match=r"^instruction set 'avx1024' is not there \(expected 0 or one of baseline"):
        native.library()


@needs_library
def test_switching_holds_within_its_block() -> None:
    before = native.library()
    with native.using(None):
        assert native.library() is None
        with native.using("baseline") as inner:
            assert native.library() is inner and inner is not None and inner.isa == "baseline"
        assert native.library() is None
    assert native.library() is before


@pytest.mark.usefixtures("package")
def test_without_a_library_torch_does_the_work() -> None:
    assert native.library() is None
    status = native.status()
    assert status.reason == "it was not built when llamakit was installed" and "compiler" in str(status.hint)
    assert not status.broken
    assert quantize(torch.ones(1, 32), GGMLType.Q8_0).shape == (1, 34)
    with pytest.raises(UsageError, match="no native code to use as avx2: it was not built"), native.using("avx2"):
        pass


@needs_library
def test_a_library_alone_is_enough(package: Path) -> None:
    path = install(package)
    assert native.status().path == path and native.library() is not None


@needs_library
@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_is_not_used(package: Path, content: bytes) -> None:
    path = install(package, content)
    status = native.status()
    assert native.library() is None and status.broken and str(status.reason).startswith(f"{path} cannot be loaded: ")


@needs_library
def test_a_library_of_another_version_is_not_used(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, built = install(package), native._ABI
    monkeypatch.setattr(native, "_ABI", 0)
    status = native.status()
    assert native.library() is None and status.broken
    assert status.reason == f"{path} is of another version (expected ABI 0, got {built})"


@needs_library
def test_a_library_older_than_its_sources_is_not_used(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text("# another\n")
    monkeypatch.setattr(native, "_SOURCES", sources)
    path = install(package)
    status = native.status()
    assert native.library() is None and status.broken and status.hint == "make native builds it"
    assert status.reason == f"{path} is older than its sources in {sources}"


@needs_library
def test_without_openmp_it_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(64, 4096)
    expected = quantize(rows, GGMLType.Q4_0)
    monkeypatch.setattr(native, "_gomp_parallel", lambda: None)
    torch.set_num_threads(2)
    assert not native.shares_threads()
    assert torch.equal(quantize(rows, GGMLType.Q4_0), expected)
