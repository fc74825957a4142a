"""What `llamakit perplexity` prints: llama-perplexity's lines, and a table where there is more than one result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamakit.cli import render

if TYPE_CHECKING:
    from llamakit.inference.config import PerplexityConfig
    from llamakit.inference.divergence import Divergence, DivergenceTable, Uncertain
    from llamakit.inference.perplexity import Estimate

_LEADING = "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS"
_HEADING = f"{_LEADING}            Same top p"


@dataclass(frozen=True)
class Row:
    """One result. name: the model's, or the adapter's that was on it; n_bytes: of the model's tensors."""

    name: str
    model: Path
    lora: Path | None
    scale: float
    n_bytes: int
    bits_per_weight: float
    seconds: float
    result: Estimate | Divergence
    table: DivergenceTable | None = None

    @property
    def ppl(self) -> Uncertain:
        """Perplexity."""
        from llamakit.inference.divergence import Divergence, Uncertain

        result = self.result
        return result.ppl if isinstance(result, Divergence) else Uncertain(result.ppl, result.error)

    @property
    def divergence(self) -> Divergence | None:
        """From the base, where there is one."""
        from llamakit.inference.divergence import Divergence

        return self.result if isinstance(self.result, Divergence) else None

    @property
    def rank(self) -> float:
        """What makes one result better than another: less divergence, or without a base less perplexity."""
        value = self.divergence.kld.value if self.divergence is not None else self.ppl.value
        return value if math.isfinite(value) else math.inf


class Watch:
    """Shows one measurement as it runs: its lines on stdout, rate and time that is left on stderr."""

    def __init__(self, n_chunk: int, n_ctx: int, n_seq: int, config: PerplexityConfig, *, json: bool) -> None:
        self._n_chunk, self._n_ctx, self._n_seq = n_chunk, n_ctx, n_seq
        self._config, self._json = config, json
        self._started = time.perf_counter()
        self._bar = render.Progress("measuring", total=n_chunk, fields=("tok/s",), beside_output=not json)

    def __enter__(self) -> Watch:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def show(self, report: Estimate | Divergence) -> None:
        """A report of one chunk."""
        if report.chunk == 1:
            eta = self.seconds * self._n_chunk / min(self._n_seq, self._n_chunk)
            passes = f"{min(self._n_seq, self._n_chunk)} chunks of {self._n_ctx} tokens in {self.seconds:.2f} s"
            render.log(f"{passes}, {self._n_chunk} chunks to measure - ETA {render.human_duration(eta)}")
        rate = report.chunk * self._n_ctx / max(1e-9, self.seconds)
        self._bar.update(report.chunk, **{"tok/s": f"{rate:.0f}"})
        if not self._json:
            self._say(report)

    def _say(self, report: Estimate | Divergence) -> None:
        from llamakit.inference.divergence import Divergence

        if isinstance(report, Divergence):
            if report.chunk == 1:
                render.say(_HEADING)
            render.say(_divergence_line(report))
        elif self._config.ppl_output_type == 0:
            render.stream(f"[{report.chunk}]{report.ppl:.4f},")
        elif self._config.ppl_stride:
            render.say(f"{(report.chunk - 1) * self._config.ppl_stride:8d}  {report.ppl:.4f}")
        else:
            at = (report.chunk - 1) // self._n_seq * self._n_seq * self._n_ctx
            render.say(f"{at:8d}  {report.ppl:.4f}  {report.nll:4f}  {report.nll_error:4f}")


def _divergence_line(report: Divergence) -> str:
    rms, same = report.rms_delta_p, report.same_top
    return (
        f"{report.chunk:4d}    {_pair(report.ppl, '9.4f')}    {_pair(report.log_ratio, '10.5f')}"
        f"    {_pair(report.kld, '10.5f')}    {_pair(rms, '6.3f', 100)} %    {_pair(same, '6.3f', 100)} %"
    )


def _pair(pair: Uncertain, form: str, factor: float = 1.0, error_form: str | None = None) -> str:
    return f"{pair.value * factor:{form}} ± {pair.error * factor:{error_form or form}}"


