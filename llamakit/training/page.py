"""report.html and report.json: one run on one page that needs nothing else, no network and no script."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamakit.files import atomic_files, escape_control
from llamakit.training.axes import LABELS, number, smooth, thin
from llamakit.training.chart import Trace, svg
from llamakit.training.curves import Curves, Quantity
from llamakit.training.summary import RunSummary, plain, summary_json

if TYPE_CHECKING:
    from llamakit.training.report import Sample

_MAX_POINTS = 1200
#: samples of a prompt that are shown side by side; what lies between the first and the last is folded away
_SIDE_BY_SIDE = 3

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f6f8fa;--text:#1b2430;--dim:#5b6777;--line:#d9dfe7;--train:#2563eb;
--valid:#c2410c;--mark:#fff3c4}
@media(prefers-color-scheme:dark){:root{--back:#12161c;--card:#1b212a;--text:#e3e8ee;--dim:#98a4b3;--line:#323b47;
--train:#7aa7ff;--valid:#fb9a4b;--mark:#4a3d12}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.25rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.3rem 0}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
.dim{color:var(--dim)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.tile span{font-size:.85rem;color:var(--dim)}
pre{background:var(--card);border-radius:.5rem;padding:.7rem .9rem;margin:.4rem 0;white-space:pre-wrap;
font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
table{border-collapse:collapse;width:100%;font-size:.9rem}
td,th{padding:.22rem .6rem .22rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
font-weight:400}
th{color:var(--dim);width:15rem}
td.right{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.changed td{font-weight:600}
.columns{columns:2 22rem;column-gap:2rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.5rem 1.5rem}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr));gap:.7rem}
.texts pre{margin:0}
.texts div>span{font-size:.85rem;color:var(--dim)}
figure{margin:.6rem 0}
figcaption{font-size:.9rem;color:var(--dim)}
figcaption i{display:inline-block;width:1.3rem;height:.2rem;vertical-align:middle;margin:0 .35rem 0 .9rem}
i.train{background:var(--train)}i.valid{background:var(--valid)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--dim);font-size:12px;font-variant-numeric:tabular-nums}
svg path{fill:none}
.grid{stroke:var(--line)}.axis{stroke:var(--dim)}
path.raw{stroke:var(--train);opacity:.28}
path.train{stroke:var(--train);stroke-width:2}
path.valid{stroke:var(--valid);stroke-width:2;stroke-dasharray:6 4}
circle.train{fill:var(--train)}circle.valid{fill:var(--valid)}
.remarks{background:var(--mark);border-radius:.5rem;padding:.6rem 1rem .6rem 2rem;margin:1rem 0}
summary{cursor:pointer;color:var(--dim);margin:.5rem 0}
@media(max-width:40rem){.wide text{font-size:23px}.wide path{stroke-width:2}.wide circle{r:7px}
.wide path.train,.wide path.valid{stroke-width:4}}
@media print{body{max-width:none}}
"""


