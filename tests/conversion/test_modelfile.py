"""Modelfiles: what Ollama reads out of them, and what it would not take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamakit.conversion.modelfile import ModelfileReport, modelfile_text, split_parameter, write_modelfile
from llamakit.errors import FormatError, SaveError, UsageError
from llamakit.formats.base import ModelFile
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_writer import copied_tensor, write_gguf
from llamakit.formats.llama2c import Llama2cFile
from llamakit.formats.open import open_model
from tests.conversion.go import parse_modelfile
from tests.conversion.test_go_template import CHATML, LLAMA2, MISTRAL, PLAIN
from tests.formats.files import llama2c_file
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf

STOPS = [("PARAMETER stop", s) for s in ("<|im_end|>", "<|im_start|>", "</s>")]


@pytest.fixture(autouse=True)
def _templates_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)


def model(jinja: str | None = CHATML, **options: object) -> ModelFile:
    return open_model(cached_tiny_gguf(chat_template=jinja, **options))


def values(report: ModelfileReport, instruction: str) -> list[str]:
    return [value for name, value in parse_modelfile(report.text) if name == instruction]


def test_all_of_it() -> None:
    report = modelfile_text(
        model(),
        "out/my model.gguf",
        system='You "are"\nbrief. ',
        parameters=[("temperature", "0.7"), ("stop", "\nUser:")],
    )
    assert report.template is not None
    assert parse_modelfile(report.text) == [
        ("FROM", "./out/my model.gguf"),
        ("TEMPLATE", report.template.text),
        ("SYSTEM", 'You "are"\nbrief. '),
        *STOPS,
        ("PARAMETER num_ctx", "256"),
        ("PARAMETER temperature", "0.7"),
        ("PARAMETER stop", "\nUser:"),
    ]
    assert report.text.startswith('FROM ./out/my model.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}')
    assert report.notes == ()
    assert (report.create, report.run) == ("ollama create my-model -f Modelfile", "ollama run my-model")


def test_a_template_that_cannot_be_translated() -> None:
    for jinja, reason in ((None, "has no chat template"), ("{{ x", "cannot be rendered"), ("{{ 1 }}", "every message")):
        report = modelfile_text(model(jinja), "m.gguf", system="Hi.")
        assert report.template is None and values(report, "TEMPLATE") == [] and values(report, "SYSTEM") == ["Hi."]
        assert values(report, "PARAMETER stop") == ["</s>"]
        assert "no TEMPLATE" in report.notes[0] and reason in report.notes[0]


def test_a_family_without_a_name_has_a_template_all_the_same() -> None:
    report = modelfile_text(model(PLAIN), "m.gguf")
    assert report.template is not None and values(report, "PARAMETER stop") == ["</s>"]


def test_a_context_and_stops_of_one_s_own() -> None:
    report = modelfile_text(model(), "m.gguf", parameters=[("num_ctx", "64"), ("stop", "</s>"), ("stop", "#")])
    assert values(report, "PARAMETER num_ctx") == ["64"]
    assert values(report, "PARAMETER stop") == ["<|im_end|>", "<|im_start|>", "</s>", "#"]
    long = modelfile_text(model(n_ctx=131072), "m.gguf")
    assert values(long, "PARAMETER num_ctx") == ["131072"] and "num_ctx=8192 takes less" in long.notes[0]


def test_no_system_where_the_model_takes_none() -> None:
    with pytest.raises(UsageError, match="takes no system message"):
        modelfile_text(model(MISTRAL), "m.gguf", system="Hi.")


@pytest.mark.parametrize(
    "text", ["", '"', 'a"', '"a"', '""', 'a """ b', '"""a', 'a"""', "a\r\n\tb\n", " x ", '"\n"', "#\nFROM x\n", "{{ .System }}"]
)  # fmt: skip
def test_system_messages_are_read_as_they_are(text: str) -> None:
    report = modelfile_text(model(LLAMA2), "m.gguf", system=text)
    assert values(report, "SYSTEM") == [text] and values(report, "FROM") == ["./m.gguf"]


@pytest.mark.parametrize("text", ['a"""\nb', '"""\n', 'a""" \t\nb', 'a"""\u200b\nb', 'a"""\rb'])
def test_system_messages_that_a_modelfile_would_cut(text: str) -> None:
    with pytest.raises(UsageError, match="where a Modelfile ends the text"):
        modelfile_text(model(), "m.gguf", system=text)


def test_letters_that_ollama_drops_are_told() -> None:
    report = modelfile_text(model(), "m.gguf", system="a\u3000b\U0001f468\u200d\U0001f469")
    assert report.notes == ("Ollama drops these letters from the system message: U+200D, U+3000",)
    with pytest.raises(UsageError, match="not UTF-8"):
        modelfile_text(model(), "m.gguf", system="\udcff")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_ctx", "4096"), ("num_predict", "-1"), ("temperature", "0"), ("top_p", ".9"), ("min_p", "1e-10"),
        ("use_mmap", "false"), ("seed", "42"), ("stop", 'say "so"'),
    ],
)  # fmt: skip
def test_parameters(key: str, value: str) -> None:
    report = modelfile_text(model(None), "m.gguf", parameters=[split_parameter(f"{key}={value}")])
    assert values(report, f"PARAMETER {key}")[-1] == value