def print_result(row: Row) -> None:
    """The end of one measurement, in llama-perplexity's words."""
    render.say()
    if row.divergence is None:
        render.say(f"Final estimate: PPL = {row.ppl.value:.4f} +/- {row.ppl.error:.5f}")
    elif row.table is None:
        render.note("less than 100 positions were scored: too few for statistics")
    else:
        print_statistics(row.table)


def print_statistics(table: DivergenceTable) -> None:
    """llama-perplexity's statistics of a divergence."""
    last, form = table.last, "10.6f"
    render.say("====== Perplexity statistics ======")
    render.say(f"Mean PPL(Q)                   : {_pair(last.ppl, form)}")
    render.say(f"Mean PPL(base)                : {_pair(last.base_ppl, form)}")
    render.say(f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * table.correlation:6.2f}%")
    render.say(f"Mean ln(PPL(Q)/PPL(base))     : {_pair(last.log_ratio, form)}")
    render.say(f"Mean PPL(Q)/PPL(base)         : {_pair(table.ratio, form)}")
    render.say(f"Mean PPL(Q)-PPL(base)         : {_pair(table.difference, form)}")
    render.say()
    render.say("====== KL divergence statistics ======")
    render.say(f"Mean    KLD: {_pair(last.kld, form)}")
    for share, value in table.kld_shares.items():
        render.say(f"{_label(share)} KLD: {value:10.6f}")
    render.say()
    render.say("====== Token probability statistics ======")
    render.say(f"Mean    Δp: {_pair(table.mean_delta_p, '6.3f', 100, '5.3f')} %")
    for share, value in table.delta_p_shares.items():
        render.say(f"{_label(share)} Δp: {100 * value:6.3f}%")
    render.say(f"RMS Δp    : {_pair(last.rms_delta_p, '6.3f', 100, '5.3f')} %")
    render.say(f"Same top p: {_pair(last.same_top, '6.3f', 100, '5.3f')} %")


def _label(share: float) -> str:
    words = {1.0: "Maximum", 0.5: "Median ", 0.0: "Minimum"}
    return words.get(share, f"{100 * share:4.1f}%  ")


def best(rows: Sequence[Row]) -> Row:
    """The best of some results; the first of equals."""
    return min(rows, key=lambda row: row.rank)


def print_comparison(rows: Sequence[Row]) -> None:
    """One line for each result, the best marked."""
    winner = best(rows)
    headers = ["", "name", "size", "BPW", "PPL", "+/-"]
    if winner.divergence is not None:
        headers += ["mean KLD", "+/-", "same top p"]
    cells = []
    for row in rows:
        line = ["*" if row is winner else "", row.name, render.human_bytes(row.n_bytes), f"{row.bits_per_weight:.2f}"]
        line += [f"{row.ppl.value:.4f}", f"{row.ppl.error:.4f}"]
        if row.divergence is not None:
            kld, same = row.divergence.kld, row.divergence.same_top
            line += [f"{kld.value:.6f}", f"{kld.error:.6f}", f"{100 * same.value:.2f} %"]
        cells.append(line)
    render.say()
    render.table(headers, cells, right=range(2, len(headers)))
    render.say(f"best: {winner.name}")


def as_json(rows: Sequence[Row], text: Path | None, n_ctx: int) -> dict[str, Any]:
    """What `--json` prints."""
    return {"text": text, "ctx": n_ctx, "results": [_row_json(row) for row in rows], "best": best(rows).name}


def _row_json(row: Row) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": row.name, "model": row.model, "lora": row.lora, "scale": row.scale if row.lora else None,
        "n_bytes": row.n_bytes, "bits_per_weight": row.bits_per_weight, "ppl": row.ppl.value,
        "ppl_error": row.ppl.error, "chunks": row.result.chunk, "tokens_scored": row.result.count,
        "seconds": row.seconds,
    }  # fmt: skip
    if row.divergence is None:
        return value
    return value | {"divergence": divergence_json(row.divergence, row.table)}


def divergence_json(last: Divergence, table: DivergenceTable | None) -> dict[str, Any]:
    """The statistics of a divergence as JSON has them; shares as text: "0.999"."""
    value = asdict(last)
    if table is not None:
        more = asdict(table)
        del more["last"]
        value |= more
    return value
