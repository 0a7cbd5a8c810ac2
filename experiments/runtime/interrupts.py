"""SIGTERM and Ctrl-C, held until a safe point: a step that is finished and saved.

With several processes, JAX's preemption service takes SIGTERM instead and agrees on one step.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal asked the run to end, and what it has done is saved."""

    def __init__(self, number: int):
        """Takes the signal's number."""
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


_received: list[int] = []
_calls = itertools.count()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT is noted for `pending`; another one acts as always."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    several = jax.distributed.is_initialized()
    numbers: tuple[int, ...] = () if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def pending() -> int | None:
    """The signal that asks this run to end, or None; the same in every process.

    With several processes, all must call this equally often.
    """
    if jax.distributed.is_initialized():
        stop = multihost_utils.reached_preemption_sync_point(next(_calls))
        return signal.SIGTERM if stop else None
    return _received[0] if _received else None


def check() -> None:
    """Raises Interrupted if a signal asks this run to end; for points with nothing to save."""
    number = pending()
    if number is not None:
        raise Interrupted(number)
