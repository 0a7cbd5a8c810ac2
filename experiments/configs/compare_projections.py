"""Accuracy of every way to project, before any retraining, from one float model.

Greedy is term revealing (Kung et al., SC20). The exact projection has the smaller error in the
weights, which is not yet the smaller error in the network: scales searched at the budget, errors
weighted by squared gradients, bias correction, BatchNorm statistics and compensation each add to
it. The float model is what ``init_from`` holds, or trained for ``float_epochs`` first:

    python -m experiments.run --exp=compare_projections \\
        --set "settings=data=folder data_dir=cifar10 init_from=float.safetensors float_epochs=0"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pandas as pd
from flax import nnx
from rich.console import Console

import stp_jax
from experiments.comparison import parse_base
from experiments.config import ConfigError
from experiments.runtime.log import write_json
from stp_jax.terms import project


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Settings of the comparison."""

    base: str = "stp_resnet20_cifar10"  # the experiment whose model and data are used
    settings: str = ""  # changes of the base's configuration, as "data=folder data_dir=…"
    points: tuple[float, ...] = (2.0, 1.0, 0.75, 0.5)  # terms per weight, the same in every layer

    def __post_init__(self) -> None:  # noqa: D105
        if any(not 0 < point <= 4 for point in self.points):
            raise ConfigError(f"points must be terms per weight in (0, 4], got {self.points}")


CONFIG = ProjectionConfig()


def _quantized(context: Any, model: nnx.Module, **changes: Any) -> nnx.Module:
    """The float model with calibrated inputs and all its terms."""
    from experiments.context import make_policy

    config = dataclasses.replace(context.config, **changes)
    stp = stp_jax.quantize(model, make_policy(config, model))
    stp_jax.calibrate(stp, [batch["input"] for batch in context.calibration_batches()])
    return stp


def _weigh(model: nnx.Module, importance: Mapping[str, Any]) -> None:
    """Puts the kernels on the few-term values of least weighted error, scales included."""
    importance = {path: importance[path] + jnp.float32(1e-12) for path in stp_jax.budgets(model)}
    stp_jax.search_weight_scales(model, importance=importance)
    for path, layer in stp_jax.quantized_layers(model).items():
        rule, axes = layer.rule, layer.format.axes.groups
        if rule.budget is None:
            continue
        kernel, weights = layer.kernel, importance[path]
        scale = layer.scale
        shape, axis = rule.format.layout(axes).merged(kernel.shape)
        integers = project(
            (kernel / scale).reshape(shape),
            group_size=rule.group_size,
            budget=layer.budget,
            axis=axis,
            limit=rule.format.largest,
            importance=weights.reshape(shape),
        )
        layer.kernel = scale * integers.reshape(kernel.shape).astype(kernel.dtype)


def _ways(context: Any, model: nnx.Module, budget: int) -> dict[str, nnx.Module]:
    """Name → the float model projected in that way."""
    from experiments import stages, train

    inputs = [batch["input"] for batch in context.calibration_batches()]
    exact = _quantized(context, model)
    budgets = dict.fromkeys(stp_jax.budgets(exact), budget)

    def at_budget(source: nnx.Module, *, search: bool = True) -> nnx.Module:
        result = nnx.clone(source)
        stp_jax.set_budgets(result, budgets)
        if search:
            stp_jax.search_weight_scales(result)
        return result

    greedy = _quantized(context, model, method="greedy", encoding="hese", budget=1)
    ways = {
        "greedy": at_budget(greedy, search=False),
        "exact": at_budget(exact, search=False),
        "greedy, scales searched": at_budget(greedy),
        "exact, scales searched": at_budget(exact),
    }
    weighted = at_budget(exact)
    _weigh(weighted, stages.squared_gradients(context, exact))
    ways["exact, scales searched, errors weighted"] = weighted
    for name in ("greedy, scales searched", "exact, scales searched"):
        corrected = nnx.clone(ways[name])
        stp_jax.correct_bias(corrected, inputs)
        ways[f"{name}, bias corrected"] = corrected
        normed = nnx.clone(ways[name])
        train.reestimate_batch_norm(context, normed)
        ways[f"{name}, BatchNorm re-estimated"] = normed
    compensated = nnx.clone(exact)
    stp_jax.compensate(compensated, inputs, budgets)
    ways["exact, compensated"] = nnx.clone(compensated)
    train.reestimate_batch_norm(context, compensated)
    ways["exact, compensated, BatchNorm re-estimated"] = compensated
    return ways


def run(config: ProjectionConfig, workdir: Path, console: Console) -> None:
    """Prints top-1 of every way at every budget and writes them to `results.json`."""
    from experiments import train
    from experiments.context import check_model, make_context, make_model

    base = parse_base(config)
    context = make_context(base, workdir, console)
    check_model(context)
    model = make_model(context)
    if base.float_epochs:
        training = train.Training("float", base.float_epochs, base.float_lr, in_float=True)
        model = train.train_stage(context, model, training)
    elif base.init_from is None:
        raise ConfigError("float_epochs=0 needs init_from, the weights to project")
    model.eval()
    split = "test" if base.test else "validation"
    top1: dict[str, dict[str, float]] = {}
    reference = {
        "float": train.evaluate(context, model, split),
        "int8": train.evaluate(context, _quantized(context, model), split),
    }
    console.print(", ".join(f"{name} {value:.2f} %" for name, value in reference.items()))
    for terms in config.points:
        budget = round(terms * base.group_size)
        ways = _ways(context, model, budget)
        for name, projected in ways.items():
            value = train.evaluate(context, projected, split)
            top1.setdefault(name, {})[f"{terms:g}"] = value
            console.print(f"{terms:g} terms per weight, {name}: {value:.2f} %", highlight=False)
    results = {
        "experiment": "compare_projections",
        "dataset": context.dataset.description,
        "model": base.model,
        "config": dataclasses.asdict(base),
        "comparison": dataclasses.asdict(config),
        "reference": reference,
        "split": split,
        "top1": top1,
    }
    write_json(workdir / "results.json", results)
    print(pd.DataFrame(top1).T.round(2).to_string())
