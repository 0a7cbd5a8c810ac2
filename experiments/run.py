"""Runs an experiment: ``python -m experiments.run --exp=stp_resnet18``.

Run the same command again to continue after an interruption. Without ``--exp`` (or with
``--exp=list``) the experiments are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import command_help, configs
from experiments.config import Config, ConfigError, override


def _sweep_options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    group = result.add_argument_group("sweeps (docs/scaling.md)")
    group.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="run every combination of these settings, or a JSON file's; results in one table",
    )
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="members at a time")
    group.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="run members as Slurm jobs, with submitit's parameters, as timeout_min=600",
    )
    return result


def _process_options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    group = result.add_argument_group("several processes (docs/scaling.md)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N-1; 0 writes results")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="take these three from the cluster, as on a TPU pod; srun and mpirun need no flag",
    )
    return result


class _Help(argparse.Action):
    """Prints the help, or a section of it, and exits."""

    def __init__(self, *, show: Callable[[str | None], str], **kwargs: Any):
        super().__init__(nargs="?", **kwargs)
        self._show = show

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            shown = self._show(values)
        except KeyError as error:
            parser.error(error.args[0])
        with contextlib.suppress(BrokenPipeError):  # `--help | head`
            print(shown.rstrip(), flush=True)
        parser.exit()


def parser(exp: str | None = None) -> argparse.ArgumentParser:
    """The command line; its help describes the keys of the experiment."""
    sections = {"sweeps": _sweep_options(), "processes": _process_options()}
    usual = argparse.ArgumentParser(
        prog="python -m experiments.run",
        usage="%(prog)s --exp=NAME [OPTION ...]",
        description="Train a network of few power-of-two terms and report its accuracy and cost.",
        epilog=command_help.overview(exp, sections),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36
        ),
        add_help=False,
    )
    usual.add_argument(
        "--exp", default="list", metavar="NAME", help="the experiment; 'list' shows all"
    )
    usual.add_argument(
        "--workdir", type=Path, metavar="DIR", help="where results go (default: runs/NAME)"
    )
    usual.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration; may be repeated",
    )
    usual.add_argument(
        "-h",
        "--help",
        action=_Help,
        metavar="SECTION",
        help="this help, or a section of it",
        show=lambda name: (
            command_help.section(name, exp, sections) if name else usual.format_help()
        ),
    )
    return argparse.ArgumentParser(
        prog=usual.prog,
        usage=usual.usage,
        parents=[usual, *sections.values()],
        add_help=False,
    )


def _sweep(options: argparse.Namespace, base: Any, console: Console) -> int:
    """A sweep, from the check of every member's settings to its table; the exit status."""
    from experiments.runtime import processes
    from experiments.runtime.workdir import check_run
    from experiments.sweep import parse_sweep, run_sweep

    if options.jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more, got {options.jobs}")
    if options.coordinator or options.distributed:
        raise ConfigError("--sweep starts processes of its own; leave --coordinator and such out")
    workdir = options.workdir or Path("runs") / f"{options.exp}_sweep"
    members = parse_sweep(options.sweep)
    fixed = {setting.partition("=")[0] for setting in options.set}
    for member in members:
        both = fixed & set(member.settings)
        if both:
            raise ConfigError(f"{', '.join(both)} stands in --set and in --sweep; choose one")
        try:
            config = override(base, [*options.set, *member.arguments])
            check_run(workdir / member.name, options.exp, config)
        except ConfigError as error:
            raise ConfigError(f"member {member.name}: {error}") from None
    slurm = None
    if options.slurm is not None:
        pairs = (text.partition("=") for text in options.slurm)
        slurm = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
    try:
        failed = run_sweep(
            members,
            name=options.exp,
            workdir=workdir,
            shared=options.set,
            jobs=options.jobs,
            slurm=slurm,
            console=console,
        )
    except processes.Interrupted as signal:
        return _interrupted(signal)
    if failed:
        print(f"error: {failed} of {len(members)} members failed", file=sys.stderr)
    return 1 if failed else 0


def _join(options: argparse.Namespace) -> None:
    from experiments.runtime import processes

    given = (options.coordinator, options.num_processes, options.process_id)
    try:
        processes.start(*given, detect=options.distributed)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot join the processes of this run: {error}") from error


def _interrupted(signal: Any) -> int:
    """Tells how to go on after a signal; the exit status."""
    print(f"{signal}; run the same command again to continue", file=sys.stderr)
    return 128 + signal.number


def _train(config: Config, workdir: Path, name: str, console: Console) -> int:
    """A training run, from its checks to its report; the exit status."""
    # Only a sound configuration is worth the seconds that these imports take.
    from experiments import report, stages, train
    from experiments.context import check_model, make_context
    from experiments.runtime import processes
    from experiments.runtime.checkpoints import CheckpointError
    from experiments.runtime.workdir import (
        claim_workdir,
        disk_full_message,
        disk_is_full,
        locked,
    )

    if not processes.is_first():
        console = Console(quiet=True)

    try:
        context = make_context(config, workdir, console)
        check_model(context)
        stages.check_stages(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def enter(stack: contextlib.ExitStack) -> None:
        claim_workdir(workdir, name, config)
        stack.enter_context(locked(workdir))

    try:
        with contextlib.ExitStack() as stack, processes.deferred_signals():
            processes.from_first(lambda: enter(stack), failure=ConfigError)
            outcome = stages.train(context)
            if processes.is_first():
                report.write_results(context, outcome, name)
    except (train.TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except processes.Interrupted as signal:
        return _interrupted(signal)
    except Exception as error:
        if not disk_is_full(error):
            raise
        print(f"error: {disk_full_message(workdir)}", file=sys.stderr)
        return 1
    console.print(f"results: {workdir / 'results.json'}, plots: {workdir / 'plots'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 on success, 2 on a wrong configuration, 1 on failed training or a full disk, 128 and the
    signal's number when SIGTERM or Ctrl-C ended the run.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--exp")
    options = parser(first.parse_known_args(arguments)[0].exp).parse_args(arguments)
    console = Console()
    if options.exp in ("", "list"):
        for name in configs.names():
            console.print(f"{name:24} {configs.summary(name)}", highlight=False, soft_wrap=True)
        return 0
    workdir = options.workdir or Path("runs") / options.exp
    try:
        experiment = configs.load(options.exp)
        if options.sweep:
            return _sweep(options, experiment.CONFIG, console)
        from experiments.runtime.compilation import keep_compilations

        _join(options)
        keep_compilations()
        config = override(experiment.CONFIG, options.set)
        if isinstance(config, Config):
            return _train(config, workdir, options.exp, console)
        from experiments.runtime import processes
        from experiments.runtime.workdir import claim_workdir

        claim_workdir(workdir, options.exp, config)
        try:
            experiment.run(config, workdir, console)
        except processes.Interrupted as signal:
            return _interrupted(signal)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
