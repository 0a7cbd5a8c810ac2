"""Progress and metric logging: a progress bar, TensorBoard, and JSON lines."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is at any time either the old one or the new one."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


class _Board:
    """TensorBoard's file of one stage.

    It is written at once: tensorboardX's own writer leaves that to a thread, which a full disk
    ends and the run then waits for without end.
    """

    def __init__(self, folder: Path, *, start: int):
        """Opens a new file, which replaces what older ones hold of the steps after `start`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        # As SummaryWriter's purge_step does it.
        session = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=start, session_log=session))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class NoLog:
    """The log of a process that writes none; it takes what `StageLog` takes."""

    def __init__(self, workdir: Path, stage: str, **options: Any):
        """Does nothing."""

    def __enter__(self) -> NoLog:
        """Does nothing."""
        return self

    def __exit__(self, *error: object) -> None:
        """Does nothing."""

    def step(self, step: int) -> None:
        """Does nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""


class StageLog:
    """Metrics of one training stage, by step; steps that are run again replace their lines."""

    def __init__(self, workdir: Path, stage: str, *, start: int, steps: int, console: Console):
        """Drops what an interrupted run logged after the step that it resumes from."""
        self._stage = stage
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if not self._is_later(line, start)]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, self._path)
        self._file = self._path.open("a")
        self._board = _Board(workdir / "tensorboard" / stage, start=start)
        self._progress = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(stage, total=steps, completed=start, shown="")

    def _is_later(self, line: str, start: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut short
            return True
        return record["stage"] == self._stage and record["step"] > start

    def __enter__(self) -> StageLog:
        """Shows the progress bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar and the files."""
        self._progress.stop()
        self._file.close()
        self._board.close()

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records metrics of a step everywhere."""
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        self._progress.update(self._task, completed=step, shown=shown)
        self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        self._file.flush()
        self._board.write(step, values)
