"""`llamakit bench` against what llama-bench (of 2026-10) prints for the same options."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from llamakit.cli import compat
from llamakit.cli.bench import _numbers
from llamakit.cli.bench_view import model_type
from llamakit.errors import UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.borrowed import with_metadata
from llamakit.formats.gguf import GGUFFile
from llamakit.inference import limits
from tests.formats.files import llama2c_file
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf

# The first line of llama-bench -o csv.
FIELDS = (
    "build_commit,build_number,cpu_info,gpu_info,backends,model_filename,model_type,model_size,model_n_params,n_batch,"
    "n_ubatch,n_threads,cpu_mask,cpu_strict,poll,type_k,type_v,n_gpu_layers,n_cpu_moe,split_mode,main_gpu,"
    "no_kv_offload,flash_attn,devices,tensor_split,tensor_buft_overrides,load_mode,lazy_mode,embeddings,no_op_offload,"
    "no_host,repack,fit_target,fit_min_ctx,n_prompt,n_gen,n_depth,test_time,avg_ns,stddev_ns,avg_ts,stddev_ts"
)
OURS = "engine,lora,limit_ts,limit_share,read_bandwidth,gemm_peak"
QUICK = ("-p", "8", "-n", "2", "-r", "2")


@pytest.fixture
def model() -> Path:
    return cached_tiny_gguf(n_ctx=64)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "measure_limits", lambda device: limits.Limits(1e9, 1e12))


def test_the_table_is_llama_benchs_and_a_column_more(model: Path, capfd) -> None:
    result = called(capfd, "bench", "-m", model, *QUICK, "-pg", "4,2", "-d", "0,4")
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "| model                          |       size |     params | backend    | threads |            test |"
        "                  t/s | % of limit |"
    )
    assert lines[1] == (
        "| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: |"
        " -------------------: | ---------: |"
    )
    names = [line.split("|")[6].strip() for line in lines[2:8]]
    assert names == ["pp8", "tg2", "pp4+tg2", "pp8 @ d4", "tg2 @ d4", "pp4+tg2 @ d4"]
    assert len({len(line) for line in lines[:8]}) == 1 and "±" in lines[2]
    assert lines[8] == "" and lines[9].startswith("build: llamakit ")


def test_csv_has_llama_benchs_fields_then_ours(model: Path, capfd) -> None:
    text = called(capfd, "bench", "-m", model, *QUICK, "-o", "csv").stdout
    assert text.splitlines()[0] == f"{FIELDS},{OURS}"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [("8", "0"), ("0", "2")]
    assert rows[0]["no_kv_offload"] == "0" and rows[0]["model_filename"] == str(model)
    assert rows[0]["engine"] in ("native", "torch") and rows[0]["read_bandwidth"] == "1000000000"


def test_json_and_jsonl_say_the_same(model: Path, capfd) -> None:
    whole = json.loads(called(capfd, "bench", "-m", model, *QUICK, "-o", "json").stdout)
    lines = [json.loads(x) for x in called(capfd, "bench", "-m", model, *QUICK, "-o", "jsonl").stdout.splitlines()]
    assert [list(row) for row in whole] == [list(row) for row in lines]
    assert list(whole[0]) == [*FIELDS.split(","), *OURS.split(","), "samples_ns", "samples_ts"]
    row, file = whole[0], GGUFFile(model)
    assert row["model_size"] == sum(info.n_bytes for info in file.tensors.values())
    assert row["no_kv_offload"] is False and row["build_number"] == 0 and len(row["samples_ns"]) == 2
    assert row["avg_ns"] == sum(row["samples_ns"]) // 2
    assert row["limit_share"] == pytest.approx(row["avg_ts"] / row["limit_ts"], rel=1e-3)


def test_sql_makes_a_table(model: Path, capfd) -> None:
    text = called(capfd, "bench", "-m", model, *QUICK, "-o", "sql").stdout
    with sqlite3.connect(":memory:") as database:
        database.executescript(text)
        rows = database.execute("SELECT n_prompt, n_gen, typeof(avg_ts), model_type FROM llama_bench").fetchall()
    assert [row[:3] for row in rows] == [(8, 0, "real"), (0, 2, "real")]


def test_the_other_stream_and_what_is_running(model: Path, capfd) -> None:
    result = called(capfd, "bench", "-m", model, *QUICK, "-o", "jsonl", "-oe", "md", "--progress", "-v")
    assert [json.loads(line)["n_gen"] for line in result.stdout.splitlines()] == [0, 2]
    assert " t/s |" in result.stderr and "bench: " in result.stderr
    assert "pp8: warmup" in result.stderr and "tg2: run 2/2" in result.stderr
    assert "limits: 1.0 GB/s, 1000 GFLOP/s" in result.stderr


def test_several_models_and_what_an_adapter_costs(model: Path, tmp_path: Path, capfd) -> None:
    lora = tmp_path / "lora.gguf"
    a, b = np.zeros((4, 64), np.float32), np.zeros((64, 4), np.float32)
    write_adapter(lora, Adapter(4.0, {"blk.0.attn_q.weight": (a, b)}), GGUFFile(model))
    other = llama2c_file(tmp_path / "m.bin")  # no vocabulary is asked for
    both = called(capfd, "bench", "-m", f"{model},{other}", *QUICK, "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["model_filename"] for line in both] == [str(model)] * 2 + [str(other)] * 2
    text = called(capfd, "bench", "-m", model, *QUICK, "--lora", lora, "--lora-scaled", f"{lora}:0.5", "-b", "4").stdout
    assert "lora" in text.splitlines()[0] and "n_batch" in text.splitlines()[0]
    assert f"{lora},{lora}:0.5" in text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("512", (512,)),
        ("1,2,4", (1, 2, 4)),
        ("1-4", (1, 2, 3, 4)),
        ("10-40+10", (10, 20, 30, 40)),
        ("1-8*2,5", (1, 2, 4, 8, 5)),
        ("5-4", ()),
        ("0", (0,)),
    ],
)
def test_numbers_are_read_as_llama_bench_reads_them(text: str, numbers: tuple[int, ...]) -> None:
    assert _numbers("-p", [text], (7,)) == numbers
    assert _numbers("-p", [text, "3"], (7,)) == (*numbers, 3)
    assert _numbers("-p", None, (7,)) == (7,)


@pytest.mark.parametrize("text", ["", "x", "-1", "1-", "1-8*1", "1-8+0", "0-4*2", "1-999999999", "1,,2", "9" * 12])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="-p"):
        _numbers("-p", [text], ())


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("-p", "0", "-n", "0"), "nothing is left to measure"),
        (("-pg", "1,2,3"), "-pg is '1,2,3'"),
        (("-r", "0"), "-r is 0"),
        (("-o", "xml"), "-o"),
        (("-ctk", "q8_0"), "-ctk q8_0 is not supported"),
        (("-m", "none.gguf"), "none.gguf"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], fragment: str, model: Path, capfd) -> None:
    result = called(capfd, "bench", *(words if "-m" in words else ("-m", model, *words)))
    assert_error(result, 2, fragment)
    assert not result.stdout


def test_options_of_offloading() -> None:
    places = "-ngl 99 -sm none -mg 0 -ts 1/1 -nkvo 0"
    words, notes = compat.rewrite(shlex.split(f"bench -m m {places} -fa 1 -ctk f16 -ctv f16 -mmp 0 -C 0x0 -t 1,2"))
    assert shlex.join(words) == "bench -m m --device auto -t 1,2"
    assert len(notes) == 10 and all(kind == "note" for kind, _ in notes)
    for words in ("-nkvo 1", "-embd 1", "-C 0x3", "--prio 2", "-ot a=b", "-rpc a", "-ctv q4_0", "--list-devices"):
        with pytest.raises(UnsupportedError, match=words.split()[0]):
            compat.rewrite(["bench", "-m", "m", *words.split()])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"general.size_label": "135M", "general.file_type": 15}, "llama 135M Q4_K - Medium"),
        ({"general.size_label": "1B", "general.file_type": 7}, "llama 1B Q8_0"),
        ({"general.size_label": "8B", "general.file_type": 0}, "llama 8B all F32"),
        ({"general.size_label": "8B", "general.file_type": 27}, "llama 8B IQ3_S mix - 3.66 bpw"),
        ({"general.size_label": "8B", "general.file_type": 99}, "llama 8B unknown, may not work"),
        ({"general.size_label": 7, "general.file_type": 11 | 1024}, "llama 127K (guessed) Q3_K - Small"),
    ],
)
def test_what_a_model_is_called(metadata: dict, expected: str, model: Path) -> None:
    assert model_type(with_metadata(GGUFFile(model), metadata)) == expected
