"""A comparison: several methods compress one float model, each with the same steps and seeds.

The start is shared: one float model is trained (or fine-tuned from published weights), and every
member of the comparison, the float baseline included, trains for the same number of steps from it.
A member is an ordinary run in a folder of its own (`experiments.train`), so it resumes, and a
finished one is not run again. What all members' `results.json` hold is gathered into one table.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from rich.console import Console

from experiments.config import Config, ConfigError, override
from experiments.runtime.log import write_json
from stp_jax import data, hwmodel

# What a method changes in the configuration, given terms per weight and the common group size;
# None where the method cannot have that many terms.
Method = Callable[[float, int], Mapping[str, Any] | None]

ALL_TERMS = 4  # per weight: what an 8-bit NAF value has at most; such a budget prunes nothing
_PLAIN = {"distill": 0.0}  # straight-through training on the labels alone


def _uniform(terms: float, group_size: int) -> dict[str, Any] | None:
    budget = terms * group_size
    if budget != round(budget):
        return None
    return {"budget": round(budget), "terms_per_weight": terms}


def _term_revealing(terms: float, group_size: int) -> dict[str, Any] | None:
    uniform = _uniform(terms, group_size)
    return uniform and {**uniform, **_PLAIN, "method": "greedy", "encoding": "hese"}


def _few_terms_per_weight(terms: float, group_size: int) -> dict[str, Any] | None:
    del group_size
    found = _uniform(terms, 1)
    return found and {**found, **_PLAIN, "group_size": 1}


def _ours(terms: float, _: int, **changes: Any) -> dict[str, Any]:
    return {"terms_per_weight": terms, "allocate_for": "terms", **changes}


METHODS: dict[str, Method] = {
    # Term revealing (Kung et al., SC20), as published and with retraining.
    "term revealing (not retrained)": lambda t, g: (
        (found := _term_revealing(t, g)) and {**found, "train": False}
    ),
    "term revealing": _term_revealing,
    # Every weight by itself, as in few-term codebooks (shift-add networks).
    "term cap per weight": _few_terms_per_weight,
    # The exact projection, the same budget in every layer.
    "uniform group budgets": lambda t, g: (found := _uniform(t, g)) and {**found, **_PLAIN},
    # No training at all: budgets by layer, and weights that make up for each other's errors.
    "STP (not retrained)": functools.partial(_ours, compensate=True, train=False),
    # STP as this project does it: budgets by layer, the float model's soft labels.
    "STP": _ours,
    # The same with the array's energy as what the budgets share out.
    "STP for energy": functools.partial(_ours, allocate_for="energy"),
    # From there, budgets trained with the weights: energy in the loss for the first steps.
    "STP, energy in the loss": functools.partial(_ours, allocate_for="energy", budgeted_share=0.3),
}

# What each part of the method is worth: STP with one thing changed.
ABLATIONS: dict[str, Mapping[str, Any]] = {
    "with guidance": {"guided_share": 0.3},
    "with compensation": {"compensate": True},
    "without distillation": {"distill": 0.0},
    "uniform budgets": {"uniform": True},
    "unweighted errors": {"error_weighting": "none"},
    "groups of 4": {"group_size": 4},
    "groups of 16": {"group_size": 16},
    "groups of 32": {"group_size": 32},
    "booth4, uniform budgets": {"uniform": True, "encoding": "booth4"},
    "binary, uniform budgets": {"uniform": True, "encoding": "binary"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What is compared, on what, and for how long."""

    base: str = "stp_resnet20_cifar10"  # the experiment whose model, data and rates are used
    settings: str = ""  # changes of the base's configuration, as "data=folder data_dir=…"
    start_epochs: float = 1.0  # float training of the shared start
    steps: int = 300  # of every member, from the start
    batch_size: int = 64  # of the members' steps
    points: str = "1.0,0.5"  # terms per weight, with every seed
    more_points: str = "0.75,0.375,0.25,2.0"  # terms per weight, with the first seed only
    more_methods: str = "term revealing,uniform group budgets,STP,STP for energy"  # at these
    seeds: int = 3
    ablation: float | None = 0.5  # terms per weight of the ablation, first seed; none leaves it out
    jobs: int = 1  # members that run at a time, each in a process of its own

    # Keys that a resumed comparison may change: each member keeps to its own configuration.
    BOOKKEEPING: ClassVar = (
        "points",
        "more_points",
        "more_methods",
        "seeds",
        "ablation",
        "jobs",
    )

    def __post_init__(self) -> None:  # noqa: D105
        for key in ("steps", "batch_size", "seeds", "jobs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, got {getattr(self, key)}")
        if self.start_epochs < 0:
            raise ConfigError(f"start_epochs must be 0 or more, got {self.start_epochs}")
        for key in ("points", "more_points"):
            numbers(key, getattr(self, key))
        unknown = [name for name in _names(self.more_methods) if name not in METHODS]
        if unknown:
            raise ConfigError(
                f"more_methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}"
            )


