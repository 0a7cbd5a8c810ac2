"""Operands for measurements: synthetic ones, and those of a trained network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Operands
from stp_jax import terms

GROUP = 8
WEIGHT_DEVIATION = 36.0  # int8 steps: the largest of some 500 Gaussian weights is then near 127
ACTIVATION_DEVIATION = 40.0
ZERO_ACTIVATIONS = 0.4
ROWS_ABOVE = 32  # of groups whose sums come from above, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperandSet:
    """The same work in int8 and at each budget of terms in a group of 8.

    Attributes:
      dense: int8 weights.
      by_budget: weights projected to each budget.
      description: where they come from, for reports.
    """

    dense: Operands
    by_budget: Mapping[int, Operands]
    description: str

    def at(self, budget: int, *, takes_terms: bool) -> Operands:
        """Projected weights for a PE that takes terms, int8 ones for others."""
        return self.by_budget[budget] if takes_terms else self.dense


def synthetic(
    budgets: tuple[int, ...], *, folds: int, filters: int, seed: int, group: int = GROUP
) -> OperandSet:
    """Gaussian weights, and half-Gaussian activations of which 40 % are zero.

    Partial sums from above are those of up to 32 more groups of the same kind, in int8 throughout:
    what differs between PEs is their own work.
    """
    random = np.random.default_rng(seed)
    weights = _weights(random, (folds, filters, group))
    activations = _activations(random, (folds, group))
    rows = random.integers(0, ROWS_ABOVE, size=folds)
    psums = np.zeros((folds, filters), np.int64)
    for fold, count in enumerate(rows):
        above = _weights(random, (filters, count * group)).round().astype(np.int64)
        psums[fold] = above @ _activations(random, (count * group,))
    return _operand_set(
        weights,
        activations,
        psums,
        budgets,
        f"synthetic: Gaussian int8 weights of deviation {WEIGHT_DEVIATION:g}, activations "
        f"half-Gaussian of deviation {ACTIVATION_DEVIATION:g} with {ZERO_ACTIVATIONS:.0%} zeros, "
        f"{folds} folds of {filters} filters, seed {seed}",
    )


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return np.clip(random.normal(scale=WEIGHT_DEVIATION, size=shape), -127, 127)


def _activations(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    values = np.abs(random.normal(scale=ACTIVATION_DEVIATION, size=shape)).round()
    zero = random.random(shape) < ZERO_ACTIVATIONS
    return np.where(zero, 0, np.clip(values, 0, 127)).astype(np.int64)


def _operand_set(
    weights: npt.NDArray,
    activations: npt.NDArray[np.int64],
    psums: npt.NDArray[np.int64],
    budgets: tuple[int, ...],
    description: str,
) -> OperandSet:
    group = weights.shape[-1]
    projected = {
        k: np.asarray(terms.project(weights, group_size=group, budget=k, axis=-1)) for k in budgets
    }
    dense = Operands(activations=activations, weights=weights.round().astype(np.int64), psums=psums)
    return OperandSet(
        dense=dense,
        by_budget={k: dataclasses.replace(dense, weights=w) for k, w in projected.items()},
        description=description,
    )
