"""Folders as models: held against what convert_hf_to_gguf.py makes of them, and against everything that can be wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError, UsageError
from llamakit.formats.gguf import GGUFFile, copied_tensor, write_gguf
from llamakit.formats.huggingface import HuggingFaceModel
from llamakit.formats.open import open_model, sniff
from tests.formats.converted import EXPECTED, metadata_digest, tensors_digest
from tests.hf import CONVERTED, hf_config, hf_weights, stored, tiny_hf, write_weights

_EXTRA = "llama.rope.scaling.attn_factor"  # our one key on top, where YaRN's attention factor is not the usual one


@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_as_the_real_converter(tmp_path: Path, name: str) -> None:
    with HuggingFaceModel(tiny_hf(tmp_path / "model", **CONVERTED[name])) as model:
        write_gguf(
            tmp_path / "model.gguf",
            metadata=model.metadata,
            tensors=[copied_tensor(model, tensor) for tensor in model.tensors],
        )
    with GGUFFile(tmp_path / "model.gguf") as file:
        entries = [(k, file.metadata_types[k][0], v) for k, v in file.metadata.items() if k != _EXTRA]
        assert (metadata_digest(entries), tensors_digest(file)) == EXPECTED[name]
        assert (_EXTRA in file.metadata) == name.startswith("yarn-all")


def test_yarns_attention_factor_where_llama_cpp_reads_it(tmp_path: Path) -> None:
    model = HuggingFaceModel(tiny_hf(tmp_path, rope="yarn-all"))
    assert model.metadata[_EXTRA] * (1 + 0.1 * np.log(4.0)) == pytest.approx(1.25)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_rows_of_any_tensor(tmp_path: Path, dtype: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "n_head": 4, "n_head_kv": 2, "attention_bias": True}
    config = hf_config(**options)
    weights = stored(hf_weights(config), dtype)
    with HuggingFaceModel(tiny_hf(tmp_path, **options)) as model:
        for ours, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            matrix = weights[f"model.layers.1.self_attn.{theirs}.weight"]
            bias = weights[f"model.layers.1.self_attn.{theirs}.bias"]
            if ours != "attn_v":  # d rows a head: row 2 i + s was s d/2 + i
                order = [8 * h + s * 4 + i for h in range(len(matrix) // 8) for i in range(4) for s in range(2)]
                matrix, bias = matrix[order], bias[order]
            name = f"blk.1.{ours}.weight"
            for start, stop in ((0, None), (0, 0), (3, 4), (5, 13), (8, 16), (15, 16)):
                assert model.read(name, start, stop).tobytes() == matrix[start:stop].tobytes()
            assert model.read(f"blk.1.{ours}.bias").tobytes() == bias.tobytes()
            assert model.read(name).flags.writeable


def test_only_the_heads_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HuggingFaceModel(tiny_hf(tmp_path))
    seen: list[int] = []
    whole = model._sources["blk.0.attn_q.weight"].file._source.read  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "llamakit.formats.source.FileSource.read", lambda _, offset, n: (seen.append(n), whole(offset, n))[1]
    )
    model.read("blk.0.attn_q.weight", 9, 10)
    assert seen == [8 * 32 * 4]


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with HuggingFaceModel(tiny_hf(tmp_path, rope="llama3")) as model:
        for name in ("blk.0.attn_q.weight", "rope_freqs.weight"):
            with pytest.raises(ValueError, match="which has"):
                model.read(name, 0, 100)
        with pytest.raises(KeyError):
            model.read("output.bias")
        freqs = model.read("rope_freqs.weight").view("<f4")[0]
        assert (freqs[0], freqs[-1], freqs.shape) == (1, 8, (4,))
    with pytest.raises(ValueError, match="closed"):
        model.read("blk.0.attn_q.weight")


def test_a_name_for_the_model(tmp_path: Path) -> None:
    assert HuggingFaceModel(tiny_hf(tmp_path / "Tiny-1")).metadata["general.name"] == "Tiny-1"
    assert HuggingFaceModel(_in_the_cache(tmp_path)).metadata["general.name"] == "Some-Name"


def _in_the_cache(directory: Path) -> Path:
    """As the Hub's cache keeps it: every file a link to a blob of the same repository."""
    repository = directory / "models--someone--Some-Name"
    snapshot = tiny_hf(repository / "snapshots" / "abc123", n_shards=2)
    (repository / "blobs").mkdir()
    for i, path in enumerate(snapshot.iterdir()):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    return snapshot


