"""Budgets for a whole model: its error curves, and the total that layers or filters share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from stp_jax.quant.budgets import budgets
from stp_jax.quant.calibration import call_model
from stp_jax.quant.layers import quantized_layers
from stp_jax.quant.sensitivity import (
    Granularity,
    LayerDivergences,
    error_curves,
    group_counts,
)
from stp_jax.terms.budgets import allocate_budgets


def normalized_costs(model: Any, costs: Mapping[str, float]) -> dict[str, float]:
    """Costs by layer, in units of what one term per weight in all of these layers costs.

    Args:
      model: an STP model.
      costs: layer path → cost of one more term in each of the layer's groups, in any unit.
    """
    layers, groups = quantized_layers(model), group_counts(model)
    # One term per weight is size / groups terms in every group.
    whole = sum(cost * layers[path].kernel.size / groups[path] for path, cost in costs.items())
    return {path: cost / whole for path, cost in costs.items()}


def storage_costs(model: Any) -> dict[str, float]:
    """Storage of one term per group, by layer with a budget rule; see `normalized_costs`."""
    groups = group_counts(model)
    return normalized_costs(model, {path: float(groups[path]) for path in budgets(model)})


def allocate(
    model: Any,
    total: float,
    *,
    costs: Mapping[str, float] | None = None,
    importance: Mapping[str, jax.Array] | None = None,
    by: Granularity = "layer",
    minimum: int = 1,
    step: int = 1,
) -> dict[str, Any]:
    """Budgets of least weighted error by layer or by filter, within a total cost.

    Args:
      model: an STP model whose rules use the NAF and optimal projection (a Linen one with its
        variables); it is not changed.
      total: the cost that all layers may take together. In the units of `stp_jax.term_costs` it is
        a number of terms per weight: what uniform budgets of that many take.
      costs: layer path → cost of one more term per group; terms to store by default.
        `stp_jax.term_costs` has those of the accelerator. A layer's filters take equal shares.
      importance: weights of the squared errors by layer, as `measured_importance` has them; ones
        by default.
      by: ``layer`` gives one budget to all filters of a layer, ``filter`` gives each its own.
      minimum: the least budget of a layer or filter.
      step: budgets are multiples of it, as PEs of so many lanes run them without idle slots.

    Returns:
      Layer path → terms per group, for `set_budgets`: an integer, or an int32 array ``[filters]``.

    Raises:
      ValueError: as by `error_curves` and `stp_jax.terms.allocate_budgets`, or there is no such
        granularity.

    >>> import stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    >>> stp_jax.allocate(model, 0.5)
    {'': 4}
    >>> stp_jax.allocate(model, 0.5, by="filter")[""].sum()
    np.int64(16)
    """
    curves = error_curves(model, importance=importance, by=by)
    return _share(model, total, curves, costs, minimum=minimum, step=step)


def _share(
    model: Any,
    total: float,
    curves: Mapping[str, np.ndarray],
    costs: Mapping[str, float] | None,
    **limits: int,
) -> dict[str, Any]:
    """Budgets of least error by these curves, as `allocate` has them."""
    costs = storage_costs(model) if costs is None else costs
    unknown = sorted(set(costs) - set(curves))
    if unknown:
        raise ValueError(f"costs name no quantized layer: {', '.join(unknown)}")
    return allocate_budgets({path: curves[path] for path in costs}, costs, total, **limits)


def allocate_by_divergence(
    model: Any,
    total: float,
    batches: Iterable[Any],
    *,
    costs: Mapping[str, float] | None = None,
    by: Granularity = "filter",
    minimum: int = 1,
    step: int = 1,
    rounds: int = 3,
    call: Callable[[Any, Any], jax.Array] = call_model,
    batch_statistics: bool = True,
) -> dict[str, Any]:
    """Budgets by `allocate`, errors weighted by what they do to the model's outputs.

    What a unit of a layer's error does is measured as `output_divergences` at uniform budgets of
    half the total, then at the budgets that were allocated by it, and so on: it is not the same at
    all budgets, and few terms are where it counts. Each round's weights are the geometric means of
    the last ones and of those measured.

    Args:
      model: as for `output_divergences`: in evaluation mode and calibrated; its rules are those of
        `allocate`. It is not changed.
      total: as for `allocate`.
      batches: inputs, without labels, each given to the model as its only argument. A few hundred
        examples do.
      costs: as for `allocate`.
      by: likewise.
      minimum: likewise.
      step: likewise.
      rounds: how often to measure, at least once.
      call: as for `output_divergences`.
      batch_statistics: likewise.

    Returns:
      Layer path → terms per group, for `set_budgets`: an integer, or an int32 array ``[filters]``.

    Raises:
      ValueError: as by `allocate` and `output_divergences`, or rounds is below 1.
      TypeError: batches is an array.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")

    curves = error_curves(model, by=by)

    def allocated(weights: Mapping[str, float | None]) -> dict[str, Any]:
        weighted = {path: (weights.get(path) or 1.0) * curve for path, curve in curves.items()}
        return _share(model, total, weighted, costs, minimum=minimum, step=step)

    allocated({})  # which refuses what does not fit before anything is measured
    single = LayerDivergences(model, batches, call=call, batch_statistics=batch_statistics)
    half = _half(model, total)
    weights = single.weights(half)
    found = allocated(weights)
    for _ in range(rounds - 1):
        for path, new in single.weights({**half, **found}).items():
            old = weights[path]
            weights[path] = math.sqrt(old * new) if old and new else old or new
        found = allocated(weights)
    return found


def _half(model: Any, total: float) -> dict[str, int]:
    """Uniform budgets of half of so many terms per weight, where layers differ most."""
    layers, found = quantized_layers(model), {}
    for path in budgets(model):
        rule = layers[path].rule
        half = max(1, round(total * rule.group_size / 2))
        found[path] = min(half, rule.format.max_budget)
    return found
