"""Runs an experiment: ``python -m experiments.run --exp=stp_resnet18``.

Run the same command again to continue after an interruption. Without ``--exp`` (or with
``--exp=list``) the experiments are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import typing
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import configs
from experiments.config import (
    Config,
    ConfigError,
    choices,
    config_sections,
    override,
)


def _describe_keys(exp: str | None) -> str:
    """The keys that ``--set`` takes for an experiment, a line each, under their headings."""
    known = exp in configs.names()
    config = configs.load(str(exp)).CONFIG if known else Config()
    whose = exp if known else "training runs (add --exp=NAME for those of NAME)"
    lines, hints = [f"keys of {whose}:"], typing.get_type_hints(type(config), include_extras=True)
    for heading, keys in config_sections(type(config)).items():
        lines += ["", f"  {heading}"] if heading else [""]
        for key in keys:
            value = getattr(config, key.name)
            text = f"    {key.name}={'none' if value is None else value}"
            said = [" | ".join(map(str, choices(hints[key.name]))), key.remark]
            lines.append(f"{text:34}  {'; '.join(filter(None, said))}".rstrip())
    return "\n".join(lines)


def parser(exp: str | None = None) -> argparse.ArgumentParser:
    """The command line; its help describes the keys of the experiment."""
    result = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description="Train a network of few power-of-two terms and report its accuracy and cost.",
        epilog=_describe_keys(exp),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--exp", default="list", metavar="NAME", help="the experiment; 'list' shows those there are"
    )
    result.add_argument(
        "--workdir", type=Path, metavar="DIR", help="where everything goes (default: runs/NAME)"
    )
    result.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration; may be repeated",
    )
    sweep = result.add_argument_group("sweeps (docs/scaling.md)")
    sweep.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="run every combination of these settings, or a JSON file's; results in one table",
    )
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="members at a time")
    sweep.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="run members as Slurm jobs, with submitit's parameters, as timeout_min=600",
    )
    several = result.add_argument_group("several processes (docs/scaling.md)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where the first one listens")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N-1; 0 writes results")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="take the three from the cluster, as on a TPU pod; srun and mpirun need no flag",
    )
    return result


def _sweep(options: argparse.Namespace, base: Any, console: Console) -> int:
    """A sweep, from the check of every member's settings to its table; the exit status."""
    from experiments.runtime import processes
    from experiments.runtime.workdir import claim_workdir
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
            if (workdir / member.name / "config.json").exists():
                claim_workdir(workdir / member.name, options.exp, config)
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
