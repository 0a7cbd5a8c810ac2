"""Allocation of a total cost to layer-wise term budgets.

Each layer has an error curve over its budget (`error_curve`, weighted by the layer's sensitivity)
and a cost per term of budget: groups for a total of terms, or cycles or energy of one more term as
the accelerator model counts them. Where the curves are convex, as for the NAF, spending on the
largest gain per cost first is optimal: one water level cuts all curves.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np


def _check(curves, costs, total, minimum) -> None:
    if set(curves) != set(costs):
        raise ValueError(
            "curves and costs must name the same layers; only one has "
            + ", ".join(sorted(set(curves) ^ set(costs)))
        )
    if not np.isfinite(total):
        raise ValueError(f"the total must be a finite number, got {total}")
    for name, cost in costs.items():
        if not 0 < cost < np.inf:
            raise ValueError(f"layer {name!r}: the cost of a term must be positive, got {cost}")
        if not np.isfinite(curves[name]).all():
            raise ValueError(f"layer {name!r}: its error curve is not finite: {curves[name]}")
        if not 0 <= minimum < len(curves[name]):
            raise ValueError(
                f"layer {name!r}: minimum {minimum} is outside its budgets "
                f"[0, {len(curves[name]) - 1}]"
            )
    floor = sum(minimum * cost for cost in costs.values())
    if total < floor:
        raise ValueError(
            f"a total of {total:g} does not reach the minimum budget {minimum} of every layer, "
            f"which costs {floor:g}"
        )


def allocate_budgets(
    curves: Mapping[str, Sequence[float] | np.ndarray],
    costs: Mapping[str, float],
    total: float,
    *,
    minimum: int = 1,
) -> dict[str, int]:
    """Chooses each layer's budget so that the summed error is least within a total cost.

    Args:
      curves: layer → error at budget 0, 1, …, non-increasing (see `error_curve`).
      costs: layer → cost of one more term in each of its groups (groups, cycles or pJ).
      total: the cost that all layers may take together, in the unit of ``costs``.
      minimum: the least budget of a layer. 0 lets a layer vanish.

    Returns:
      layer → terms per group. Where the curves are convex, no allocation of the same or less cost
      has a smaller error; a layer whose next term would exceed the total stops there, and cheaper
      layers may go on.

    Raises:
      ValueError: curves and costs differ in their layers, a curve or the total is not finite, a
        cost is not positive, or the total does not reach the minimum budgets.

    >>> allocate_budgets({"a": [9, 4, 1, 0], "b": [5, 1, 0, 0]}, {"a": 1, "b": 1}, 3)
    {'a': 2, 'b': 1}
    """
    _check(curves, costs, total, minimum)
    budgets = dict.fromkeys(curves, minimum)
    left = total - sum(minimum * cost for cost in costs.values())

    def gain(name: str) -> float:
        k = budgets[name]
        return float(curves[name][k] - curves[name][k + 1]) / costs[name]

    def growing(name: str) -> bool:
        return budgets[name] + 1 < len(curves[name])

    # Entries are (−gain per cost, order of the layers, name): ties go to the layer named first.
    queue = [(-gain(name), i, name) for i, name in enumerate(curves) if growing(name)]
    heapq.heapify(queue)
    while queue:
        negative, order, name = heapq.heappop(queue)
        if negative >= 0 or costs[name] > left * (1 + 1e-12):
            continue
        budgets[name] += 1
        left -= costs[name]
        if growing(name):
            heapq.heappush(queue, (-gain(name), order, name))
    return budgets


def round_budgets(
    relaxed: Mapping[str, float],
    costs: Mapping[str, float],
    total: float,
    *,
    largest: int,
    minimum: int = 1,
) -> dict[str, int]:
    """The whole budgets nearest to relaxed ones, in summed squares, within a total cost.

    Args:
      relaxed: layer → real terms per group.
      costs: layer → cost of one more term in each of its groups.
      total: the cost that all layers may take together, in the unit of ``costs``.
      largest: the most terms that a group can need.
      minimum: the least budget of a layer.

    Returns:
      layer → terms per group.

    Raises:
      ValueError: as by `allocate_budgets`.

    >>> round_budgets({"a": 2.6, "b": 3.4}, {"a": 1, "b": 1}, 6, largest=8)
    {'a': 3, 'b': 3}
    """
    curves = {name: (np.arange(largest + 1) - float(k)) ** 2 for name, k in relaxed.items()}
    return allocate_budgets(curves, costs, total, minimum=minimum)
