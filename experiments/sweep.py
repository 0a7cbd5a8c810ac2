"""Sweeps: one experiment with many settings, each a run of its own in a process of its own.

A member is the command that one would type, in the sweep's folder; so it fails alone, resumes as
any run does, and is not run again when its results are there. Members run here, a few at a time,
or as jobs of a Slurm cluster through submitit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments.config import ConfigError
from experiments.runtime import processes
from experiments.runtime.log import write_json

_ATTEMPT = "$ "  # begins the line of a log that an attempt to run a member begins with
_LONGEST_NAME = 120  # characters; file systems stop at 255 bytes
_NOT_TABLED = (
    "config",
    "versions",
    "budgets",
    "budgets_by_filter",
    "by_layer",
    "cycles_by_layer",
    "seed",
)
_SHOWN = (
    "validation_top1_percent.float",
    "validation_top1_percent.int8",
    "validation_top1_percent.integer",
    "terms_per_weight.budgeted_layers",
    "computational_energy_saving",
)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    settings: Mapping[str, str]  # what --set takes, beside what all members share
    # What tables and the folder's name say of it; its settings by default.
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        """That of the name; mappings have none."""
        return hash(self.name)

    @property
    def shown(self) -> Mapping[str, Any]:
        """The labels, or the settings of a member without."""
        return self.labels or self.settings

    @property
    def name(self) -> str:
        """Labels or settings as a folder's name; long ones are cut and end in a digest."""
        whole = ",".join(f"{key}={value}" for key, value in self.shown.items())
        name = re.sub(r"[^\w.=,+-]", "_", whole, flags=re.ASCII)
        if name == whole and len(name) <= _LONGEST_NAME:
            return name
        return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    @property
    def arguments(self) -> list[str]:
        """Settings in the form of `--set`."""
        return [f"{key}={value}" for key, value in self.settings.items()]


# --- What to run ----------------------------------------------------------------------------------


def parse_sweep(texts: Sequence[str]) -> list[Member]:
    """The members of ``KEY=V1,V2 …`` (every combination) or of a JSON file of settings.

    Raises:
      ConfigError: a text is not of that form, a key stands twice, or the file is no list of
        {key: value}.

    >>> [member.name for member in parse_sweep(["seed=0,1", "budget=4,8"])]
    ['seed=0,budget=4', 'seed=0,budget=8', 'seed=1,budget=4', 'seed=1,budget=8']
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return _read_members(Path(texts[0]).expanduser())
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--sweep takes KEY=V1,V2 … or one JSON file, got {text!r}")
        if key in axes:
            raise ConfigError(f"--sweep has {key} twice; write its values as {key}=V1,V2")
        axes[key] = values.split(",")
    return _distinct(
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    )


def _read_members(path: Path) -> list[Member]:
    form = 'a list such as [{"seed": 0, "budget": 8}, {"seed": 1}]'
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--sweep cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); a sweep is {form}") from error
    if not isinstance(content, list) or not all(isinstance(x, dict) and x for x in content):
        raise ConfigError(f"{path} must hold {form}")
    return _distinct({key: _as_text(value) for key, value in entry.items()} for entry in content)


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _distinct(settings: Iterator[Mapping[str, str]]) -> list[Member]:
    members = [Member(one) for one in settings]
    if not members:
        raise ConfigError("--sweep has no members")
    for member in members:
        if members.count(member) > 1:
            raise ConfigError(f"--sweep has the member {member.name} twice")
    return members


# --- Running --------------------------------------------------------------------------------------


def _claim(workdir: Path, name: str) -> None:
    """Makes the sweep's folder, or makes sure that it is one of this experiment."""
    mark = workdir / "sweep.json"
    if mark.exists():
        theirs = json.loads(mark.read_text()).get("experiment")
        if theirs != name:
            raise ConfigError(f"{workdir} holds a sweep of {theirs}; use another --workdir")
        return
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"{workdir} exists and is not a sweep's folder; use another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"experiment": name})


def _command(name: str, workdir: Path, settings: Sequence[str]) -> list[str]:
    arguments = [f"--exp={name}", f"--workdir={workdir}", "--set", *settings]
    return [sys.executable, "-m", "experiments.run", *arguments]


class _Processes:
    """The members that run now, so that a signal can end them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Runs a command to its end, with its output in a file; its exit status."""
        if self.stopped:
            return -signal.SIGTERM
        with log.open("ab") as file:
            file.write(f"{_ATTEMPT}{shlex.join(command)}\n".encode())
            file.flush()
            # In a session of its own: Ctrl-C reaches the sweep alone, which passes it on once.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._running.add(process)
        if self.stopped:  # since it was asked above
            process.terminate()
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def stop(self) -> None:
        """Asks every member to save and end, and starts no other."""
        self.stopped = True
        for process in list(self._running):
            process.terminate()


def _run_here(
    commands: Mapping[Member, list[str]], logs: Path, jobs: int, report: Callable
) -> None:
    """Runs members in processes of this machine; reports (member, exit status) of each."""
    running = _Processes()
    with ThreadPoolExecutor(jobs) as pool, processes.deferred_signals():
        futures: dict[Future, Member] = {
            pool.submit(running.run, command, logs / f"{member.name}.txt"): member
            for member, command in commands.items()
        }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                if not running.stopped:
                    report(futures[future], future.result())
            if processes.pending() and not running.stopped:
                running.stop()
        processes.check()