def write_report(summary: RunSummary, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.html and report.json into a folder that exists, both or none, and return their paths.

    Raises SaveError for what the disk refuses.
    """
    names = ("report.html", "report.json")
    texts = (report_html(summary), json.dumps(summary_json(summary), ensure_ascii=True, indent=1, allow_nan=False))
    with atomic_files(Path(folder) / "report") as temporary:
        for name, text in zip(names, texts, strict=True):
            (temporary / name).write_text(text + "\n", encoding="utf-8")
    return Path(folder) / names[0], Path(folder) / names[1]


def report_html(summary: RunSummary) -> str:
    """The page: a whole HTML document, the same bytes for the same summary. Nothing in it is taken for HTML."""
    body = [
        f"<h1>{_text(summary.title)}</h1>",
        f'<p class="dim">{_text(" · ".join(_facts(summary)))}</p>',
        *_tiles(summary),
        *_remarks(summary.remarks),
        *_curves(summary.curves),
        *_samples(summary.samples),
        "<h2>Do it again</h2>",
        _pre(summary.command),
        *_table("Results", summary.results),
        *_pair(_table("Model", summary.model), _table("Data", summary.data)),
        *_settings(summary),
        *_pair(_files(summary), _table("Machine", summary.machine)),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            # What a model wrote is text here; should it ever be more, it may still fetch nothing and run nothing.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline'\">",
            f"<title>{_text(summary.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>",
        ]
    )


def _text(value: str) -> str:
    return html.escape(escape_control(value))


def _pre(value: str, *, tag: str = "pre") -> str:
    """A text with its lines; tabs stay, other control characters are shown."""
    lines = value.replace("\r\n", "\n").split("\n")
    return f"<{tag}>" + "\n".join("\t".join(_text(part) for part in line.split("\t")) for line in lines) + f"</{tag}>"


def _facts(summary: RunSummary) -> Iterator[str]:
    if summary.started:
        yield summary.started
    if summary.outcome:
        yield summary.outcome
    if summary.curves is not None and summary.curves.n_resumed:
        n = summary.curves.n_resumed
        yield "resumed once" if n == 1 else f"resumed {n} times"


def _tiles(summary: RunSummary) -> Iterator[str]:
    tiles: list[tuple[str, str]] = []
    curves = summary.curves
    if summary.perplexity_after is not None:
        before = f"{_perplexity(summary.perplexity_before)} → " if summary.perplexity_before is not None else ""
        tiles.append((f"{before}{_perplexity(summary.perplexity_after)}", "validation perplexity"))
    if curves is not None:
        best = curves.best
        if best is not None and best.val_loss is not None:
            tiles.append((number(best.val_loss), f"best validation loss, at step {best.step:,}"))
            if best.val_bpb is not None:
                tiles.append((number(best.val_bpb), "bits per byte there"))
        tiles.append((f"{curves.n_steps:,}", "steps"))
        if curves.tok_per_s is not None:
            tiles.append((f"{curves.tok_per_s:,.0f}", "tokens per second"))
    if summary.duration_s is not None:
        tiles.append((_duration(summary.duration_s), "from start to end"))
    if tiles:
        cells = "".join(
            f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in tiles
        )
        yield f'<div class="tiles">{cells}</div>'


def _perplexity(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _remarks(remarks: Sequence[str]) -> Iterator[str]:
    if remarks:
        yield '<ul class="remarks">' + "".join(f"<li>{_text(remark)}</li>" for remark in remarks) + "</ul>"


def _curves(run: Curves | None) -> Iterator[str]:
    if run is None or not (run.steps or run.evaluations):
        return
    yield "<h2>Curves</h2>"
    losses, measured = run.series("loss"), run.series("val_loss")
    traces = _noisy(losses) + ([Trace(*measured, "valid", points=True)] if measured[0] else [])
    if traces:
        keys = ('<i class="train"></i>training' if losses[0] else "") + (
            '<i class="valid"></i>validation' if measured[0] else ""
        )
        yield _figure(svg(traces, "loss by step", width=1000, height=380), f"loss by step{keys}", wide=True)
    small = [chart for quantity in ("lr", "tok_per_s") if (chart := _small(run, quantity))]
    if small:
        yield f'<div class="pair">{"".join(small)}</div>'


def _noisy(series: tuple[list[int], list[float]]) -> list[Trace]:
    """A curve as it is, faintly, under the same smoothed."""
    steps, values = series
    if not steps:
        return []
    if len(steps) < 80:  # nothing to smooth
        return [Trace(*thin(steps, values, _MAX_POINTS), "train")]
    smoothed = Trace(*thin(steps, smooth(values), _MAX_POINTS), "train")
    return [Trace(*thin(steps, values, _MAX_POINTS), "raw"), smoothed]


def _small(run: Curves, quantity: Quantity) -> str:
    series = run.series(quantity)
    if not series[0]:
        return ""
    traces = _noisy(series) if quantity != "lr" else [Trace(*thin(*series, _MAX_POINTS), "train")]
    label = f"{LABELS[quantity]} by step"
    return _figure(svg(traces, label, width=500, height=210, from_zero=True), label)


def _figure(drawing: str, caption: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""  # its letters grow where the page is narrow
    return f"<figure{kind}><figcaption>{caption}</figcaption>{drawing}</figure>"


def _samples(samples: Sequence[Sample]) -> Iterator[str]:
    """What the model wrote, by prompt; first and last side by side, what lies between folded away."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    if by_prompt:
        yield "<h2>Samples</h2>"
    for prompt, ours in by_prompt.items():
        yield _pre(prompt, tag="h3") if prompt else "<h3>(no prompt)</h3>"
        folded = [] if len(ours) <= _SIDE_BY_SIDE else ours[1:-1]
        yield _texts([ours[0], ours[-1]] if folded else ours)
        if folded:
            yield f"<details><summary>{len(folded)} between them</summary>{_texts(folded)}</details>"


def _when(sample: Sample) -> str:
    if not sample.step:
        return "before training"
    return "after 1 step" if sample.step == 1 else f"after {sample.step:,} steps"


def _texts(samples: Sequence[Sample]) -> str:
    cells = "".join(f"<div><span>{_when(sample)}</span>{_pre(sample.text)}</div>" for sample in samples)
    return f'<div class="texts">{cells}</div>'


def _table(title: str, values: Mapping[str, object]) -> Iterator[str]:
    if values:
        yield f"<h2>{_text(title)}</h2>"
        yield _rows(values, frozenset())


def _rows(values: Mapping[str, object], changed: frozenset[str]) -> str:
    rows = "".join(
        ('<tr class="changed">' if name in changed else "<tr>")
        + f"<th>{_text(name)}</th><td>{_text(_value(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _value(value: object) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(summary: RunSummary) -> Iterator[str]:
    """The options: those that differ from their defaults in sight, the others folded away."""
    changed = {name: value for name, value in summary.settings.items() if name in summary.changed}
    rest = {name: value for name, value in summary.settings.items() if name not in summary.changed}
    if summary.settings:
        yield "<h2>Settings</h2>"
    if changed:
        yield _rows(changed, summary.changed)
    if rest:
        table = f'<div class="columns">{_rows(rest, frozenset())}</div>'
        what = f"{len(rest)} at their defaults" if summary.changed else f"all {len(rest)}"
        yield f"<details{'' if summary.changed else ' open'}><summary>{what}</summary>{table}</details>"


def _files(summary: RunSummary) -> Iterator[str]:
    if summary.files:
        rows = "".join(
            f'<tr><td>{_text(file.name)}</td><td class="right">{_bytes(file.n_bytes)}</td></tr>'
            for file in summary.files
        )
        yield f"<h2>Files</h2><table>{rows}</table>"


def _pair(*blocks: Iterator[str]) -> Iterator[str]:
    """Blocks side by side where there is room; none where all are empty."""
    filled = [text for text in ("".join(block) for block in blocks) if text]
    if filled:
        yield f'<div class="pair">{"".join(f"<div>{text}</div>" for text in filled)}</div>'


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