def test_opened_by_what_it_is(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "model", n_shards=2)
    assert sniff(folder) == "huggingface"
    for path in (folder, folder / "model-00002-of-00002.safetensors"):
        model = open_model(path)
        assert isinstance(model, HuggingFaceModel)
        assert model.path == folder
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "other.safetensors")
    shutil.copy(folder / "other.safetensors", tmp_path)
    for path in (folder / "other.safetensors", tmp_path / "other.safetensors"):
        with pytest.raises(UnsupportedError, match=r"weights alone|none of the weights") as caught:
            open_model(path)
        assert "give its folder" in str(caught.value.hint)


def test_the_vocabulary_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []

    def read_vocabulary(directory: Path, n_vocab: int) -> dict[str, Any]:
        asked.append((directory, n_vocab))
        return {"tokenizer.ggml.model": "llama"}

    module = types.ModuleType("llamakit.formats.huggingface_vocab")
    module.read_vocabulary = read_vocabulary  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = tiny_hf(tmp_path)
    assert not any(key.startswith("tokenizer.") for key in HuggingFaceModel(folder).metadata)
    assert asked == []
    (folder / "tokenizer.model").write_bytes(b"")
    assert list(HuggingFaceModel(folder).metadata)[-2:] == ["general.quantization_version", "tokenizer.ggml.model"]
    assert asked == [(folder, 40)]
    assert list(HuggingFaceModel(folder, vocabulary=False).metadata)[-1] == "general.quantization_version"
    assert len(asked) == 1


def test_what_old_checkpoints_carry_along(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path)
    plain = HuggingFaceModel(folder).tensors
    weights = hf_weights(hf_config())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "<f4")
    write_weights(folder, weights)
    assert list(HuggingFaceModel(folder).tensors) == list(plain)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


def _map_to(name: Any) -> Callable[[Path], object]:
    return lambda d: _edit(d / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))


