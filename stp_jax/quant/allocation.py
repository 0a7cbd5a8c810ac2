"""Budgets by layer for a whole model: what a term costs in each layer, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from stp_jax.quant.budgets import budgets
from stp_jax.quant.layers import quantized_layers
from stp_jax.quant.sensitivity import error_curves, group_counts
from stp_jax.terms.budgets import allocate_budgets

# What budgets share out: terms to store, the array's cycles or energy, or terms and energy in equal
# parts.
Resource = Literal["terms", "cycles", "energy", "balanced"]


def term_costs(
    model: nnx.Module,
    *,
    per: Resource = "terms",
    example: Any = None,
    array: Any = None,
) -> dict[str, float]:
    """What one more term per group costs in each layer that has a budget rule.

    Costs are shares of what one term in every weight of these layers costs, so that budgets of a
    total cost t take as much as t terms per weight everywhere. For ``cycles`` and ``energy`` the
    accelerator model is asked, for a second term in every group.

    Args:
      model: an STP model.
      per: ``terms`` (each weight counts once), ``cycles`` or ``energy`` of the array (each use
        counts), or ``balanced``, the mean of terms and energy.
      example: one input, or its shape and dtype, for all but ``terms``.
      array: a `stp_jax.hwmodel.Array` of group PEs; by default 32×32, with the groups of the first
        rule.

    Returns:
      Layer path → cost per term, without unit.

    Raises:
      ValueError: per is none of these, the example is missing where it is needed, or layers are
        stacked.
    """
    if per not in get_args(Resource):
        raise ValueError(f"per must be one of {', '.join(get_args(Resource))}, got {per!r}")
    if per != "terms" and example is None:
        raise ValueError(f"per={per!r} needs an example input, whose shape gives the layers' sizes")
    paths, layers = list(budgets(model)), quantized_layers(model)
    groups = group_counts(model)
    sizes = {path: layers[path].kernel.size for path in paths}
    if per == "balanced":
        both = [term_costs(model, per=one, example=example, array=array) for one in _BALANCED]
        return {path: float(np.mean([costs[path] for costs in both])) for path in paths}
    if per == "terms":
        costs = {path: float(groups[path]) for path in paths}
    else:
        costs = _array_costs(model, paths, per, example, array)
    # One term in every weight is size / groups terms in every group.
    whole = sum(costs[path] * sizes[path] / groups[path] for path in paths)
    return {path: cost / whole for path, cost in costs.items()}


_BALANCED: tuple[Resource, Resource] = ("terms", "energy")


def _array_costs(
    model: nnx.Module, paths: list[str], per: Resource, example: Any, array: Any
) -> dict[str, float]:
    from stp_jax import hwmodel  # the accelerator model is not needed for anything else here

    if array is None:
        rule = quantized_layers(model)[paths[0]].rule
        pe = hwmodel.GroupPE(
            group_size=rule.group_size, encoding=rule.encoding, bits=rule.bits, grouping="channels"
        )
        array = hwmodel.Array(rows=32, cols=32, pe=pe)
    network = hwmodel.trace(model, example)

    def cost(budget: int) -> np.ndarray:
        report = hwmodel.evaluate(network, array, budgets=budget)
        return np.asarray(report.cycles if per == "cycles" else report.energy_pj["array"])

    costs = dict.fromkeys(paths, 0.0)
    for name, more in zip(network.names, cost(2) - cost(1), strict=True):
        path = name.partition("@")[0]  # a shared module is used again as path@2
        if path in costs:
            costs[path] += float(more)
    unused = [path for path, c in costs.items() if not c]
    if unused:
        raise ValueError(f"the model does not use layer {unused[0]!r} on this example")
    return costs


def allocate(
    model: nnx.Module,
    terms_per_weight: float,
    *,
    per: Resource = "terms",
    importance: Mapping[str, jax.Array] | None = None,
    example: Any = None,
    array: Any = None,
) -> dict[str, int]:
    """Budgets by layer of least weighted error, for a total of terms, cycles or energy.

    Args:
      model: an STP model whose rules use the NAF and optimal projection; it is not changed.
      terms_per_weight: the total: what so many terms in every weight would take of ``per``.
      per: what is shared out (see `term_costs`).
      importance: weights of the squared errors by layer, best `squared_gradients`; ones by default.
      example: as for `term_costs`.
      array: as for `term_costs`.

    Returns:
      Layer path → terms per group, for `set_budgets`. At least one in each layer.

    Raises:
      ValueError: as by `term_costs`, `error_curves` and `stp_jax.terms.allocate_budgets`.

    >>> import stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    >>> stp_jax.allocate(model, 0.5)
    {'': 4}
    """
    costs = term_costs(model, per=per, example=example, array=array)
    curves = error_curves(model, importance=importance)
    return allocate_budgets({path: curves[path] for path in costs}, costs, terms_per_weight)
