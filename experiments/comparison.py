"""A comparison: several methods compress one float model, each with the same steps and recipe.

The start is shared: one float model is trained (or fine-tuned from published weights), and every
member of the comparison, the float baseline included, trains for the same number of steps from it,
with the same learning rates and soft labels. Members are those of a sweep (`experiments.sweep`), so
a finished one is not run again, and calling a comparison with more methods, points, steps or seeds
adds members to it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import scipy.stats
from rich.console import Console

from experiments.config import Config, ConfigError, override
from experiments.report import best_pe_in_layers
from experiments.runtime.log import write_json
from experiments.runtime.workdir import check_run
from experiments.sweep import Member, run_members

ALL_TERMS = 4  # per weight: what an 8-bit NAF value has at most; such a budget prunes nothing
_SHARES = ("guided", "budgeted")  # stages that may take a share of a member's steps
_START = Member({}, {"method": "start"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method: changes of the base's configuration.

    In its settings ``{terms}`` stands for terms per weight and ``{budget}`` for terms per group; a
    method with neither is run once for all points.
    """

    title: str  # in tables and plots
    settings: str  # as for --set
    kind: Literal["baseline", "ours", "rival", "part"]  # a part: ours with one thing changed
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)  # stage → of the steps
    trained: bool = True
    # Whether group PEs run it; if not, dot products of its dense weights do (by gates alone).
    on_group_pes: bool = True
    stage: str = "retrained"  # whose accuracy counts
    reference: str | None = None  # the method that it is set against: of a part, without the change

    def at(self, terms: float, group_size: int) -> dict[str, str] | None:
        """The settings at so many terms per weight; None where its budget is no whole number."""
        pairs = dict(setting.partition("=")[::2] for setting in self.settings.split())
        budget = terms * int(pairs.get("group_size", group_size))
        if "{budget}" in self.settings and budget != round(budget):
            return None
        return {k: v.format(terms=f"{terms:g}", budget=round(budget)) for k, v in pairs.items()}

    @property
    def has_points(self) -> bool:
        """Whether it depends on the number of terms."""
        return "{" in self.settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Settings of the comparison."""

    base: str = "stp_resnet20_cifar10"  # the experiment whose model, data and rates are used
    settings: str = ""  # changes of the base's configuration, as "data=folder data_dir=…"
    start_epochs: float = 1.0  # float training of the shared start
    batch_size: int = 64  # of the members' steps
    test: bool = True  # read the test examples; false while choosing

    # Run it again with other values to add members.
    methods: tuple[str, ...] = ()  # by name; all by default
    points: tuple[float, ...] = (1.0, 0.5, 0.375, 0.25)  # terms per weight
    steps: tuple[int, ...] = (300,)  # of every member, from the start
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    jobs: int = 1  # members at a time, each in a process of its own

    BOOKKEEPING: ClassVar = ("methods", "points", "steps", "seeds", "jobs")

    def __post_init__(self) -> None:  # noqa: D105
        for key in ("batch_size", "jobs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, got {getattr(self, key)}")
        if self.start_epochs < 0:
            raise ConfigError(f"start_epochs must be 0 or more, got {self.start_epochs}")
        if any(not 0 < point <= ALL_TERMS for point in self.points):
            raise ConfigError(
                f"points must be terms per weight in (0, {ALL_TERMS}], got {self.points}"
            )
        if any(number < 1 for number in self.steps):
            raise ConfigError(f"steps must be 1 or more, got {self.steps}")
        for key in ("points", "steps", "seeds"):
            if not getattr(self, key):
                raise ConfigError(f"{key} must have a value")


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


def choose(config: ComparisonConfig, methods: Mapping[str, Method]) -> dict[str, Method]:
    """The methods that a configuration names.

    Raises:
      ConfigError: there is no such method.
    """
    unknown = [name for name in config.methods if name not in methods]
    if unknown:
        raise ConfigError(f"methods must be among {', '.join(methods)}, got {', '.join(unknown)}")
    return {name: methods[name] for name in config.methods or methods}


def members(
    config: ComparisonConfig, base: Config, methods: Mapping[str, Method], start: Path, epoch: int
) -> Iterator[Member]:
    """The runs of a comparison, seed by seed.

    Args:
      config: what to run.
      base: what all members share.
      methods: by name, the chosen ones.
      start: the shared float model's file.
      epoch: steps in an epoch at the members' batch size.
    """
    for seed, steps in itertools.product(config.seeds, config.steps):
        for name, method in methods.items():
            for terms in config.points if method.has_points else (None,):
                own = method.at(ALL_TERMS if terms is None else terms, base.group_size)
                if own is None:
                    continue
                parts = {stage: round(method.shares.get(stage, 0) * steps) for stage in _SHARES}
                parts["retrain"] = steps - sum(parts.values()) if method.trained else 0
                labels = {"method": name, "terms": terms, "steps": steps, "seed": seed}
                settings = {
                    **({} if terms is None else {"terms_per_weight": f"{terms:g}"}),
                    **own,
                    **{f"{stage}_epochs": repr(number / epoch) for stage, number in parts.items()},
                    "float_epochs": "0",
                    "seed": str(seed),
                    "init_from": str(start),
                    "measured": method.stage,
                    "check_integers": "false",
                    "log_every": "25",
                    "checkpoint_every": "1000",
                }
                yield Member(settings, {k: v for k, v in labels.items() if v is not None})


def run_comparison(
    config: ComparisonConfig,
    methods: Mapping[str, Method],
    workdir: Path,
    name: str,
    console: Console,
) -> dict[str, Any]:
    """Runs what is missing and gathers everything; returns what `results.json` holds.

    Raises:
      ConfigError: the settings do not fit together.
    """
    base, chosen = parse_base(config), choose(config, methods)
    runs = workdir / "members"
    shared = [
        *config.settings.split(),
        f"batch_size={config.batch_size}",
        f"test={str(config.test).lower()}",
    ]
    options: dict[str, Any] = {"name": config.base, "workdir": runs, "console": console}
    begin = ["float", "int8", "allocated"]
    settings = {
        "float_epochs": repr(config.start_epochs),
        "stages": ",".join(begin),
        "budget": str(base.max_budget),
    }
    start = dataclasses.replace(_START, settings=settings)
    check = functools.partial(check_run, name=config.base, ignore=("init_from",))  # folders move
    check(runs / start.name, config=override(base, [*shared, *start.arguments]))
    status = run_members([start], shared=shared, **options)
    folder = runs / start.name
    if status[start].startswith("failed"):
        raise ConfigError(f"the float model of the comparison {status[start]}")
    found = json.loads((folder / "results.json").read_text())
    epoch = found["examples"]["train"] // config.batch_size
    everyone = list(members(config, base, chosen, folder / "float.safetensors", epoch))
    for member in everyone:
        try:
            check(runs / member.name, config=override(base, [*shared, *member.arguments]))
        except ConfigError as error:
            raise ConfigError(f"member {member.name}: {error}") from None
    labels = _add_labels(workdir, everyone)  # first, so that an interrupted call's members count
    run_members(everyone, shared=shared, jobs=config.jobs, **options)
    return gather(config, methods, workdir, name, labels)


# --- Gathering ------------------------------------------------------------------------------------


def _row(labels: Mapping[str, Any], method: Method, results: Mapping[str, Any]) -> dict[str, Any]:
    def at(split: str, stage: str) -> float | None:
        return (results[split] or {}).get(stage)

    in_layers = best_pe_in_layers(results, on_group_pes=method.on_group_pes) or {}
    costs = {
        "saving_by_gates": (results["by_gates"] or {}).get("saving"),
        "saving": results["computational_energy_saving"],
        "saving_with_encoder": results["computational_energy_saving_with_encoder"],
        "cycles": results["accelerator"]["group_pe"]["cycles"],
    }
    return {
        **{"terms": None, **labels},
        "validation": at("validation_top1_percent", method.stage),
        "test": at("top1_percent", method.stage),
        "terms_held": results["terms_per_weight"]["budgeted_layers"],
        **(costs if method.on_group_pes else dict.fromkeys(costs)),
        "saving_in_layers": in_layers.get("saving"),
        "saving_in_layers_with_encoder": in_layers.get("saving_with_encoder"),
        "terms_by_layer": results["terms_per_weight"]["by_layer"],
    }


def _add_labels(workdir: Path, members: Iterable[Member]) -> dict[str, dict[str, Any]]:
    """The labels of all members by their folders, these and those of earlier calls; on disk too."""
    index = workdir / "members.json"
    labels = json.loads(index.read_text()) if index.exists() else {}
    labels |= {member.name: dict(member.labels) for member in members}
    write_json(index, labels)
    return labels


def gather(
    config: ComparisonConfig,
    methods: Mapping[str, Method],
    workdir: Path,
    name: str,
    labels: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes `results.json`: what was run, a row for each finished member, and the missing ones.

    Labels of members are by their folders; those of earlier calls in the same workdir count.
    """
    runs = workdir / "members"
    start = json.loads((runs / _START.name / "results.json").read_text())
    rows, missing = [], []
    for folder, label in labels.items():
        path = runs / folder / "results.json"
        if path.exists() and label["method"] in methods:
            rows.append(_row(label, methods[label["method"]], json.loads(path.read_text())))
        else:
            missing.append(folder)
    copied = ("dataset", "examples", "model", "device", "machine", "versions")
    results = {
        "experiment": name,
        **{key: start[key] for key in copied},
        "technology": start["accelerator"]["technology"],
        "array": start["accelerator"]["array"],
        "start": {key: start[key] for key in ("validation_top1_percent", "top1_percent")},
        "comparison": dataclasses.asdict(config),
        "config": start["config"],
        "methods": {name: dataclasses.asdict(method) for name, method in methods.items()},
        "rows": rows,
        "missing": missing,
    }
    write_json(workdir / "results.json", results)
    return results


