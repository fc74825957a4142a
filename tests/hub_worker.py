"""Fetches for test_hub.py, in a process whose environment names another Hub, as a user's would.

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported, once for a process. One JSON object a line comes on
standard input: {source, offline}; one goes out: {path} or {error, message, hint}, the `reports` of progress, and how long
huggingface_hub wanted to sleep in all. It does not sleep here, and a request that hangs ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from typing import Any

from llamakit.errors import LlamakitError
from llamakit.hub import fetch

LIMIT_S = 20


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What became of one fetch."""
    slept: list[float] = []
    time.sleep = slept.append  # pyright: ignore[reportAttributeAccessIssue]
    reports: list[tuple[str, int, int | None]] = []
    found: dict[str, Any] = {}
    try:
        path = fetch(**request, on_progress=lambda d: reports.append((d.name, d.n_done, d.n_total)))
        found["path"] = str(path)
    except LlamakitError as error:
        found |= {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    return found | {"reports": reports, "slept": sum(slept)}


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        print(json.dumps(answer(json.loads(line))), flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