def _replace_shard(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda d: ((d / SHARD).rename(d.parent / "shard"), make(d / SHARD))


#: what somebody did to a folder of two shards -> what is said
TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (_map_to("../shard"), "'../shard' is no name of a file in this folder"),
    "absolute": (_map_to("/etc/passwd"), "'/etc/passwd' is no name"),
    "nothing": (_map_to(""), "'' is no name"),
    "dots": (_map_to(".."), "'..' is no name"),
    "NUL": (_map_to("a\0b"), "is no name"),
    "number": (_map_to(1), "1 is no name"),
    "list": (_map_to(["x"]), "is no name"),
    "itself": (_map_to("config.json"), "'config.json' is no weight file"),
    "a pickle": (_map_to("pytorch_model.bin"), "'pytorch_model.bin' is no weight file"),
    "missing shard": (lambda d: (d / SHARD).unlink(), "No such file"),
    "another missing shard": (_map_to("x.safetensors"), "No such file"),
    "wrong shard": (_map_to(SHARD), "lm_head.weight is not in it"),
    "too much in the map": (
        lambda d: _edit(d / INDEX, lambda i: i["weight_map"].update({"x": SHARD})), "tensor x is not in it"),
    "too little in the map": (
        lambda d: _edit(d / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")), "and not in the index"),
    "no map": (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
    "empty map": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), "no sound JSON"),
    "key twice": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), "'a' stands there twice"),
    "no index": (lambda d: (d / INDEX).unlink(), "has no weights"),
    "a link out": (_replace_shard(lambda p: p.symlink_to(p.parent.parent / "shard")), "a link that leaves the folder"),
    "a link to a device": (_replace_shard(lambda p: p.symlink_to("/dev/zero")), "a link that leaves the folder"),
    "a FIFO": (_replace_shard(os.mkfifo), "is not a regular file"),
    "a folder": (_replace_shard(Path.mkdir), "is a directory"),
    "two models": (lambda d: write_weights(d, hf_weights(hf_config())), "they may be two models"),
    "config out": (
        lambda d: ((d / "config.json").rename(d.parent / "c"), (d / "config.json").symlink_to("../c")),
        "a link that leaves the folder"),
    "huge config": (lambda d: os.truncate(d / "config.json", 1 << 27), "is too large"),
    "config as a list": (lambda d: (d / "config.json").write_text("[]"), "no object"),
    "no numbers to sample with": (
        lambda d: (d / "generation_config.json").write_text('{"top_p": "x"}'), "top_p is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_folders(tmp_path: Path, name: str) -> None:
    change, reason = TAMPERED[name]
    folder = tiny_hf(tmp_path / "model", n_shards=2)
    change(folder)
    with pytest.raises(LlamakitError, match=reason) as caught:
        HuggingFaceModel(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_links_of_another_repository_in_the_cache(tmp_path: Path) -> None:
    snapshot = _in_the_cache(tmp_path)
    other = tmp_path / "models--other--x" / "blobs"
    other.mkdir(parents=True)
    target = snapshot / "config.json"
    shutil.move(os.path.realpath(target), other / "0")
    target.unlink()
    target.symlink_to(other / "0")
    with pytest.raises(FormatError, match="leaves the folder"):
        HuggingFaceModel(snapshot)


def test_a_link_within_the_folder(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert len(HuggingFaceModel(folder).tensors) == 21


#: name of a tensor -> another (None: gone); what is said
WRONG_TENSORS: dict[str, tuple[dict[str, np.ndarray | None], type[LlamakitError], str]] = {
    "missing": ({"model.norm.weight": None}, FormatError, "tensor model.norm.weight is missing"),
    "no output": ({"lm_head.weight": None}, FormatError, "tensor lm_head.weight is missing"),
    "shape": ({"lm_head.weight": np.zeros((41, 32), "<f4")}, FormatError, r"has shape \[41, 32\] \(expected \[40, 32\]"),
    "flat": ({"lm_head.weight": np.zeros(40 * 32, "<f4")}, FormatError, r"has shape \[1280\]"),
    "unknown": ({"model.x": np.zeros(1, "<f4")}, FormatError, "tensor model.x has no place in a Llama"),
    "unknown and hostile": ({"a\x1b[31m": np.zeros(1, "<f4")}, FormatError, r"tensor a\\x1b\[31m has no place"),
    "one layer more": (
        {"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), "<f4")}, FormatError,
        "model.layers.2.mlp.up_proj.weight has no place in this Llama"),
    "an unexpected bias": (
        {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, "<f4")}, FormatError, "q_proj.bias has no place in this"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str) -> None:
    changes, error, reason = WRONG_TENSORS[name]
    folder = tiny_hf(tmp_path)
    weights = {n: a for n, a in (hf_weights(hf_config()) | changes).items() if a is not None}
    write_weights(folder, weights)
    with pytest.raises(error, match=reason):
        HuggingFaceModel(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path, n_shards=2)
    shutil.copy(folder / SHARD, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match=f"embed_tokens.weight is in {SHARD} already"):
        HuggingFaceModel(folder)


def test_weights_of_an_unknown_type(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path)
    raw = (folder / "model.safetensors").read_bytes()
    for theirs in (b'"U32"', b'"I32"'):
        (folder / "model.safetensors").write_bytes(raw.replace(b'"F32"', theirs))
        with pytest.raises(UnsupportedError, match=rf"is {theirs.decode()[1:-1]} \(expected F32, F16 or BF16\)"):
            HuggingFaceModel(folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        HuggingFaceModel(tmp_path / "missing")
    with pytest.raises(UsageError, match="No such file"):
        HuggingFaceModel(tmp_path)
    folder = tiny_hf(tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(FormatError, match="has no weights") as caught:
        HuggingFaceModel(folder)
    assert "Mistral's own format" in str(caught.value.hint)


def test_pytorch_weights(tmp_path: Path) -> None:
    import torch

    folder = tiny_hf(tmp_path, dtype="bfloat16")
    expected = HuggingFaceModel(folder)
    weights = stored(hf_weights(hf_config()), "bfloat16")
    torch.save({n: torch.from_numpy(a).view(torch.bfloat16) for n, a in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with HuggingFaceModel(folder) as model:
        assert model.files == ["pytorch_model.bin"]
        assert model.tensors.keys() == expected.tensors.keys()
        for name in model.tensors:
            assert model.read(name).tobytes() == expected.read(name).tobytes()
    with open_model(folder / "pytorch_model.bin") as model:
        assert isinstance(model, HuggingFaceModel)


def _mutant(raw: bytes, n_header: int, rng: random.Random) -> bytes:
    """A few bytes of the first n_header changed, removed, doubled or replaced by another JSON value."""
    mutant = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2))):
        place, n = rng.randrange(min(n_header, len(mutant))), rng.randrange(1, 12)
        kind = rng.randrange(4)
        if kind == 0:
            mutant[place] = rng.randrange(256)
        elif kind == 1:
            mutant[place : place + n] = b""
        elif kind == 2:
            mutant[place:place] = mutant[max(0, place - n) : place]
        else:
            values = [m.span() for m in re.finditer(rb'(?<=[:\[,] )("[^"]*"|[-\d.e]+|\w+)', bytes(mutant[:n_header]))]
            if values:
                start, stop = rng.choice(values)
                mutant[start:stop] = rng.choice([b"null", b"-1", b"0", b"1e400", b"[]", b"{}", b'"../x"', b"9" * 40])
    return bytes(mutant)


def test_mutants_are_opened_or_refused(tmp_path: Path) -> None:
    folder, rng = tiny_hf(tmp_path, n_shards=2, rope="llama3", generation_config={"top_k": 3}), random.Random(0)
    sound = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        path, raw = rng.choice(list(sound.items()))
        header = len(raw) if path.suffix == ".json" else 8 + struct.unpack_from("<Q", raw)[0]
        mutant = _mutant(raw, header, rng)
        if header < len(raw):  # a right length lets the header itself be judged
            mutant = struct.pack("<Q", max(0, header - 8 + len(mutant) - len(raw))) + mutant[8:]
        path.write_bytes(mutant)
        try:
            with HuggingFaceModel(folder) as model:
                for name in model.tensors:
                    model.read(name)
            outcomes[True] += 1
        except LlamakitError as error:
            assert error.exit_code == 2
            assert "\n" not in str(error)
            outcomes[False] += 1
        path.write_bytes(raw)
    assert outcomes[False] > 200


def test_an_output_matrix_that_a_tied_model_has_all_the_same(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "m", tied=True)
    weights = hf_weights(json.loads((folder / "config.json").read_text()))
    output = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    write_weights(folder, {**weights, **output})
    with HuggingFaceModel(folder) as model:
        assert np.array_equal(model.read("output.weight"), model.read("token_embd.weight"))
    output["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    output["lm_head.weight"][-1, -1] += 1
    write_weights(folder, {**weights, **output})
    with pytest.raises(FormatError, match=r"lm_head\.weight is another matrix than the embedding") as caught:
        HuggingFaceModel(folder)
    assert "tie_word_embeddings" in str(caught.value.hint)
