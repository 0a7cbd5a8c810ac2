"""Sensitivity estimates against the measured rise of the loss, layer by layer.

    python benchmarks/sensitivity.py --exp stp_resnet20_cifar10 --set data=folder data_dir=… \\
        init_from=float.safetensors [--budgets 8 4 2] [--out FILE.json]

Each layer alone is projected, its scales searched, and the loss measured on the calibration
examples (training images drawn at random), with the batches' statistics in BatchNorms, as a
projected model's are measured again. Beside the rise stand the estimates that an allocator could
use: the squared error of the kernel, the same relative to the kernel, weighted by squared gradients
(empirical Fisher), and the divergence of the outputs, which needs no labels, with the batches' and
with the running statistics. Printed are their rank (Spearman) and linear (Pearson) correlations
with the rise over the layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.stats
from flax import nnx
from rich.console import Console

import stp_jax
from experiments import configs, stages
from experiments.config import override
from experiments.context import make_context, make_model, make_policy
from experiments.train import make_loss
from stp_jax import hooks


def quantized(context: Any) -> nnx.Module:
    """The float model with calibrated inputs and all its terms."""
    model = make_model(context)
    model.eval()
    stp = stp_jax.quantize(model, make_policy(context.config, model))
    stp_jax.calibrate(stp, [batch["input"] for batch in context.calibration_batches()])
    return stp


def losses(context: Any, model: nnx.Module):
    """state of a model → its mean loss on the calibration examples."""
    graphdef, _ = nnx.split(model)
    plain = make_loss(context.config, distill=0.0)
    batches = context.calibration_batches()

    normed = hooks.Hooks(batch_statistics=True)

    @jax.jit
    def loss(state: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        model = hooks.attach(nnx.merge(graphdef, state), normed)
        return plain(model(batch["input"]), batch["label"], None)

    return lambda model: float(np.mean([loss(nnx.split(model)[1], b) for b in batches]))


def rises(context: Any, model: nnx.Module, budget: int) -> pd.DataFrame:
    """The rise of the loss and every estimate of it, a row a layer."""
    loss = losses(context, model)
    before, squares = loss(model), stages.squared_gradients(context, model)
    inputs = [batch["input"] for batch in context.calibration_batches()]
    divergences, running = (
        stp_jax.output_divergences(model, inputs, budget, batch_statistics=own)
        for own in (True, False)
    )
    rows = {}
    for path in divergences:
        changed = nnx.clone(model)
        stp_jax.set_budgets(changed, {path: budget})
        layer = stp_jax.quantized_layers(changed)[path]
        layer.search_scale(None)
        error = (layer.projected() - layer.kernel) ** 2
        rows[path] = {
            "rise": loss(changed) - before,
            "squared error": float(jnp.sum(error)),
            "relative error": float(jnp.sum(error) / jnp.sum(layer.kernel**2)),
            "Fisher": float(jnp.sum(error * squares[path])),
            "divergence": divergences[path],
            "… running stat.": running[path],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp", default="stp_resnet20_cifar10")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--out", type=Path, help="JSON of every layer's figures")
    options = parser.parse_args()
    config = override(configs.load(options.exp).CONFIG, options.set)
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(config, Path(folder), Console(quiet=True))
        model = quantized(context)
        tables = {budget: rises(context, model, budget) for budget in options.budgets}
    print(context.dataset.description)
    for budget, table in tables.items():
        print(f"\nbudget {budget} of groups of {config.group_size}, {len(table)} layers:")
        for name in table.columns[1:]:
            rank = scipy.stats.spearmanr(table["rise"], table[name])[0]
            linear = np.corrcoef(table["rise"], table[name])[0, 1]
            print(f"  {name:15} rank {rank:6.3f}  linear {linear:6.3f}")
    if options.out:
        figures = {budget: table.to_dict(orient="index") for budget, table in tables.items()}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
