"""`make prove`: every test there is, campaigns and comparisons included; the result goes to docs/proof.md.

    python scripts/prove.py [--failed] [AREA ...]

It goes area by area, an area being a folder of tests, and writes the page after each: what an interrupted run has
proven stays, and `make prove AREAS="formats quant"` proves those again; with `AREAS="--failed quant"` the tests of it
that failed, and the page says so. The results lie in build/proof. A test tells
its figures with pytest's `record_property("mutants", 3000)`; they stand beside its area.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "proof.md"
RESULTS = ROOT / "build" / "proof"
#: the tests that lie in no folder
OTHERS = "others"
_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "xllamacpp", "transformers", "peft")
_LIMIT_S = 60 * 60


@dataclass
class Area:
    """The last results of a folder of tests. failed: names of tests; figures: test name -> what it recorded;
    clock_s, processor_s, machine_s: seconds by the clock, of its processors, of all programs' processors. again: which
    failed tests were run once more, with what result, when and at which commit, a line each time."""

    counts: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, str]] = field(default_factory=dict)
    clock_s: float = 0.0
    processor_s: float = 0.0
    machine_s: float = 0.0
    date: str = ""
    commit: str = ""
    machine: str = ""
    again: list[str] = field(default_factory=list)


def main() -> int:
    """Run pytest on each area, write the page after each, and exit with 1 where a test failed."""
    known = area_paths(ROOT / "tests")
    once_more = sys.argv[1:2] == ["--failed"]
    wanted = sys.argv[1 + once_more :] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"error: no area {unknown[0]!r} (there are: {', '.join(known)})", file=sys.stderr)
        return 2
    proven = {name: area for name in known if (area := stored(name)) is not None}
    for name in wanted:
        print(f"proving {name}", flush=True)
        proven[name] = run_failed(proven[name], ROOT) if once_more and name in proven else run(known[name])
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(vars(proven[name]), indent=1), encoding="utf-8")
        PAGE.write_text(page({name: proven[name] for name in known if name in proven}, list(known)), encoding="utf-8")
    failed = sum(len(proven[name].failed) for name in wanted)
    print(f"wrote {PAGE.relative_to(ROOT)}" + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def area_paths(tests: Path) -> dict[str, list[Path]]:
    """Area -> what pytest is given for it."""
    folders = sorted(path for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py")))
    others = sorted(tests.glob("test_*.py"))
    return {path.name: [path] for path in folders} | ({OTHERS: others} if others else {})


def stored(name: str) -> Area | None:
    """The result of an earlier run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Area(**{**fields, "counts": Counter(fields["counts"]), "skips": Counter(fields["skips"])})


def run(paths: Sequence[Path]) -> Area:
    """Every test of an area."""
    started, used_s, busy_s = time.monotonic(), _used_s(), _busy_s()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The empty marker expression overrides the default one, which leaves the long tests out.
        command = [sys.executable, "-m", "pytest", "-m", "", f"--junit-xml={report}", "-o", "junit_family=xunit1"]
        code = subprocess.run([*command, *map(str, paths)], cwd=ROOT, check=False).returncode
        area = read_report(report) if report.exists() else Area()
    if code and not area.failed:
        area.failed.append(f"pytest ended with code {code}")
    area.clock_s, area.processor_s = time.monotonic() - started, _used_s() - used_s
    area.machine_s = _busy_s() - busy_s
    area.date, area.commit, area.machine = f"{datetime.now(UTC):%Y-%m-%d %H:%M}", _commit(), _machine()
    return area


def run_failed(area: Area, root: Path) -> Area:
    """The tests of an area that failed, once more; what has passed since, and is as it was, stays."""
    ids = [node_id(test, root) for test in area.failed]
    if not ids:
        return area
    new = run([root / id for id in ids])
    for outcome in ("failure", "error"):
        area.counts[outcome] = 0
    area.counts += new.counts
    area.failed, area.figures = new.failed, area.figures | new.figures
    area.clock_s += new.clock_s
    area.processor_s += new.processor_s
    area.machine_s += new.machine_s
    area.again.append(f"{len(ids)} that had failed once more at {new.commit}, {new.date}: {_counted(new.counts)}")
    return area


def node_id(test: str, root: Path) -> str:
    """`tests.quant.test_a.test_b[x.y]` -> `tests/quant/test_a.py::test_b[x.y]`, as pytest takes it."""
    dotted, bracket, parameters = test.partition("[")
    names = dotted.split(".")
    n_path = next(n for n in range(1, len(names)) if (root / Path(*names[:n])).with_suffix(".py").is_file())
    inside = "::".join(names[n_path:]) + bracket + parameters
    return f"{Path(*names[:n_path])}.py::{inside}"


