"""`llamakit quantize --kl TEXT`: what the smaller types cost, measured on a text and shown."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamakit.cli import render
from llamakit.cli.perplexity_view import divergence_json

if TYPE_CHECKING:
    from llamakit.conversion.quantize_config import QuantizeConfig
    from llamakit.inference.compare import Comparison


def count_chunks(config: QuantizeConfig, text: Path) -> int:
    """How much there is to measure; a text that cannot be measured on is refused before anything is written."""
    from llamakit.conversion.quantize import open_source
    from llamakit.inference.compare import count_chunks as count

    with open_source(config) as source:
        return count(source, text)


def measure(config: QuantizeConfig, result: Path, text: Path, n_chunks: int) -> Comparison:
    """The model as it was and the result on the text, one after the other, with a bar."""
    from llamakit.conversion.quantize import open_source
    from llamakit.inference.compare import Comparison, compare
    from llamakit.inference.divergence import Divergence
    from llamakit.model.device import resolve_device

    render.log(f"measuring both on {n_chunks} chunks of {text}")
    started = time.perf_counter()
    progress = render.Progress("measuring", total=2 * n_chunks, fields=("chunks/s",))
    with open_source(config) as source, progress as bar:
        for report in compare(source, result, text, device=resolve_device("auto")):
            if isinstance(report, Comparison):
                return report
            done = report.chunk + (n_chunks if isinstance(report, Divergence) else 0)
            bar.update(done, **{"chunks/s": f"{done / max(1e-9, time.perf_counter() - started):.1f}"})
    raise AssertionError("a comparison ends with Comparison")


def print_cost(cost: Comparison) -> None:
    """Perplexity before and after, and how far the predictions moved."""
    last = cost.last
    # not last.log_ratio, whose base has 16 bits: the clip of its file shows in a difference as small as this
    log_ratio = math.log(last.ppl.value / cost.source.ppl)
    rows = [
        ("PPL before", f"{cost.source.ppl:.4f}", f"{cost.source.error:.4f}"),
        ("PPL after", f"{last.ppl.value:.4f}", f"{last.ppl.error:.4f}"),
        ("ln(PPL after / before)", f"{log_ratio:.6f}", f"{last.log_ratio.error:.6f}"),
        ("mean KLD", f"{last.kld.value:.6f}", f"{last.kld.error:.6f}"),
    ]
    if cost.table is not None:
        shares = cost.table.kld_shares
        rows += [("99.0% KLD", f"{shares[0.99]:.6f}", ""), ("maximum KLD", f"{shares[1.0]:.6f}", "")]
    for name, pair in (("RMS Δp (%)", last.rms_delta_p), ("same top p (%)", last.same_top)):
        rows.append((name, f"{100 * pair.value:.3f}", f"{100 * pair.error:.3f}"))
    render.table((f"on {cost.text.name}", "value", "+/-"), rows, right=(1, 2))
    render.say()


def as_json(cost: Comparison) -> dict[str, Any]:
    """What `--json` adds."""
    source = {"source_ppl": cost.source.ppl, "source_ppl_error": cost.source.error}
    return {"text": cost.text, **source, **divergence_json(cost.last, cost.table)}
