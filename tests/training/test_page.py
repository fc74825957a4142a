"""report.html needs nothing else, shows what it should, and takes nothing in it for HTML."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import SaveError
from llamakit.training.curves import read_curves
from llamakit.training.page import report_html, write_report
from llamakit.training.report import Sample
from llamakit.training.summary import RunFile, RunSummary, run_files, summary_json
from tests.training.curve_files import step_line, write_lines, write_run

EVIL = "</pre></title><script>alert(1)</script><img src=x onerror='a()'>&amp;\"\x00\x1b[31m\u202e"
VOID = {"meta"}


class Tree(html.parser.HTMLParser):
    """Tags, in pairs, and the text of each kind of tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (self.open[-3:], tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data


def summary_of(tmp_path: Path, **more: Any) -> RunSummary:
    values: dict[str, Any] = {
        "title": "llamakit train: small",
        "command": "llamakit train --train-data 'a b.txt'",
        "outcome": "all iterations are done",
        "started": "2026-01-02 03:04",
        "duration_s": 75.2,
        "model": {"parameters": 15191712},
        "data": {"training tokens": 1000, "path": Path("text.txt")},
        "results": {"share of the peak": 0.4123456789},
        "settings": {"n_layer": 6, "dropout": 0.0, "compile": False, "betas": (0.9, 0.95), "vocab": None},
        "changed": frozenset({"n_layer"}),
        "curves": read_curves(write_run(tmp_path / "run")),
        "samples": [
            Sample(0, "Once", "xq zv"),
            Sample(50, "Once", "the"),
            Sample(100, "Once", "a time"),
        ],
        "perplexity_before": 32000.4,
        "perplexity_after": 9.2931,
        "files": [RunFile("model.gguf", 60_812_345), RunFile("data/", 812)],
        "machine": {"processor": "P 5", "cores": 2},
        "remarks": ["a remark"],
    }
    return RunSummary(**{**values, **more})


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    tree = Tree(report_html(summary_of(tmp_path)))
    assert not tree.open
    assert tree.texts["h1"] == ["llamakit train: small"] == tree.texts["title"][:1]
    assert tree.texts["h2"] == ["Curves", "Samples", "Do it again", "Results", "Model", "Data", "Settings", "Files",
                                "Machine"]  # fmt: skip
    tiles = [tree.texts["b"][i] for i in range(6)]
    assert tiles == ["32,000 → 9.29", "2.0000", "1.0000", "100", "4,050", "1 min 15 s"]
    assert tree.texts["pre"] == ["xq zv", "the", "a time", "llamakit train --train-data 'a b.txt'"]
    assert tree.texts["h3"] == ["Once"] and "a remark" in tree.texts["li"]
    rows = [text for text in tree.texts["tr"] if text]
    for row in ("parameters15,191,712", "pathtext.txt", "share of the peak0.412346", "compileno", "betas0.9, 0.95",
                "vocab-", "model.gguf61 MB", "data/812 B", "processorP 5"):  # fmt: skip
        assert row in rows
    assert ("tr", {"class": "changed"}) in tree.tags
    assert "4 at their defaults" in tree.texts["summary"]


def test_the_curves_are_in_it(tmp_path: Path) -> None:
    tree = Tree(report_html(summary_of(tmp_path)))
    drawings = [attributes for tag, attributes in tree.tags if tag == "svg"]
    names = ["loss by step", "learning rate by step", "tokens per second by step"]
    assert [attributes["aria-label"] for attributes in drawings] == names
    lines = {at["class"]: at["d"] or "" for tag, at in tree.tags if tag == "path" and at["class"] in ("valid", "raw")}
    assert lines["valid"].count("L") == 4 and lines["raw"].count("L") >= 99
    points = [at for tag, at in tree.tags if tag == "circle"]
    assert len(points) == 5 and float(points[0]["cy"] or 0) != float(points[2]["cy"] or 0)
    assert "step 60: 2.0000" in tree.texts["title"]
    for coordinate in re.findall(r"[\d.]+", "".join(lines.values())):
        assert 0 <= float(coordinate) <= 1000


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = report_html(summary_of(tmp_path))
    tree = Tree(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tree.tags}
    assert not any(key in ("src", "href", "style") or key.startswith("on") for _, at in tree.tags for key in at)
    assert "://" not in page and "url(" not in page and "@import" not in page
    metas = [at for tag, at in tree.tags if tag == "meta"]
    assert any("default-src 'none'" in (at.get("content") or "") for at in metas)
    assert any(at.get("name") == "viewport" for at in metas)
    assert "prefers-color-scheme:dark" in page and "color-scheme:light dark" in page


def test_nothing_in_it_is_taken_for_html(tmp_path: Path) -> None:
    """Every text of a summary, at once."""
    facts = {EVIL: EVIL, "list": [EVIL], "table": {EVIL: EVIL}, "path": Path(EVIL.replace("\0", ""))}
    curves = read_curves(write_run(tmp_path / "run <b>"))
    page = report_html(
        RunSummary(
            title=EVIL, command=EVIL, outcome=EVIL, started=EVIL, model=facts, data=facts, results=facts,
            settings=facts, changed=frozenset({EVIL}), curves=curves, machine=facts, remarks=[EVIL],
            samples=[Sample(i, EVIL, EVIL) for i in range(5)], files=[RunFile(EVIL, 1)],
        )
    )  # fmt: skip
    tree = Tree(page)
    assert not tree.open
    assert not {"script", "img"} & {tag for tag, _ in tree.tags}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    shown = EVIL.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert tree.texts["h1"] == [shown] and set(tree.texts["pre"]) == {shown}
    page.encode("utf-8")


def test_lone_surrogates_and_lines_of_a_sample(tmp_path: Path) -> None:
    text = "one\r\n\ttwo\n\ud800ไทย"
    page = report_html(summary_of(tmp_path, samples=[Sample(1, "", text)]))
    assert "<pre>one\n\ttwo\n\\ud800ไทย</pre>" in page and "<span>after 1 step</span>" in page and "(no prompt)" in page
    assert json.loads(json.dumps(summary_json(summary_of(tmp_path))))["samples"][1] == {
        "step": 50,
        "prompt": "Once",
        "text": "the",
    }


def test_many_samples_are_folded(tmp_path: Path) -> None:
    tree = Tree(report_html(summary_of(tmp_path, samples=[Sample(i, "p", f"text {i}") for i in range(10)])))
    assert tree.texts["pre"][:2] == ["text 0", "text 9"] and "8 between them" in tree.texts["summary"]


def test_an_empty_summary_and_a_short_run(tmp_path: Path) -> None:
    page = report_html(RunSummary(title="t", command="c"))
    assert Tree(page).texts["h2"] == ["Do it again"] and "<svg" not in page
    one = read_curves(write_lines(tmp_path / "one", [step_line(1)]))
    assert "<circle" in report_html(RunSummary(title="t", command="c", curves=one))
    none = read_curves(write_lines(tmp_path / "none", [step_line(1, loss=None, lr=None, tok_per_s=None)]))
    assert "<svg" not in report_html(RunSummary(title="t", command="c", curves=none))
    bad = report_html(RunSummary(title="t", command="c", perplexity_before=float("inf"), perplexity_after=float("nan")))
    assert "not finite → not finite" in bad


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "run", 8000, every=200))
    assert len(report_html(RunSummary(title="t", command="c", curves=curves))) < 150_000


def test_both_files_are_written(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, results={"loss": float("inf"), "folder": Path("a"), "device": EVIL})
    (tmp_path / "report.html").write_text("old")
    page, data = write_report(summary, tmp_path)
    assert page.read_text(encoding="utf-8") == report_html(summary) + "\n"
    read = json.loads(data.read_text(encoding="ascii"))
    assert read["results"] == {"loss": None, "folder": "a", "device": EVIL}
    assert read["settings"]["betas"] == [0.9, 0.95] and read["changed"] == ["n_layer"]
    assert read["perplexity"] == {"before": 32000.4, "after": 9.2931}
    assert read["curves"]["best_step"] == 60 and len(read["curves"]["steps"]["loss"]) == 100
    assert read["files"][0] == {"name": "model.gguf", "bytes": 60_812_345}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "run"]
    with pytest.raises(SaveError):
        write_report(summary, tmp_path / "none")


def test_the_files_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    for name, size in (("b.bin", 5), ("a.gguf", 7), (".a.gguf.lock", 1), ("data/x", 3), ("data/more/y", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert run_files(tmp_path) == (RunFile("a.gguf", 7), RunFile("b.bin", 5), RunFile("data/", 7))