def _run_as_jobs(
    commands: Mapping[Member, list[str]],
    logs: Path,
    parameters: Mapping[str, Any],
    report: Callable,
) -> None:
    """Runs members as cluster jobs and waits for them; reports (member, exit status) of each."""
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # or it shuts other log handlers down
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--slurm needs submitit: pip install 'stp-jax[sweep]'") from error
    parameters = dict(parameters)
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=parameters.pop("cluster", "slurm"))
        executor.update_parameters(name="stp_jax", **parameters)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--slurm: {error}") from error
    jobs = {}
    with executor.batch():
        for member, command in commands.items():
            function = submitit.helpers.CommandFunction(command, verbose=False)
            jobs[member] = executor.submit(function)
    for member, job in jobs.items():
        failure = job.exception()
        Path(logs / f"{member.name}.txt").write_text(
            f"{job.stdout()}\n{job.stderr()}\n{failure or ''}"
        )
        report(member, 0 if failure is None else 1)


def run_members(
    members: Sequence[Member],
    *,
    name: str,
    workdir: Path,
    shared: Sequence[str],
    jobs: int = 1,
    slurm: Mapping[str, Any] | None = None,
    console: Console,
) -> dict[Member, str]:
    """Runs the members that have no results yet; how each of them ended.

    Args:
      members: what to run; their settings were checked.
      name: the experiment.
      workdir: of the sweep; a member has a folder of its own there.
      shared: settings of all members.
      jobs: members at a time, on this machine.
      slurm: submitit's parameters, to run them as jobs of a cluster.

    Returns:
      "finished", "finished before", or "failed: " and the reason, by member.

    Raises:
      ConfigError: the folder holds something else, or the cluster cannot be used.
      Interrupted: by a signal; members that ran have saved.
    """
    _claim(workdir, name)
    logs = workdir / "logs"
    logs.mkdir(exist_ok=True)
    status = {m: "finished before" for m in members if (workdir / m.name / "results.json").exists()}
    commands = {
        member: _command(name, workdir / member.name, [*shared, *member.arguments])
        for member in members
        if member not in status
    }
    console.print(f"{len(commands)} of {len(members)} members to run, in {workdir}")

    def report(member: Member, code: int) -> None:
        good = code == 0 and (workdir / member.name / "results.json").exists()
        status[member] = "finished" if good else f"failed: {_last_words(logs, member)}"
        line = f"[{len(status)}/{len(members)}] {member.name}: {status[member]}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if slurm is None:
        _run_here(commands, logs, jobs, report)
    elif commands:
        _run_as_jobs(commands, logs, slurm, report)
    return {member: status[member] for member in members}  # they end in any order


def run_sweep(members: Sequence[Member], *, workdir: Path, console: Console, **options: Any) -> int:
    """Runs members as `run_members` does and gathers all results; the number that failed."""
    status = run_members(members, workdir=workdir, console=console, **options)
    table = gather(members, workdir, status)
    table.to_csv(workdir / "sweep.csv", index=False)
    _print(table, members, workdir, console)
    return sum(text.startswith("failed") for text in status.values())


def _last_words(logs: Path, member: Member) -> str:
    """Why the last attempt to run a member failed, by its log."""
    lines = (logs / f"{member.name}.txt").read_text(errors="replace").strip().splitlines()
    begins = [n for n, line in enumerate(lines, start=1) if line.startswith(_ATTEMPT)]
    lines = lines[begins[-1] if begins else 0 :]
    said = [line for line in lines if line.startswith("error: ")] or lines
    return said[-1].strip() if said else "it said nothing"


# --- Results --------------------------------------------------------------------------------------


def _numbers(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted paths and values of all numbers of a member's results, layer by layer ones aside."""
    for key, value in results.items():
        if key in _NOT_TABLED:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def gather(members: Sequence[Member], workdir: Path, status: Mapping[Member, str]) -> pd.DataFrame:
    """One row a member: its settings, how it ended, and every number of its results."""
    rows = []
    for member in members:
        row: dict[str, Any] = {
            "member": member.name,
            **member.shown,
            "status": status.get(member, "not run"),
        }
        path = workdir / member.name / "results.json"
        if path.exists():
            row |= dict(_numbers(json.loads(path.read_text())))
        rows.append(row)
    return pd.DataFrame(rows)


def _print(table: pd.DataFrame, members: Sequence[Member], workdir: Path, console: Console) -> None:
    keys = list(dict.fromkeys(key for member in members for key in member.settings))
    numbers = [name for name in _SHOWN if name in table] or list(table)[len(keys) + 2 :][:6]
    shown = table[[*keys, *numbers]].rename(columns=lambda name: name.split(".")[-1])
    print(shown.to_string(index=False, na_rep="", float_format="%.3f"))
    console.print(f"table: {workdir / 'sweep.csv'}", highlight=False, soft_wrap=True)
