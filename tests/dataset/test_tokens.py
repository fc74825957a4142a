from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.dataset.tokens import (
    check_ids,
    check_vocabulary,
    hash_tokens,
    holds_tokens,
    open_tokens,
    verify_tokens,
)
from llamakit.errors import DataError, FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.stamps import vocabulary_stamp
from llamakit.formats.vocabulary import vocabulary_only
from tests.dataset.token_folders import BOS, documents, llama2c_windows, tiny_vocabulary, write_folder
from tests.tiny import cached_tiny_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "data"
    write_folder(path, documents(200), shard_tokens=2000)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_what_was_written_is_read(folder: Path) -> None:
    data = open_tokens(folder)
    assert holds_tokens(folder)
    assert (data.n_vocab, data.bos) == (len(tiny_vocabulary()["tokenizer.ggml.tokens"]), BOS)
    assert data.vocabulary_file == folder / "vocab.gguf"
    assert data.train.n_documents + data.validation.n_documents == 200
    assert data.train.n_bytes == 2 * (data.train.n_tokens - data.train.n_documents)
    assert len(data.train.shards) == 3 and len(data.validation.shards) == 1
    written = {tuple(text) for text in documents(200)}
    read = set()
    for split in (data.train, data.validation):
        for shard, bounds in zip(split.shards, split.bounds, strict=True):
            assert (shard[bounds] == BOS).all()
            read |= {tuple(part[1:]) for part in np.split(np.asarray(shard, np.int64), bounds[1:])}
        assert hash_tokens(split) == split.sha256
    assert read == written
    verify_tokens(data)


def test_shards_are_of_about_the_same_size(folder: Path) -> None:
    sizes = [len(shard) for shard in open_tokens(folder).train.shards]
    assert max(sizes) - min(sizes) < 120