# --- Statistics -----------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % confidence interval (Student's t); NaN for one value.

    Values that are NaN, as differences of seeds without a pair, do not count.

    >>> round(interval([1.0, 2.0, float("nan"), 3.0]), 3)
    2.484
    """
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    n = len(known)
    if n < 2:
        return float("nan")
    return float(scipy.stats.t.ppf(0.975, n - 1) * np.std(known, ddof=1) / np.sqrt(n))


def summary(results: Mapping[str, Any], split: str = "test") -> pd.DataFrame:
    """Accuracies by method, terms and steps, in percent, over seeds.

    Args:
      results: what `gather` returned.
      split: "test" or "validation".

    Returns:
      A row for each method, terms per weight and steps: ``top1`` (mean), ``interval`` (half of the
      95 % one), ``seeds``, ``loss`` (mean points below the float baseline of the same steps and
      seed) with ``loss_interval``, ``change`` (points over its reference, paired by
      seed) with ``change_interval`` and the number of ``pairs``, and means of the terms held, the
      savings and the cycles.
    """
    rows = pd.DataFrame(results["rows"]).rename(columns={split: "top1"})
    rows = rows[rows["top1"].notna()]
    baseline = pd.Series("float", rows.index)
    rows["loss"] = _paired(rows, baseline, points=False) - rows["top1"]
    references = rows["method"].map(lambda name: results["methods"][name]["reference"])
    rows["change"] = rows["top1"] - _paired(rows, references, points=True)
    groups = rows.groupby(["method", "terms", "steps"], sort=False, dropna=False)
    table = groups.agg(
        top1=("top1", "mean"),
        interval=("top1", interval),
        seeds=("top1", "size"),
        loss=("loss", "mean"),
        loss_interval=("loss", interval),
        change=("change", "mean"),
        change_interval=("change", interval),
        pairs=("change", "count"),
        terms_held=("terms_held", "mean"),
        saving_by_gates=("saving_by_gates", "mean"),
        saving_in_layers=("saving_in_layers", "mean"),
        saving_in_layers_with_encoder=("saving_in_layers_with_encoder", "mean"),
        saving=("saving", "mean"),
        saving_with_encoder=("saving_with_encoder", "mean"),
        cycles=("cycles", "mean"),
    )
    return table.reset_index()


def _paired(rows: pd.DataFrame, references: pd.Series, *, points: bool) -> pd.Series:
    """Top-1 of each row's reference method with the same seed and steps (and terms)."""
    keys = ["method", "steps", "seed", *(["terms"] if points else [])]
    known = rows.drop_duplicates(keys).set_index(keys)["top1"]
    wanted = zip(references, *(rows[key] for key in keys[1:]), strict=True)
    return pd.Series([known.get(key, np.nan) for key in wanted], rows.index)
