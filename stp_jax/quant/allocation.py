"""Budgets for a whole model: its error curves, and the total that layers or filters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from stp_jax.quant.budgets import budgets
from stp_jax.quant.layers import quantized_layers
from stp_jax.quant.sensitivity import Granularity, error_curves, group_counts
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
) -> dict[str, Any]:
    """Budgets of least weighted error by layer or by filter, within a total cost.

    Args:
      model: an STP model whose rules use the NAF and optimal projection (a Linen one with its
        variables); it is not changed.
      total: the cost that all layers may take together. In the units of `stp_jax.term_costs` it is
        the mean number of terms per weight.
      costs: layer path → cost of one more term per group; terms to store by default.
        `stp_jax.term_costs` has those of the accelerator. A layer's filters take equal shares.
      importance: weights of the squared errors by layer, best `squared_gradients`; ones by default.
      by: ``layer`` gives one budget to all filters of a layer, ``filter`` gives each its own.
      minimum: the least budget of a layer or filter.

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
    costs = storage_costs(model) if costs is None else costs
    curves = error_curves(model, importance=importance, by=by)
    unknown = sorted(set(costs) - set(curves))
    if unknown:
        raise ValueError(f"costs name no quantized layer: {', '.join(unknown)}")
    return allocate_budgets({path: curves[path] for path in costs}, costs, total, minimum=minimum)
