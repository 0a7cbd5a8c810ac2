"""Term budgets of a network's layers as the model computes with them: by layer, or by filter.

A layer has one budget for all of its filters, or one for each. All of them stand in one vector, one
entry after the other, so that layers of different kinds and sizes are computed at once: what holds
for a layer is spread over its entries, and what its entries take is summed up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np

from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.numbers import Budgets, Vector, as_real, namespace_of
from stp_jax.hwmodel.term_histogram import check_names, lookup


@dataclasses.dataclass(frozen=True)
class LayerBudgets:
    """Terms per group of every layer, or of each of its filters.

    Attributes:
      k: real vector over entries.
      counts: entries of each layer, int64 (layers,): 1, or its filters.
    """

    k: Vector
    counts: np.ndarray

    @property
    def is_by_layer(self) -> bool:
        """Whether every layer has one budget."""
        return bool((self.counts == 1).all())

    def spread(self, x: Vector) -> Vector:
        """A value of each layer, repeated for each of its entries."""
        return x[self.owners]

    def share(self, x: Vector) -> Vector:
        """A total of each layer's filters, in equal shares for its entries."""
        return self.spread(x / as_real(self.counts, namespace_of(x)))

    def total(self, x: Vector) -> Vector:
        """The sums of a vector over entries in each layer."""
        if self.is_by_layer:
            return x
        if isinstance(x, jax.Array):
            layers = len(self.counts)
            return jax.ops.segment_sum(x, self.owners, layers, indices_are_sorted=True)
        return np.add.reduceat(x, np.cumsum(self.counts) - self.counts)

    def mean(self, x: Vector) -> Vector:
        """The means of a vector over entries in each layer."""
        return self.total(x) / as_real(self.counts, namespace_of(x))

    @property
    def owners(self) -> np.ndarray:
        """The layer of each entry."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def _entries(layer: Layer, budget: Any, xp: ModuleType) -> Vector:
    """One layer's budgets as a vector: of one entry, or one per filter."""
    k = as_real(budget, xp)
    if k.shape not in ((), (1,), (layer.filters,)):
        raise ValueError(
            f"{layer.name}: budgets of shape {k.shape}; give one, or one for each of its "
            f"{layer.filters} filters"
        )
    return k.reshape(-1)


def resolve_budgets(network: Network, budgets: Budgets, full: Vector) -> LayerBudgets:
    """Budgets as a vector; see `evaluate` for what is accepted and raised.

    Args:
      network: the layers.
      budgets: as `evaluate` takes them.
      full: real vector over layers, the budgets at which nothing is pruned.
    """
    xp = namespace_of(full)
    one_each = np.ones(len(network), np.int64)
    if isinstance(budgets, Mapping):
        check_names("budgets", budgets, network)
        budgets = [lookup(budgets, layer) for layer in network]
    if budgets is None:
        return LayerBudgets(full, one_each)
    if isinstance(budgets, str):
        raise TypeError(f"budgets are numbers, not text, got {budgets!r}")
    if isinstance(budgets, list | tuple):
        if len(budgets) != len(network):
            raise ValueError(f"{len(budgets)} budgets for {len(network)} layers")
        chosen = [
            _entries(layer, full[i] if budgets[i] is None else budgets[i], xp)
            for i, layer in enumerate(network)
        ]
        counts = np.array([len(k) for k in chosen], np.int64)
        return LayerBudgets(xp.concatenate(chosen), counts)
    k = as_real(budgets, xp)
    if k.shape not in ((), (len(network),)):
        raise ValueError(f"budgets of shape {k.shape} for {len(network)} layers")
    return LayerBudgets(xp.broadcast_to(k, (len(network),)), one_each)