@pytest.mark.parametrize(
    ("key", "value", "reason", "hint"),
    [
        ("temperatur", "1", "no parameter 'temperatur'", "temperature"),
        ("temp", "1", "no parameter 'temp'", "temperature"),
        ("n_predict", "1", "no parameter", "num_predict"),
        ("mirostat", "1", "no parameter", "it knows num_ctx"),
        ("x\x1b[2J", "1", r"no parameter 'x\\x1b", "it knows"),
        ("num_ctx", "4k", "num_ctx is '4k' .expected a whole number", None),
        ("num_ctx", "1\nSYSTEM x", "expected a whole number", None),
        ("temperature", "hot", "expected a number", None),
        ("temperature", "nan", "expected a number", None),
        ("temperature", "1e99", "expected a number", None),
        ("use_mmap", "yes", "expected true or false", None),
        ("stop", "", "expected a text", None),
        ("stop", "a\u200b", "drops what is not printable", None),
        ("stop", 'a"""\nb', "where a Modelfile ends the text", None),
    ],
)
def test_parameters_that_ollama_would_not_take(key: str, value: str, reason: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        modelfile_text(model(None), "m.gguf", parameters=[(key, value)])
    assert hint is None or (caught.value.hint and hint in caught.value.hint)
    assert "\n" not in str(caught.value)


def test_a_parameter_needs_a_value() -> None:
    assert split_parameter("stop=a=b") == ("stop", "a=b")
    with pytest.raises(UsageError, match="KEY=VALUE"):
        split_parameter("temperature")


@pytest.mark.parametrize(
    ("path", "written"),
    [("m.gguf", "./m.gguf"), ("~/m.gguf", "./~/m.gguf"), ('"m".gguf', './"m".gguf'), ("../m.gguf", "../m.gguf"), ("/m", "/m")],
)  # fmt: skip
def test_paths(path: str, written: str) -> None:
    assert values(modelfile_text(model(None), path), "FROM") == [written]
    assert values(modelfile_text(model(None), "m.gguf", adapter_path=path), "ADAPTER") == [written]


@pytest.mark.parametrize("path", ["a\nSYSTEM x", "a\u200bb", "a ", "\udcff"])
def test_paths_that_a_modelfile_cannot_hold(path: str) -> None:
    with pytest.raises(UsageError, match="cannot hold the path"):
        modelfile_text(model(None), path)


def test_an_adapter_is_told_of() -> None:
    report = modelfile_text(model(), "m.gguf", adapter_path="lora.gguf")
    assert any("refuse ADAPTER with a GGUF" in note for note in report.notes)


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("x/Tiny Llama (1).gguf", None, "tiny-llama-1"),
        ("---.gguf", None, "model"),
        ("m.gguf", "me/story:v1", "me/story:v1"),
    ],
)
def test_names(path: str, name: str | None, expected: str) -> None:
    assert modelfile_text(model(None), path, name=name).run == f"ollama run {expected}"


@pytest.mark.parametrize("name", ["", "a b", "-x", "a:", "a;rm", "a\n", "é"])
def test_names_that_ollama_would_not_take(name: str) -> None:
    with pytest.raises(UsageError, match="no name of a model"):
        modelfile_text(model(None), "m.gguf", name=name)


def test_writing(tmp_path: Path) -> None:
    folder = tmp_path / "my files"
    folder.mkdir()
    gguf = tmp_path / "m.gguf"
    report = write_modelfile(folder / "Modelfile", model(), gguf, system="Hi.", parameters=[("seed", "1")], name="m")
    assert (folder / "Modelfile").read_text(encoding="utf-8") == report.text
    assert values(report, "FROM") == [str(gguf)]
    assert report.create == f"ollama create m -f '{folder}/Modelfile'"
    with pytest.raises(SaveError):
        write_modelfile(tmp_path / "no" / "Modelfile", model(), gguf)
    with pytest.raises(UsageError):
        write_modelfile(folder / "Modelfile", model(), gguf, parameters=[("x", "1")])
    assert [p.name for p in folder.iterdir()] == ["Modelfile"]


def test_a_relative_path_starts_at_the_modelfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    report = write_modelfile("out/Modelfile", model(None), "models/m.gguf", adapter_path="a.gguf")
    assert values(report, "FROM") == ["../models/m.gguf"] and values(report, "ADAPTER") == ["../a.gguf"]


def test_what_is_no_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", metadata={"general.type": "adapter"}, tensors=[])
    with GGUFFile(tmp_path / "a.gguf") as file, pytest.raises(UsageError, match="is an adapter"):
        modelfile_text(file, "a.gguf")
    path = llama2c_file(tmp_path / "m.bin")
    with Llama2cFile(path) as file, pytest.raises(FormatError, match="holds no vocabulary"):
        modelfile_text(file, "m.bin")


def test_a_context_that_is_no_number(tmp_path: Path) -> None:
    with GGUFFile(cached_tiny_gguf()) as file:
        metadata = dict(file.metadata) | {"llama.context_length": np.array([1, 2], np.uint32)}
        write_gguf(tmp_path / "m.gguf", metadata=metadata, tensors=[copied_tensor(file, "output_norm.weight")])
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert "num_ctx" not in modelfile_text(file, "m.gguf").text