def test_llama2c_reads_it_as_it_is(folder: Path) -> None:
    data = open_tokens(folder)
    for split, name in ((data.train, "train"), (data.validation, "val")):
        windows = llama2c_windows(folder, name, 32)
        assert len(windows) == sum(len(shard) // 32 - 1 for shard in split.shards) > 10
        assert np.array_equal(windows[0], split.shards[0][:33])
        assert np.array_equal(windows[-1][:-1], split.shards[-1][32 * (len(split.shards[-1]) // 32 - 2) :][:32])


def test_the_held_out_share_is_kept_and_drawn_by_the_seed(tmp_path: Path) -> None:
    texts = documents(500)
    for seed in (1, 1, 2):
        write_folder(tmp_path / f"seed{seed}", texts, seed=seed) if not (tmp_path / f"seed{seed}").exists() else None
    one, two = (open_tokens(tmp_path / f"seed{seed}") for seed in (1, 2))
    for data in (one, two):
        total = data.train.n_tokens + data.validation.n_tokens
        assert 0.09 * total < data.validation.n_tokens <= 0.1 * total
    assert one.validation.sha256 != two.validation.sha256


def test_without_a_validation_there_is_no_first_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", documents(20), val_split=0)
    data = open_tokens(tmp_path / "data")
    assert data.validation.shards == () and data.validation.n_tokens == 0
    assert sorted(p.name for p in (tmp_path / "data").glob("*.bin")) == ["data01.bin"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_few_documents_one_is_held_out_and_one_is_kept(tmp_path: Path, count: int) -> None:
    texts = documents(count)
    write_folder(tmp_path / "data", texts, val_split=0.01)
    data = open_tokens(tmp_path / "data")
    assert (data.validation.n_documents, data.train.n_documents) == (1, count - 1)
    assert data.validation.n_tokens == min(map(len, texts)) + 1


def test_no_document_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one document"):
        write_folder(tmp_path / "data", [])
    assert list(tmp_path.iterdir()) == []


def test_a_large_vocabulary_needs_four_bytes(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", documents(20, n_vocab=100_000), dtype="uint32")
    data = open_tokens(tmp_path / "data")
    assert data.train.shards[0].dtype == np.uint32
    with pytest.raises(MismatchError, match=r"data01\.bin: token \d+ is \d+, the vocabulary has"):
        check_ids(data, 300)


def test_a_folder_of_llama2c(tmp_path: Path) -> None:
    for name, seed in (("data02.bin", 3), ("data00.bin", 1), ("data01.bin", 2)):
        texts = [np.concatenate([[BOS], text]) for text in documents(30, seed)]
        np.concatenate(texts).astype("<u2").tofile(tmp_path / name)
    data = open_tokens(tmp_path)
    assert (data.n_vocab, data.bos, data.vocabulary, data.vocabulary_file) == (None, BOS, "", None)
    assert (data.validation.n_documents, data.train.n_documents) == (30, 60)
    assert np.array_equal(data.validation.shards[0][1:5], documents(30, 1)[0][:4])
    assert data.train.n_bytes is None and data.train.sha256 is None
    check_vocabulary(data, tiny_vocabulary(), "model.gguf")
    with pytest.raises(MismatchError, match=r"data0\d\.bin: token"):
        check_ids(data, 200)


def test_a_folder_of_nanogpt(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(100, dtype="<u2").tofile(tmp_path / "val.bin")
    data = open_tokens(tmp_path)
    assert (data.train.n_tokens, data.validation.n_tokens, data.bos) == (1000, 100, None)


def test_a_bare_file_gives_its_end_away(tmp_path: Path) -> None:
    texts = [np.concatenate([[BOS], text]) for text in documents(300)]
    tokens = np.concatenate(texts).astype("<u2")
    tokens.tofile(tmp_path / "t.bin")
    data = open_tokens(tmp_path / "t.bin")
    assert np.array_equal(np.concatenate([data.train.shards[0], data.validation.shards[0]]), tokens)
    assert data.validation.shards[0][0] == BOS
    assert data.train.n_documents + data.validation.n_documents == 300
    assert 0.03 * len(tokens) < data.validation.n_tokens <= 0.05 * len(tokens)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(FormatError, match=r"odd\.bin: has 3 bytes, no whole number of uint16"):
        open_tokens(tmp_path / "odd.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(tmp_path / "empty.bin")
    with pytest.raises(UsageError, match="cannot be read"):
        open_tokens(tmp_path / "none.bin")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(tmp_path / "bare")


def test_another_tokenizer_is_refused(folder: Path) -> None:
    data = open_tokens(folder)
    check_vocabulary(data, tiny_vocabulary(), "model.gguf")
    other = vocabulary_only(cached_tiny_gguf(tokenizer="bpe"))
    with pytest.raises(MismatchError, match="another tokenizer") as caught:
        check_vocabulary(data, other, "other.gguf")
    assert "\n" not in str(caught.value) and "other.gguf" in str(caught.value)
    assert caught.value.hint is not None and "--vocab-model other.gguf" in caught.value.hint


def test_the_stamp_is_of_what_decides_ids() -> None:
    vocabulary = tiny_vocabulary()
    stamp = vocabulary_stamp(vocabulary)
    tokens = list(vocabulary["tokenizer.ggml.tokens"])
    scores = np.array(vocabulary["tokenizer.ggml.scores"])
    for change in (
        {"tokenizer.ggml.tokens": [*tokens[:-1], "other"]},
        {"tokenizer.ggml.scores": -scores},
        {"tokenizer.ggml.bos_token_id": 2},
        {"tokenizer.ggml.eos_token_id": 1},
        {"tokenizer.ggml.add_space_prefix": False},
        {"tokenizer.ggml.token_type": np.ones(len(tokens), np.int32)},
    ):
        assert vocabulary_stamp({**vocabulary, **change}) != stamp
    for same in ({"tokenizer.ggml.scores": scores * 2}, {"tokenizer.chat_template": "x"}):
        assert vocabulary_stamp({**vocabulary, **same}) == stamp


def _damage(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    index.update(changes)
    (folder / "index.json").write_text(json.dumps(index))


def test_damage_is_named(copy: Path) -> None:
    shard = copy / "data01.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(FormatError, match=rf"data01\.bin: was cut off: it has {len(whole) - 2} bytes"):
        open_tokens(copy)
    shard.write_bytes(whole + b"\0\0")
    with pytest.raises(FormatError, match="has grown"):
        open_tokens(copy)
    shard.write_bytes(whole[:40] + b"\x05\x01" + whole[42:])
    with pytest.raises(FormatError, match="the training tokens are not those that were written"):
        verify_tokens(open_tokens(copy))
    shard.write_bytes(b"\x09\0" + whole[2:])
    with pytest.raises(FormatError, match=r"data01\.bin@0: document 0 starts with token 9"):
        verify_tokens(open_tokens(copy))
    shard.unlink()
    with pytest.raises(UsageError, match=r"data01\.bin: cannot be read: No such file"):
        open_tokens(copy)


def test_damaged_bounds_are_named(copy: Path) -> None:
    path = copy / "data01.bounds"
    bounds = np.fromfile(path, "<i8")
    for at, value in ((0, 5), (3, 0), (len(bounds) - 1, 1 << 40), (2, -7)):
        wrong = bounds.copy()
        wrong[at] = value
        wrong.tofile(path)
        with pytest.raises(FormatError, match=r"data01\.bounds@\d+: document \d+ starts at"):
            open_tokens(copy)
    bounds[:-1].tofile(path)
    with pytest.raises(FormatError, match=r"data01\.bounds: has \d+ bytes \(expected"):
        open_tokens(copy)


def test_another_vocabulary_in_the_folder(copy: Path) -> None:
    shutil.copy(cached_tiny_gguf(tokenizer="bpe"), copy / "vocab.gguf")
    with pytest.raises(FormatError, match=r"vocab\.gguf: is not the vocabulary of these tokens"):
        open_tokens(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "is of version 2"),
        ({"version": True}, "'version' is True"),
        ({"format": "other"}, "'format' is 'other'"),
        ({"dtype": "float32"}, "'dtype' is 'float32'"),
        ({"n_vocab": 70000}, "'n_vocab' is 70000"),
        ({"bos": -1}, "'bos' is -1"),
        ({"vocabulary": "abc"}, "'vocabulary' is 'abc'"),
        ({"shards": []}, "'shards' names 0 files"),
        ({"shards": [1]}, r"'shards\[0\]' is 1"),
        ({"shards": {}}, "'shards' is {}"),
        ({"sha256": {}}, "'sha256.train' is missing"),
    ],
)
def test_a_wrong_index_names_the_key(copy: Path, changes: dict[str, Any], reason: str) -> None:
    _damage(copy, **changes)
    with pytest.raises((FormatError, UnsupportedError), match=rf"index\.json: .*{reason}|index\.json: {reason}"):
        open_tokens(copy)


@pytest.mark.parametrize("name", ["../data01.bin", "/etc/passwd", "", ".", "a\0b", 7])
def test_a_name_cannot_leave_the_folder(copy: Path, name: Any) -> None:
    for key in ("file", "bounds"):
        index = json.loads((copy / "index.json").read_text())
        index["shards"][1][key] = name
        _damage(copy, shards=index["shards"])
        with pytest.raises(FormatError):
            open_tokens(copy)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_the_index_is_an_error_or_harmless(folder: Path, data: st.DataObject) -> None:
    index = json.loads((folder / "index.json").read_text())
    target: Any = index
    if data.draw(st.booleans()):
        target = data.draw(st.sampled_from([index["shards"][0], index["shards"][-1], index["sha256"]]))
    key = data.draw(st.sampled_from(sorted(target)))
    target[key] = data.draw(_JSON)
    path = folder.parent / "hostile"
    path.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "index.json" and not (path / file.name).exists():
            shutil.copy(file, path)
    (path / "index.json").write_text(json.dumps(index))
    try:
        opened = open_tokens(path)
    except LlamakitError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert opened.train.n_tokens == sum(map(len, opened.train.shards)) > 0


@settings(max_examples=40, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_index(folder: Path, raw: bytes) -> None:
    path = folder.parent / "bytes"
    path.mkdir(exist_ok=True)
    (path / "index.json").write_bytes(raw)
    with pytest.raises(LlamakitError):
        open_tokens(path)
