"""Allocation of a total cost to term budgets by layer or by filter.

Each layer, or each of its filters, has an error curve over its budget (`error_curve`, weighted by
its sensitivity) and a cost per term of budget: groups for a total of terms, or cycles or energy of
one more term as the accelerator model counts them. Where the curves are convex, as for the NAF,
spending on the largest gain per cost first is optimal: one water level cuts all curves.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Curve = Sequence[float] | np.ndarray

# What rounding may add up to over all terms, as a fraction of the total.
_ROUNDING = 1e-10


def _check(curves, costs, total, minimum, step) -> None:
    if set(curves) != set(costs):
        raise ValueError(
            "curves and costs must name the same layers; only one has "
            + ", ".join(sorted(set(curves) ^ set(costs)))
        )
    if not np.isfinite(total):
        raise ValueError(f"the total must be a finite number, got {total}")
    if step < 1:
        raise ValueError(f"step must be 1 or more, got {step}")
    for name, cost in costs.items():
        if np.ndim(cost) and np.shape(cost) != np.shape(curves[name])[:-1]:
            raise ValueError(
                f"layer {name!r}: costs of shape {np.shape(cost)} for curves of shape "
                f"{np.shape(curves[name])}"
            )
        if not ((np.asarray(cost) > 0) & (np.asarray(cost) < np.inf)).all():
            raise ValueError(f"layer {name!r}: the cost of a term must be positive, got {cost}")
        if np.ndim(curves[name]) not in (1, 2):
            raise ValueError(
                f"layer {name!r}: curves are [budgets] or [filters, budgets], got "
                f"{np.shape(curves[name])}"
            )
        if not np.isfinite(curves[name]).all():
            raise ValueError(f"layer {name!r}: its error curve is not finite: {curves[name]}")
        most = np.shape(curves[name])[-1] - 1
        if not 0 <= minimum <= most:
            raise ValueError(
                f"layer {name!r}: minimum {minimum} is outside its budgets [0, {most}]"
            )
    least = -(-minimum // step) * step
    floor = sum(least * float(np.sum(cost)) for cost in costs.values())
    if total < floor:
        raise ValueError(
            f"a total of {total:g} does not reach the minimum budget {least} of every layer, "
            f"which costs {floor:g}"
        )


def _water_level(
    gains: list[np.ndarray], costs: np.ndarray, left: float, slack: float
) -> list[int]:
    """Terms taken of each curve: the largest gain per cost first, while they last.

    Args:
      gains: per unit of cost, of each further term; a row per curve.
      costs: of a term of each curve.
      left: what they may cost together, and ``slack`` more.
      slack: for rounding.
    """
    taken = [0] * len(gains)
    # Entries are (−gain per cost, index): ties go to the curve named first.
    queue = [(-float(row[0]), i) for i, row in enumerate(gains) if len(row)]
    heapq.heapify(queue)
    price = costs.tolist()
    while queue:
        negative, i = heapq.heappop(queue)
        if negative >= 0 or price[i] > left + slack:
            continue
        taken[i] += 1
        left -= price[i]
        if taken[i] < len(gains[i]):
            heapq.heappush(queue, (-float(gains[i][taken[i]]), i))
    return taken


def allocate_budgets(
    curves: Mapping[str, Curve],
    costs: Mapping[str, float | np.ndarray],
    total: float,
    *,
    minimum: int = 1,
    step: int = 1,
) -> dict[str, Any]:
    """Chooses each layer's or filter's budget so that the summed error is least within a cost.

    Args:
      curves: layer → error at budget 0, 1, …, non-increasing (see `error_curve`); or, for budgets
        by filter, an array ``[filters, budgets]``. Layers may be of either kind.
      costs: layer → cost of one more term in each of its groups (groups, cycles or pJ), of which
        its filters take equal shares; or an array ``[filters]`` of each one's own.
      total: the cost that all layers may take together, in the unit of ``costs``.
      minimum: the least budget of a layer or filter. 0 lets it vanish.
      step: budgets are multiples of it, such as the terms that a PE takes in a cycle; the last one
        before the end of a curve that is no multiple counts as one.

    Returns:
      layer → terms per group, an integer or an int32 array ``[filters]``. Where the curves are
      convex, no allocation of the same or less cost has a smaller error, but for what is left of
      the total: a curve whose next term would exceed it stops there, and cheaper ones may go on.

    Raises:
      ValueError: curves and costs differ in their layers or shapes, a curve or the total is not
        finite, a cost is not positive, step is below 1, or the total does not reach the minimum
        budgets.

    >>> allocate_budgets({"a": [9, 4, 1, 0], "b": [5, 1, 0, 0]}, {"a": 1, "b": 1}, 3)
    {'a': 2, 'b': 1}
    >>> by_filter = {"a": np.array([[9, 4, 1, 0], [5, 1, 0, 0]])}
    >>> allocate_budgets(by_filter, {"a": 2}, 3)["a"].tolist()
    [2, 1]
    """
    _check(curves, costs, total, minimum, step)
    choices = {name: _multiples(step, np.shape(curve)[-1] - 1) for name, curve in curves.items()}
    rows = {
        name: np.atleast_2d(np.asarray(curve))[:, choices[name]] for name, curve in curves.items()
    }
    by_term = {
        name: np.full(len(row), float(costs[name]) / len(row))
        if np.ndim(costs[name]) == 0
        else np.asarray(costs[name], np.float64)
        for name, row in rows.items()
    }
    prices = {name: step * price for name, price in by_term.items()}
    first = -(-minimum // step)  # steps that every curve takes
    gains: list[np.ndarray] = []
    for name, row in rows.items():
        rest = row[:, first:]
        gains += list((rest[:, :-1] - rest[:, 1:]).astype(np.float64) / prices[name][:, None])
    left = total - sum(first * float(price.sum()) for price in prices.values())
    every = np.concatenate([np.zeros(0), *prices.values()])
    taken = iter(_water_level(gains, every, left, _ROUNDING * abs(total)))
    budgets: dict[str, Any] = {}
    for name, row in rows.items():
        found = choices[name][first + np.array([next(taken) for _ in row])]
        budgets[name] = found if np.ndim(curves[name]) == 2 else int(found[0])
    return budgets


def _multiples(step: int, most: int) -> np.ndarray:
    """0, step, 2 step, … below ``most``, and ``most``; int32."""
    return np.minimum(np.arange(0, most + step, step, dtype=np.int32), np.int32(most))


def lower_hull(curve: Sequence[float] | np.ndarray) -> np.ndarray:
    """The largest convex curve that nowhere exceeds the given one, of budgets 0, 1, ….

    Errors that are measured, or whose parts go together, need not be convex in the budget; on their
    lower hull `allocate_budgets` spends by mean gains and steps over dents.

    >>> lower_hull([9, 8, 3, 2]).tolist()
    [9.0, 6.0, 3.0, 2.0]
    """
    values = np.asarray(curve, float)
    corners: list[int] = []
    for k in range(len(values)):
        # A corner on or above the line between its neighbours is none.
        while len(corners) > 1:
            i, j = corners[-2:]
            if (values[j] - values[i]) * (k - i) < (values[k] - values[i]) * (j - i):
                break
            corners.pop()
        corners.append(k)
    return np.interp(np.arange(len(values)), corners, values[corners])


def round_budgets(
    relaxed: Mapping[str, float | np.ndarray],
    costs: Mapping[str, float | np.ndarray],
    total: float,
    *,
    largest: int,
    minimum: int = 1,
    step: int = 1,
) -> dict[str, Any]:
    """The whole budgets nearest to relaxed ones, in summed squares, within a total cost.

    Args:
      relaxed: layer → real terms per group, one number or ``[filters]`` of them.
      costs: as for `allocate_budgets`.
      total: the cost that all layers may take together, in the unit of ``costs``.
      largest: the most terms that a group can need.
      minimum: the least budget of a layer or filter.
      step: as for `allocate_budgets`.

    Returns:
      layer → terms per group, an integer or an int32 array ``[filters]``.

    Raises:
      ValueError: as by `allocate_budgets`.

    >>> round_budgets({"a": 2.6, "b": 3.4}, {"a": 1, "b": 1}, 6, largest=8)
    {'a': 3, 'b': 3}
    """
    curves = {
        name: (np.arange(largest + 1) - np.asarray(k, np.float64)[..., None]) ** 2
        for name, k in relaxed.items()
    }
    return allocate_budgets(curves, costs, total, minimum=minimum, step=step)
