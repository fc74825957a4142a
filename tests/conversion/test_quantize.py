"""Whole files as llama-quantize of 2026 wrote them from the same input, and what is refused."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.cli import run
from llamakit.conversion.quantize import Quantized, QuantizedTensor, QuantizePlan, plan_quantization, quantize
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.gguf import GGUFFile, TensorData, copied_tensor, open_gguf, typed_metadata, write_gguf
from llamakit.ggml import GGMLType
from llamakit.quant import dequantize
from tests.conversion.quantize_files import CASES, HASHES, RULES, write_imatrix, write_model
from tests.tiny import cached_tiny_gguf

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[3] / "shared"))
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Model's name -> a folder with the model, its importance matrix and a file of rules; the same in every test."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_model(made[name], name)
            (made[name] / "rules.txt").write_text(RULES)
        return made[name]

    return give


def written(config: QuantizeConfig) -> list[Any]:
    return list(quantize(config))


def digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@pytest.mark.parametrize(
    ("model", "options", "kind", "expected"),
    [
        # every third by default: types, models and options alternate
        pytest.param(*case, digits, marks=[] if number % 3 == 0 else [pytest.mark.slow])
        for number, (case, digits) in enumerate(zip(CASES, HASHES, strict=True))
    ],
    ids=[f"{model} {options} {kind}" for model, options, kind in CASES],
)
def test_the_file_is_the_one_that_llama_quantize_writes(
    model: str, options: str, kind: str, expected: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder(model)
    monkeypatch.chdir(here)
    before = set(os.listdir())
    source = "model-00001-of-00003.gguf" if model == "split" else "model.gguf"
    assert run(["quantize", *options.split(), source, "out.gguf", kind, "1"]) == 0
    new = [here / name for name in sorted(set(os.listdir()) - before)]
    found = digest(new)[:16]
    for path in new:
        path.unlink()
    assert found == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared files at {SHARED} (LLAMAKIT_SHARED)")
def test_a_real_model_in_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = SHARED / "golden/llama.cpp-2026"
    shutil.copyfile(golden / "imatrix.gguf", tmp_path / "imatrix.gguf")
    monkeypatch.chdir(tmp_path)
    for line in (golden / "quantize.sha256").read_text().splitlines():
        expected, kind, *weighted = line.split()
        imatrix = "imatrix.gguf" if weighted else None
        source = SHARED / "golden/stories260K-f32.gguf"
        written(QuantizeConfig(source=source, out=tmp_path / "o.gguf", type=kind, imatrix=imatrix))
        assert digest([tmp_path / "o.gguf"]) == expected, line


def test_the_reports(folder: Folder, tmp_path: Path) -> None:
    config = QuantizeConfig(source=folder("plain") / "model.gguf", out=tmp_path / "o.gguf", type="Q4_K_M")
    plan, *tensors, last = written(config)
    assert isinstance(plan, QuantizePlan) and isinstance(last, Quantized)
    assert [report.tensor for report in tensors] == list(plan.tensors)
    assert [report.index for report in tensors] == list(range(1, len(tensors) + 1))
    assert tensors[-1].bytes_done == plan.source_bytes
    assert last.n_bytes == (tmp_path / "o.gguf").stat().st_size > plan.n_bytes
    with GGUFFile(config.source) as a, GGUFFile(tmp_path / "o.gguf") as b:
        assert plan.n_weights == sum(info.n_elements for info in a.tensors.values())
        for report in tensors:
            info = b.tensors[report.tensor.name]
            assert (report.tensor.shape, report.tensor.type) == (info.shape, info.type)
            if report.tensor.type is report.tensor.source_type:
                assert report.error is None
                continue
            x, q = (numbers(file, info.name) for file in (a, b))
            assert report.error == pytest.approx(float(np.sqrt(((x - q) ** 2).sum() / (x**2).sum())), rel=1e-4)


def numbers(file: GGUFFile, name: str) -> np.ndarray:
    import torch

    return dequantize(torch.from_numpy(file.read(name)), file.tensors[name].type).numpy().astype(np.float64)


def test_a_plan_writes_nothing_and_says_what_is_missing(folder: Folder, tmp_path: Path) -> None:
    def plan(model: str, **options: Any) -> QuantizePlan:
        config = QuantizeConfig(source=folder(model) / "model.gguf", out=tmp_path / "o.gguf", **options)
        with open_gguf(config.source) as source:
            return plan_quantization(source, config)

    needy = plan("plain", type="Q2_K_S")
    assert "blk.0.attn_q.weight" in needy.without_imatrix and "token_embd.weight" not in needy.without_imatrix
    assert len(plan("q8_0", type="Q4_0").requantized) == 9 and not plan("q8_0", type="Q8_0").requantized
    narrow = plan("narrow", type="Q4_K_M")
    assert len(narrow.fallbacks) == 14 and narrow.paths == (tmp_path / "o.gguf",)
    weighted = plan("plain", type="Q4_0", imatrix=str(folder("plain") / "imatrix.gguf"))
    assert weighted.notes == ("the importance matrix has nothing for 1 of 9 tensors: output.weight",)
    assert not list(tmp_path.iterdir())


def test_where_it_goes_without_a_name(folder: Folder, tmp_path: Path) -> None:
    shutil.copyfile(folder("f16") / "model.gguf", tmp_path / "m.gguf")
    for kind, name in (("q8_0", "ggml-model-Q8_0.gguf"), ("15", "ggml-model-Q4_K.gguf")):
        assert written(QuantizeConfig(source=tmp_path / "m.gguf", type=kind))[-1].paths == (tmp_path / name,)
    paths = written(QuantizeConfig(source=tmp_path / "m.gguf", type="q8_0", keep_split=True))[-1].paths
    assert paths == (tmp_path / "ggml-model-Q8_0-00001-of-00001.gguf",)


def changed(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of an F32 model in which one weight is another: row 1, column 3, of a vector column 3."""
    with GGUFFile(source) as file:
        tensors = {tensor: copied_tensor(file, tensor) for tensor in file.tensors}
        rows = file.read(name).view("<f4")
        rows[min(1, len(rows) - 1), 3] = value
        tensors[name] = TensorData(name, file.tensors[name].shape, GGMLType.F32, rows)
        write_gguf(target, metadata=typed_metadata(file), tensors=tensors.values())
    return target


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "row"), [("blk.0.attn_q.weight", 1), ("output_norm.weight", 0), ("token_embd.weight", 1)]
)
def test_what_is_no_finite_number_is_refused_by_name(
    value: float, name: str, row: int, folder: Folder, tmp_path: Path
) -> None:
    source = changed(folder("plain") / "model.gguf", tmp_path / "m.gguf", name, value)
    for kind in ("Q4_0", "F16", "COPY"):
        with pytest.raises(FormatError, match=rf"tensor {name} has NaN or infinity \(row {row}, column 3\)$"):
            written(QuantizeConfig(source=source, out=tmp_path / "o.gguf", type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("Q4_0", 1e9, r"tensor blk.0.attn_q.weight has a block that Q4_0 cannot hold \(row 1, column 0: up to 1e\+09\)"),
        ("Q4_K_S", 1e9, r"has a block that Q4_K cannot hold \(row 1, column 0"),
        ("F16", 7e4, r"has values that F16 cannot hold \(row 1, column 3: up to 7e\+04\)"),
        ("BF16", 3.4028e38, r"has values that BF16 cannot hold"),
    ],
)  # fmt: skip
def test_a_scale_beyond_float16_is_refused(
    kind: str, value: float, message: str, folder: Folder, tmp_path: Path
) -> None:
    source = changed(folder("plain") / "model.gguf", tmp_path / "m.gguf", "blk.0.attn_q.weight", value)
    with pytest.raises(UnsupportedError, match=message):
        written(QuantizeConfig(source=source, out=tmp_path / "o.gguf", type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_broken_block_of_the_source_is_refused(folder: Folder, tmp_path: Path) -> None:
    with GGUFFile(folder("q8_0") / "model.gguf") as file:
        tensors = {name: copied_tensor(file, name) for name in file.tensors}
        name = "blk.0.attn_k.weight"
        rows = file.read(name)
        rows[2, 34:36] = np.array([np.inf], "<f2").view(np.uint8)
        tensors[name] = TensorData(name, file.tensors[name].shape, GGMLType.Q8_0, rows)
        write_gguf(tmp_path / "m.gguf", metadata=typed_metadata(file), tensors=tensors.values())
    for kind in ("COPY", "F16"):
        config = QuantizeConfig(source=tmp_path / "m.gguf", out=tmp_path / "o.gguf", type=kind, allow_requantize=True)
        with pytest.raises(FormatError, match=rf"tensor {name} has NaN or infinity \(row 2, column 32\)"):
            written(config)


def test_refusals(folder: Folder, tmp_path: Path) -> None:
    plain, q8_0 = folder("plain") / "model.gguf", folder("q8_0") / "model.gguf"
    weights = str(folder("plain") / "imatrix.gguf")

    def refuses(kind: type[LlamakitError], message: str, source: Path = plain, type: str = "Q4_0", **options: Any):
        with pytest.raises(kind, match=message) as caught:
            written(QuantizeConfig(source=source, out=tmp_path / "o.gguf", type=type, **options))
        return caught.value

    error = refuses(UsageError, r"requantizing from type q8_0 is disabled \(output.weight\)$", q8_0)
    assert "--allow-requantize" in str(error.hint)
    refuses(
        UsageError, r"Q2_K_S requires an importance matrix, and there is none for blk.0.attn_k.weight$", type="Q2_K_S"
    )
    refuses(
        UsageError,
        "requires an importance matrix, and there is none for blk.0.attn_k.weight",
        type="Q2_K_S",
        imatrix=weights,
        exclude_weights=("attn_k",),
    )
    refuses(UnsupportedError, "^quantizing to IQ2_XS is not supported$", type="IQ2_XS")
    refuses(UsageError, "^unknown type to quantize to: Q9$", type="Q9")
    refuses(UsageError, "exclude each other", include_weights=("a",), exclude_weights=("b",))
    refuses(UsageError, "^--output-tensor-type: unknown tensor type: q9$", output_tensor_type="q9")
    refuses(
        UnsupportedError, "^--token-embedding-type: tensor type IQ1_S has no encoder$", token_embedding_type="iq1_s"
    )
    refuses(UsageError, "^--tensor-type: attn is no rule", tensor_type=("attn",))
    refuses(UsageError, "^--tensor-type attn=: attn= is no rule|is no rule", tensor_type=("attn=",))
    refuses(UsageError, "is no regular expression", tensor_type=("attn(=q8_0",))
    refuses(UsageError, "cannot be read", tensor_type_file=(tmp_path / "none.txt",))
    refuses(
        UsageError,
        "rows of 64 weights, which Q4_K cannot hold",
        folder("narrow") / "model.gguf",
        token_embedding_type="q4_k",
    )
    for text in ("1,x", "", "-1", "1,,2", "9" * 20):
        refuses(UsageError, "^--prune-layers is ", prune_layers=text)
    refuses(UsageError, "^--prune-layers names layer 1, which", prune_layers="1,2")
    for text in ("a", "a=b", "a=int", "=int:1", "a=int:x", "a=int:-1", "a=int:4294967296", "a=float:x", "a=float:1e99",
                 "a=bool:1", "a=u8:1", f"a=str:{'x' * 128}", f"{'a' * 128}=int:1", "general.alignment=int:64",
                 "split.count=int:2"):  # fmt: skip
        refuses(UsageError, "^--override-kv ", override_kv=(text,))
    refuses(
        FormatError, "block_count is missing or no integer", type="Q4_K_M", override_kv=("llama.block_count=str:x",)
    )
    assert not list(tmp_path.iterdir())


def test_importances_that_do_not_fit(folder: Folder, tmp_path: Path) -> None:
    plain, narrow = folder("plain"), folder("narrow")
    with pytest.raises(MismatchError, match=r"has 256 numbers for blk.0.attn_k.weight \(expected 1 x 64\)"):
        written(QuantizeConfig(
            source=narrow / "model.gguf", out=tmp_path / "o.gguf", type="Q4_0", imatrix=str(plain / "imatrix.gguf"),
        ))  # fmt: skip
    # an embedding that does not fit is left out, as there
    options = {"type": "Q4_0", "imatrix": str(plain / "imatrix.gguf"), "exclude_weights": ("blk",)}
    plan, *_ = written(QuantizeConfig(source=narrow / "model.gguf", out=tmp_path / "o.gguf", **options))
    assert "nothing for 15 of 15 tensors" in plan.notes[0]
    write_imatrix(tmp_path / "bad.gguf", plain / "model.gguf", scale=np.inf)
    with pytest.raises(FormatError, match=r"NaN or infinity|has inf as a sum"):
        written(QuantizeConfig(
            source=plain / "model.gguf", out=tmp_path / "o.gguf", type="Q4_0", imatrix=str(tmp_path / "bad.gguf"),
        ))  # fmt: skip


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    write_model(tmp_path, "split")
    whole = cached_tiny_gguf()
    shutil.copyfile(whole, tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    os.link(tmp_path / "m.gguf", tmp_path / "hard.gguf")
    (tmp_path / "folder").symlink_to(tmp_path)
    parts = sorted(tmp_path.glob("model-0000*"))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    for source, out, options in (
        ("m.gguf", "m.gguf", {}),
        ("link.gguf", "m.gguf", {}),
        ("m.gguf", "link.gguf", {}),
        ("m.gguf", "hard.gguf", {}),
        ("m.gguf", "folder/m.gguf", {}),
        (parts[0].name, parts[2].name, {}),
        (parts[1].name, "model.gguf", {"keep_split": True}),
        ("m.gguf", "imatrix.gguf", {"imatrix": str(tmp_path / "imatrix.gguf"), "include_weights": ("nothing",)}),
    ):
        with pytest.raises(UsageError, match="input and output files are the same"):
            written(QuantizeConfig(source=tmp_path / source, out=tmp_path / out, type="Q8_0", **options))
    assert {path: path.read_bytes() for path in tmp_path.glob("*.gguf")} == before


def test_what_cannot_be_quantized(tmp_path: Path, folder: Folder) -> None:
    from tests.formats.files import llama2c_file

    bin = llama2c_file(tmp_path / "m.bin")
    with pytest.raises(UsageError, match="has no vocabulary, and the target needs one") as caught:
        written(QuantizeConfig(source=bin, out=tmp_path / "o.gguf", type="Q8_0"))
    assert "--vocab" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is an imatrix, not a model"):
        written(QuantizeConfig(source=folder("plain") / "imatrix.gguf", out=tmp_path / "o.gguf", type="Q8_0"))
    (tmp_path / "cut.gguf").write_bytes((folder("f16") / "model.gguf").read_bytes()[:-100])
    with pytest.raises(FormatError):
        written(QuantizeConfig(source=tmp_path / "cut.gguf", out=tmp_path / "o.gguf", type="Q8_0"))


def test_giving_up_leaves_nothing(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "o.gguf").write_bytes(b"mine")
    reports = quantize(QuantizeConfig(source=folder("f16") / "model.gguf", out=tmp_path / "o.gguf", type="Q8_0"))
    for _ in range(4):
        next(reports)
    reports.close()
    assert [path.name for path in tmp_path.iterdir()] == ["o.gguf"]
    assert (tmp_path / "o.gguf").read_bytes() == b"mine"


def killed(source: Path, out: Path, keep_split: bool) -> None:
    """Quantize until three tensors are written, and be killed; runs in a child process."""
    for report in quantize(QuantizeConfig(source=source, out=out, type="Q8_0", keep_split=keep_split)):
        if isinstance(report, QuantizedTensor) and report.index == 3:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("keep_split", [False, True])
def test_a_killed_run_leaves_no_target_and_the_next_one_cleans_up(
    keep_split: bool, folder: Folder, tmp_path: Path
) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["llamakit.conversion.quantize"])
    source, out = folder("f16") / "model.gguf", tmp_path / "o.gguf"
    child = processes.Process(target=killed, args=(source, out, keep_split))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f".{out.stem if keep_split else out.name}.tmp-{child.pid}"]
    last = written(QuantizeConfig(source=source, out=out, type="Q8_0", keep_split=keep_split))[-1]
    assert sorted(tmp_path.iterdir()) == list(last.paths)
