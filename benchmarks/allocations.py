"""Allocations of one resource, compared by the projected model that each leaves.

    python benchmarks/allocations.py --exp stp_resnet20_cifar10 --set data=folder data_dir=… \\
        init_from=float.safetensors terms_per_weight=0.5 allocate_for=energy [--out FILE.json]

For every allocation the int8 model is projected onto the budgets, scales are searched and BatchNorm
statistics measured again; nothing is retrained. Printed are the divergence of its outputs from the
int8 model's on the calibration examples, which needs no labels, its validation top-1, and the
saving by gates of the best group PE in the layers with budgets. ``budget_step=2`` is for PEs of two
lanes; ``--only outputs`` leaves out allocations without the word in their names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console

import stp_jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.sensitivity import quantized
from experiments import configs, stages
from experiments.config import override
from experiments.context import make_context
from experiments.report import best_pe_in_layers, layers_by_gates
from experiments.train import evaluate, reestimate_batch_norm


def allocations(
    context: Any, model: nnx.Module, inputs: Any
) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name, what allocates the configuration's terms per weight."""
    c = context.config
    total = c.terms_per_weight
    shared: dict[str, Any] = {"costs": stages.run_costs(context, model), "step": c.budget_step}

    def by_outputs(**options: Any) -> Callable[[], dict[str, Any]]:
        return lambda: stp_jax.allocate_by_divergence(model, total, inputs, **shared, **options)

    def by_errors(by: Any, weigh: Callable[[], Any] = lambda: None) -> Callable:
        return lambda: stp_jax.allocate(model, total, importance=weigh(), by=by, **shared)

    def gradients() -> Any:
        return stages.squared_gradients(context, model)

    found = {
        f"by {by}, {title}": allocate
        for by in ("layer", "filter")
        for title, allocate in {
            "plain errors": by_errors(by),
            "squared gradients": by_errors(by, gradients),
            "outputs, running statistics, measured once": by_outputs(
                by=by, rounds=1, batch_statistics=False
            ),
            "outputs, measured once": by_outputs(by=by, rounds=1),
            "outputs, measured 2 times": by_outputs(by=by, rounds=2),
            "outputs, measured 3 times": by_outputs(by=by),
        }.items()
    }
    budget = total * c.group_size
    if budget == round(budget):
        uniform = dict.fromkeys(stp_jax.budgets(model), round(budget))
        found = {"uniform": lambda: uniform, **found}
    return found


def saving_in_layers(context: Any, model: nnx.Module) -> float:
    """By gates, in the layers with budgets: int8 dot products of eight over the best group PE."""
    cost = stp_jax.evaluate_model(model, context.dataset.example_input())
    by_gates = {"budgeted_layers_by_gates": layers_by_gates(cost, model, context.config)}
    best = best_pe_in_layers(by_gates, on_group_pes=True)
    return float("nan") if best is None else best["saving"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp", default="stp_resnet20_cifar10")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    config = override(configs.load(options.exp).CONFIG, options.set)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(config, Path(folder), Console(quiet=True))
        model = quantized(context)
        print(context.dataset.description)
        inputs = stages.whole_inputs(context)
        print(f"int8: validation {evaluate(context, model, 'validation'):.2f} %", flush=True)
        for name, allocate in allocations(context, model, inputs).items():
            if options.only not in name:
                continue
            projected = nnx.clone(model)
            stp_jax.set_budgets(projected, allocate())
            stp_jax.search_weight_scales(projected, slack=config.scale_slack)
            reestimate_batch_norm(context, projected)
            found = figures[name] = {
                "divergence": stp_jax.output_divergence(projected, model, inputs),
                "validation": evaluate(context, projected, "validation"),
                "saving_in_layers": saving_in_layers(context, projected),
            }
            print(
                f"{name:52} {found['divergence']:.4f} nats, {found['validation']:.2f} %, "
                f"{found['saving_in_layers']:.2f}×",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