def numbers(key: str, text: str) -> list[float]:
    """The terms per weight in a list with commas; ConfigError if they are none."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{key} must be numbers with commas between, got {text!r}") from None
    if any(not 0 < value <= ALL_TERMS for value in values):
        raise ConfigError(f"{key} must be terms per weight in (0, {ALL_TERMS}], got {text!r}")
    return values


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One run of the comparison."""

    method: str
    terms: float | None  # per weight; None for float and int8
    seed: int
    ablation: bool = False
    changes: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """A name for its folder, unique in the comparison."""
        words = "".join(c if c.isalnum() else " " for c in self.method).split()
        parts = ["ablation"] if self.ablation else []
        parts += ["_".join(words)] + ([f"t{self.terms:g}"] if self.terms is not None else [])
        return "-".join([*parts, f"seed{self.seed}"])


def members(config: ComparisonConfig, base: Config) -> list[Member]:
    """The runs of a comparison, the most telling first."""
    found = []
    points, more = (numbers(key, getattr(config, key)) for key in ("points", "more_points"))

    def add(names: Iterable[str], terms: Sequence[float], seed: int) -> None:
        for t in terms:
            for name in names:
                changes = METHODS[name](t, base.group_size)
                if changes is not None:
                    found.append(Member(method=name, terms=t, seed=seed, changes=changes))

    for seed in range(config.seeds):
        for name, changes in (
            ("float", {"float_only": True}),
            ("int8", {"budget": ALL_TERMS * base.group_size, **_PLAIN}),
        ):
            found.append(Member(method=name, terms=None, seed=seed, changes=changes))
        add(METHODS, points, seed)
        if seed == 0:
            add(_names(config.more_methods), more, seed)
    return found + _ablation(config, base)


def _ablation(config: ComparisonConfig, base: Config) -> list[Member]:
    if config.ablation is None:
        return []
    terms, result = config.ablation, []
    for name, changed in ABLATIONS.items():
        changes = dict(changed)
        if changes.pop("uniform", False):
            changes |= _uniform(terms, changes.get("group_size", base.group_size)) or {}
        else:
            changes = _ours(terms, base.group_size, **changes)
        result.append(Member(method=name, terms=terms, seed=0, ablation=True, changes=changes))
    return result


def member_config(config: ComparisonConfig, base: Config, member: Member, start: Path, epoch: int):
    """The configuration of a member's run.

    Args:
      start: the shared float model's file.
      epoch: steps in an epoch at the members' batch size.
    """
    changes = dict(member.changes)
    float_only, train = changes.pop("float_only", False), changes.pop("train", True)
    guided, budgeted = (
        round(changes.pop(share, 0.0) * config.steps)
        for share in ("guided_share", "budgeted_share")
    )
    retrained = config.steps - guided - budgeted if train and not float_only else 0
    if float_only:
        changes |= {"budget": ALL_TERMS * base.group_size, "float_lr": base.retrain_lr}
    return dataclasses.replace(
        base,
        **changes,
        seed=member.seed,
        batch_size=config.batch_size,
        init_from=str(start),
        float_epochs=config.steps / epoch if float_only else 0,
        guided_epochs=guided / epoch,
        budgeted_epochs=budgeted / epoch,
        retrain_epochs=retrained / epoch,
        log_every=25,
        check_integers=False,
        checkpoint_every=200,
    )


