"""How a training run is stopped from outside."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llamakit.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED

if TYPE_CHECKING:
    from llamakit.training.loop import Control


def exit_code(control: Control) -> int:
    """The code of a run that has ended, by a signal or by itself."""
    codes: dict[int, int] = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
    return codes.get(control.signal, EXIT_OK)


@contextmanager
def stopping_signals(control: Control, view: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step, saved; SIGUSR1 saves; a second Ctrl-C ends at once."""

    def stop(number: int, _frame: object) -> None:
        if control.signal or not view.training:
            if number == signal.SIGTERM:
                raise SystemExit(EXIT_TERMINATED)
            raise KeyboardInterrupt
        control.signal = number
        if view.speaks:
            os.write(2, b"note: finishing this step, then saving; once more ends at once without saving\n")

    def save(_number: int, _frame: object) -> None:
        control.save = True

    wanted = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
