"""`make prove`: every test there is, campaigns and comparisons included; the result goes to docs/proof.md.

A test tells its figures with pytest's `record_property("mutants", 3000)`; they stand beside its area.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "proof.md"
_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "xllamacpp", "transformers", "peft")
_LIMIT_S = 60 * 60


@dataclass
class Area:
    """The results of one folder of tests. figures: test name -> what it recorded."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    skips: Counter[str] = field(default_factory=Counter)
    figures: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Seconds of a run: by the clock, of processors, and of processors for all programs of the machine together."""

    clock: float
    processor: float
    machine: float = 0.0

    def told(self) -> str:
        """In minutes, and how much of the machine others had."""
        over = "" if self.clock <= _LIMIT_S else ", which is over the limit of 60"
        line = f"{self.clock / 60:.1f} minutes{over}, {self.processor / 60:.1f} minutes of processor time"
        others = 1 - self.processor / self.machine if self.machine else 0.0
        if others < 0.1:
            return line
        return f"{line}; the machine was shared: other programs took {others:.0%} of the processor time that it gave"


def main() -> int:
    """Run pytest, write the page, and give pytest's exit code."""
    started, busy_s = time.monotonic(), _busy_s()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The empty marker expression overrides the default one, which leaves the long tests out.
        command = [sys.executable, "-m", "pytest", "-m", "", f"--junit-xml={report}", "-o", "junit_family=xunit1"]
        command += ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]  # as in `make test`
        code = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, check=False).returncode
        if not report.exists():
            print("error: pytest wrote no report", file=sys.stderr)
            return code or 1
        areas = read_report(report)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = Times(time.monotonic() - started, used.ru_utime + used.ru_stime, _busy_s() - busy_s)
    PAGE.write_text(page(areas, times, code), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return code


def read_report(path: Path) -> dict[str, Area]:
    """JUnit's XML as areas: `tests.formats.test_open` belongs to `formats`, `tests.test_ggml` to `test_ggml`."""
    areas: dict[str, Area] = defaultdict(Area)
    for case in ET.parse(path).iter("testcase"):
        parts = (case.get("classname") or "tests").split(".")
        area = areas[parts[1] if len(parts) > 1 else parts[0]]
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        area.counts[outcome] += 1
        area.seconds += float(case.get("time") or 0)
        if outcome == "skipped":
            area.skips[(case.find("skipped").get("message") or "").strip()] += 1
        figures = {p.get("name") or "": p.get("value") or "" for p in case.iter("property")}
        if figures:
            area.figures[case.get("name") or "?"] = figures
    return dict(sorted(areas.items()))


def page(areas: dict[str, Area], times: Times, code: int) -> str:
    """The whole of docs/proof.md."""
    totals: Counter[str] = sum((area.counts for area in areas.values()), Counter())
    lines = [
        "# What was proven, when and where",
        "",
        "The last run of `make prove`, which writes this page: all tests, the kill and fuzz campaigns and the",
        "comparisons with llama.cpp, transformers and PEFT included.",
        "",
        f"- result: {'all passed' if code == 0 else f'FAILED (pytest exit code {code})'}: {_counted(totals)}",
        f"- duration: {times.told()}",
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- commit: {_commit()}",
        f"- machine: {_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB memory",
        f"- system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"- packages: {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        "",
        "| area | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, area in areas.items():
        failed = area.counts["failure"] + area.counts["error"]
        lines.append(f"| {name} | {area.counts['passed']} | {failed} | {area.counts['skipped']} | {area.seconds:.0f} |")
    lines += _figures(areas) + _skips(areas)
    return "\n".join(lines) + "\n"


def _figures(areas: dict[str, Area]) -> list[str]:
    rows = [
        f"| {name} | `{test}` | {', '.join(f'{key} = {value}' for key, value in figures.items())} |"
        for name, area in areas.items()
        for test, figures in area.figures.items()
    ]
    return ["", "## Figures", "", "| area | test | measured |", "|---|---|---|", *rows] if rows else []


def _skips(areas: dict[str, Area]) -> list[str]:
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

    head = git("rev-parse", "HEAD")
    changed = " and changes that are not committed" if head and git("status", "--porcelain") else ""
    return (head or "unknown") + changed


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


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