# --- Running --------------------------------------------------------------------------------------


@functools.cache
def _dataset(name: str, data_dir: str | None, on_corrupt: str) -> Any:
    """The images, read once by each process."""
    return data.load(name, data_dir=data_dir, on_corrupt=on_corrupt)


def _context(config: Config, workdir: Path, console: Console) -> Any:
    from experiments.context import make_context

    images = _dataset(config.data, config.data_dir, config.on_corrupt)
    dataset = data.ImageData(dataset=images, augment=config.augment, image_size=config.image_size)
    return make_context(config, workdir, console, dataset=dataset)


def _run(config: Config, workdir: Path, name: str, known: Mapping[str, float]) -> None:
    """One member, or what an interrupted run left of it; its console goes to a file."""
    from experiments import report, stages
    from experiments.runtime.workdir import claim_workdir, locked

    claim_workdir(workdir, name, config)
    if not (workdir / "stages.json").exists():
        # What the shared start has by itself was measured once.
        write_json(workdir / "stages.json", {"top1": dict(known)})
    with locked(workdir), (workdir / "console.txt").open("a") as file:
        context = _context(config, workdir, Console(file=file, width=120))
        outcome = stages.train(context)
        report.write_results(context, outcome, name)


def run_comparison(
    config: ComparisonConfig, base: Config, workdir: Path, name: str, console: Console
) -> dict[str, Any]:
    """Runs what is missing and gathers everything; returns what `results.json` holds.

    Raises:
      ConfigError: the settings do not fit together.
    """
    start = workdir / "start"
    if not (start / "results.json").exists():
        begin = dataclasses.replace(
            base, float_epochs=config.start_epochs, guided_epochs=0, retrain_epochs=0
        )
        begin = dataclasses.replace(begin, budget=ALL_TERMS * base.group_size, bn_batches=0)
        console.print("start: float")
        _run(begin, start, name, {})
    at_start = json.loads((start / "results.json").read_text())["top1_percent"]
    console.print(f"start: float {at_start['float']:.2f} %, int8 {at_start['int8']:.2f} %")

    images = len(_dataset(base.data, base.data_dir, base.on_corrupt).train)
    epoch = images // config.batch_size
    everyone = members(config, base)
    jobs = {}
    for member in everyone:
        folder = workdir / "members" / member.folder
        if not (folder / "results.json").exists():
            one = member_config(config, base, member, start / "float.safetensors", epoch)
            known = {} if member.method == "float" else at_start
            known = {stage: known[stage] for stage in ("float", "int8") if stage in known}
            jobs[member.folder] = (one, folder, name, known)
    failed = _run_all(jobs, config.jobs, console)
    results = gather(config, base, workdir, name, everyone)
    if failed:
        console.print(f"{len(failed)} members failed; run the same command again for them:")
        for place, error in failed.items():
            console.print(f"  {place}: {error}", highlight=False)
    return results