def read_report(path: Path) -> Area:
    """JUnit's XML as an area."""
    area = Area()
    for case in ET.parse(path).iter("testcase"):
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        area.counts[outcome] += 1
        skipped = case.find("skipped")
        if skipped is not None:
            area.skips[(skipped.get("message") or "").strip()] += 1
        if outcome in ("failure", "error"):
            area.failed.append(f"{case.get('classname') or 'tests'}.{case.get('name') or '?'}")
        figures = {p.get("name") or "": p.get("value") or "" for p in case.iter("property")}
        if figures:
            area.figures[case.get("name") or "?"] = figures
    return area


def page(areas: Mapping[str, Area], known: Sequence[str]) -> str:
    """The whole of docs/proof.md. known: every area that there is."""
    totals: Counter[str] = sum((area.counts for area in areas.values()), Counter())
    missing = [name for name in known if name not in areas]
    failed = sum(len(area.failed) for area in areas.values())
    result = f"FAILED ({failed})" if failed else "all passed"
    lines = [
        "# What was proven, when and where",
        "",
        "The last run of `make prove`, which writes this page: all tests, the kill and fuzz campaigns and the",
        "comparisons with llama.cpp, transformers and PEFT included. It goes area by area, a folder of tests each.",
        "",
        f"- result: {result}: {_counted(totals)}",
        *([f"- not proven: {', '.join(missing)}"] if missing else []),
        f"- duration: {_duration(list(areas.values()))}",
        f"- machine: {'; '.join(sorted({area.machine for area in areas.values()}))}",
        f"- packages: {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        "",
        "| area | passed | failed | skipped | minutes | of processors | date (UTC) | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, area in areas.items():
        lines.append(
            f"| {name} | {area.counts['passed']} | {len(area.failed)} | {area.counts['skipped']} "
            f"| {area.clock_s / 60:.1f} | {area.processor_s / 60:.1f} | {area.date} | {area.commit} |"
        )
    return "\n".join([*lines, *_again(areas), *_failures(areas), *_figures(areas), *_skips(areas)]) + "\n"


def _duration(areas: Sequence[Area]) -> str:
    """In minutes, and how much of the machine others had."""
    clock, processor = sum(area.clock_s for area in areas), sum(area.processor_s for area in areas)
    machine = sum(area.machine_s for area in areas)
    over = "" if clock <= _LIMIT_S else ", which is over the limit of 60"
    line = f"{clock / 60:.1f} minutes{over}, {processor / 60:.1f} minutes of processor time"
    others = 1 - processor / machine if machine else 0.0
    if others < 0.1:
        return line
    return f"{line}; the machine was shared: other programs took {others:.0%} of the processor time that it gave"


def _again(areas: Mapping[str, Area]) -> list[str]:
    rows = [f"- {name}: {line}" for name, area in areas.items() for line in area.again]
    return ["", *rows] if rows else []


def _failures(areas: Mapping[str, Area]) -> list[str]:
    rows = [f"- `{test}`" for area in areas.values() for test in area.failed]
    return ["", "## What failed", "", *rows] if rows else []


def _figures(areas: Mapping[str, Area]) -> list[str]:
    rows = [
        f"| {name} | `{test}` | {', '.join(f'{key} = {value}' for key, value in figures.items())} |"
        for name, area in areas.items()
        for test, figures in area.figures.items()
    ]
    return ["", "## Figures", "", "| area | test | measured |", "|---|---|---|", *rows] if rows else []


def _skips(areas: Mapping[str, Area]) -> list[str]:
    rows = [
        f"- {name}: {count} x {reason}" for name, area in areas.items() for reason, count in sorted(area.skips.items())
    ]
    return ["", "## What was left out, and why", "", *rows] if rows else []


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[key]} {word}" for key, word in
                     (("passed", "passed"), ("failure", "failed"), ("error", "errors"), ("skipped", "skipped"))
                     if counts[key] or key == "passed")  # fmt: skip


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    others = [line for line in git("status", "--porcelain").splitlines() if not line.endswith("docs/proof.md")]
    return (head or "unknown") + (" and changes" if head and others else "")


def _machine() -> str:
    """Processor, cores, memory, system and Python."""
    return (
        f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB memory, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}"
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _used_s() -> float:
    """Processor time of the programs that this one has started and that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy_s() -> float:
    """Processor time that all programs have taken since the machine started, in seconds; 0 where nobody tells."""
    try:
        user, nice, system, _idle, _wait, *interrupts = (
            Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:8]
        )
    except (OSError, ValueError):
        return 0.0
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    sys.exit(main())
