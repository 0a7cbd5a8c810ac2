"""Processes of a run: joining several of them, and ending them at a safe point.

SIGTERM and Ctrl-C are deferred until a step is finished and saved. With several processes, JAX's
preemption service takes SIGTERM instead and agrees on one step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# What says that a launcher has started several tasks of one step: Slurm's srun, Open MPI's mpirun.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, detect: bool
) -> None:
    """Joins the processes of a run, before JAX touches any device; alone, it does nothing.

    Args:
      coordinator: HOST:PORT of the first process, for machines without a launcher.
      num_processes: how many there are.
      process_id: which of them this one is.
      detect: let JAX find the other three (Slurm, Open MPI, Kubernetes, cloud TPUs). It does so by
        itself where srun or mpirun started several tasks.

    Raises:
      ValueError: only some of the three are given, one is out of range, or none can be detected.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("give --coordinator, --num-processes and --process-id together")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process-id must be from 0 to --num-processes less one, got {process_id} of "
                f"{num_processes}"
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif detect or any(int(os.environ.get(name, "1")) > 1 for name in _TASK_COUNTS):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes logs and results."""
    return jax.process_index() == 0


def from_first(find: Callable[[], Any], *, failure: type[Exception] = RuntimeError) -> Any:
    """The value that ``find`` returns in the first process, in every process; it must fit JSON.

    Every process must call this at the same point.

    Raises:
      Exception: what ``find`` raises in the first process; in the others, ``failure`` with its
        message.
    """
    if jax.process_count() == 1:
        return find()
    error, answer = None, {}
    if is_first():
        try:
            answer = {"value": find()}
        except Exception as caught:
            error, answer = caught, {"error": str(caught)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(length, np.uint8)
    buffer[: len(text) if is_first() else 0] = text if is_first() else 0
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
    if error is not None:
        raise error
    if "error" in answer:
        raise failure(answer["error"])
    return answer["value"]


# --- Signals --------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked the run to end, and what it has done is saved."""

    def __init__(self, number: int):
        """Takes the signal's number."""
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


_received: list[int] = []
_calls = itertools.count()


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
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