def _end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_all(jobs: Mapping[str, tuple], processes: int, console: Console) -> dict[str, str]:
    """Runs members side by side; returns those that failed, with the reason."""
    failed = {}

    def done(member: str, error: BaseException | None) -> None:
        folder = jobs[member][1]
        if error is not None:
            failed[str(folder)] = f"{type(error).__name__}: {error}"
            console.print(f"{member}: failed", highlight=False)
            return
        top1 = json.loads((folder / "results.json").read_text())["top1_percent"]
        console.print(
            f"{member}: " + ", ".join(f"{k} {v:.2f}" for k, v in top1.items()),
            highlight=False,
        )

    if processes == 1:
        for member, job in jobs.items():
            try:
                _run(*job)
            except Exception as error:  # one member's failure is no reason to stop the others
                done(member, error)
            else:
                done(member, None)
        return failed
    # JAX must not be forked.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=_end_with_parent
    ) as pool:
        futures = {pool.submit(_run, *job): member for member, job in jobs.items()}
        for future in concurrent.futures.as_completed(futures):
            done(futures[future], future.exception())
    return failed


# --- Gathering ------------------------------------------------------------------------------------


def _row(member: Member, results: Mapping[str, Any]) -> dict[str, Any]:
    top1 = results["top1_percent"]
    row = {
        "method": member.method,
        "terms": member.terms,
        "seed": member.seed,
        "ablation": member.ablation,
        "top1": top1["float"] if member.method == "float" else top1["retrained"],
        "projected": None if member.method == "float" else top1["projected"],
    }
    if member.terms is not None:
        row |= {
            "terms_held": results["terms_per_weight"]["budgeted_layers"],
            "saving": results["computational_energy_saving"],
            "saving_with_encoder": results["computational_energy_saving_with_encoder"],
            "cycles": results["accelerator"]["group_pe"]["cycles"],
            "budgets": results["budgets"],
        }
    return row


def gather(
    config: ComparisonConfig, base: Config, workdir: Path, name: str, everyone: Sequence[Member]
) -> dict[str, Any]:
    """Writes `results.json`: what was run, a row for each finished member, and the missing ones."""
    start = json.loads((workdir / "start" / "results.json").read_text())
    rows, missing = [], []
    for member in everyone:
        path = workdir / "members" / member.folder / "results.json"
        if path.exists():
            rows.append(_row(member, json.loads(path.read_text())))
        else:
            missing.append(member.folder)
    results = {
        "experiment": name,
        **{key: start[key] for key in ("dataset", "model", "device", "machine", "versions")},
        "technology": f"{hwmodel.HOROWITZ_45NM.node_nm:g} nm",
        "array": start["accelerator"]["array"],
        "start": start["top1_percent"],
        "comparison": dataclasses.asdict(config),
        "config": start["config"],
        "rows": rows,
        "missing": missing,
    }
    write_json(workdir / "results.json", results)
    return results


def summary(results: Mapping[str, Any], *, ablation: bool = False) -> pd.DataFrame:
    """The members' results by method and terms, in percent, averaged over seeds.

    Returns:
      A row for each method and terms per weight: ``top1`` (mean), ``spread`` (standard deviation
      over seeds, NaN for one), ``seeds``, ``loss`` (points below the float baseline of the same
      steps, mean over the same seeds), ``projected`` (before retraining), ``saving``.
    """
    rows = pd.DataFrame(results["rows"])
    baseline = rows[rows["method"] == "float"].set_index("seed")["top1"]
    rows["loss"] = rows["seed"].map(baseline) - rows["top1"]
    rows = rows[rows["ablation"] == ablation]
    table = rows.groupby(["terms", "method"], sort=False, dropna=False).agg(
        top1=("top1", "mean"),
        spread=("top1", "std"),
        seeds=("top1", "size"),
        loss=("loss", "mean"),
        projected=("projected", "mean"),
        terms_held=("terms_held", "mean"),
        saving=("saving", "mean"),
        saving_with_encoder=("saving_with_encoder", "mean"),
    )
    return table.reset_index()


def parse_base(config: Any) -> Config:
    """The configuration that ``base`` and ``settings`` of a comparison name.

    Raises:
      ConfigError: the base is no training experiment, or a setting is wrong.
    """
    from experiments import configs

    base = configs.load(config.base).CONFIG
    if not isinstance(base, Config):
        raise ConfigError(f"base={config.base} is no training experiment")
    return override(base, config.settings.split())
