"""What real integer weights hold: terms per group, measured once and small afterwards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stp_jax import terms
from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.numeric import as_real, smooth_minimum

if TYPE_CHECKING:
    from stp_jax.hwmodel.group_pe import GroupPE


@dataclasses.dataclass(frozen=True)
class GroupTerms:
    """Histogram of terms per group, for each layer of a network.

    Attributes:
      histogram: int64 (layers, maximum + 1), groups that hold so many terms; zeros where a layer's
        weights are not known.
      measured: bool (layers,), whether they are.
      grouped: group size, grouping, encoding and bits of the PE that it was measured for.
    """

    histogram: np.ndarray
    measured: np.ndarray
    grouped: tuple[int, str, str, int]

    def check(self, pe: GroupPE) -> None:
        """Raises ValueError if the PE groups or encodes otherwise than what was measured."""
        group_size, *rest = grouping_of(pe)
        concrete = isinstance(group_size, int | np.integer)
        if tuple(rest) != self.grouped[1:] or (concrete and group_size != self.grouped[0]):
            raise ValueError(
                f"terms were measured for (group size, grouping, encoding, bits) = {self.grouped}, "
                f"the PE has {grouping_of(pe)}"
            )

    @property
    def largest(self) -> np.ndarray:
        """The most terms in any group, int64 (layers,)."""
        held = np.arange(self.histogram.shape[1]) * (self.histogram > 0)
        return held.max(axis=1)

    def within(self, budgets: Any, groups: Any, xp: Any, smoothing: float = 0.0) -> tuple[Any, Any]:
        """Terms held by groups capped at ``budgets``, and groups without a term.

        Where weights are not known every one of ``groups`` is taken to fill its budget.
        """
        counts = xp.arange(self.histogram.shape[1], dtype=budgets.dtype)[None, :]
        histogram, known = as_real(self.histogram, xp), xp.asarray(self.measured)
        held = xp.sum(histogram * smooth_minimum(counts, budgets[:, None], smoothing, xp), axis=1)
        empty = xp.where(known, histogram[:, 0], xp.where(budgets > 0.0, 0.0, groups))
        return xp.where(known, held, groups * budgets), empty


def grouping_of(pe: GroupPE) -> tuple[int, str, str, int]:
    """What the statistics of a PE depend on."""
    return pe.group_size, pe.grouping, pe.encoding, pe.bits


def base_name(name: str) -> str:
    """A layer's module path, without the ``@n`` of repeated uses."""
    return name.split("@")[0]


def check_names(what: str, given: Mapping[str, Any], network: Network) -> None:
    """Raises ValueError that lists keys which name no layer of the network."""
    known = {base_name(name) for name in network.names} | set(network.names)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{what} name no layer: {', '.join(unknown)}; layers are {', '.join(network.names)}"
        )


def lookup(given: Mapping[str, Any], layer: Layer) -> Any:
    """A layer's entry by its name or by its module's, None if there is none."""
    return given.get(layer.name, given.get(base_name(layer.name)))


def weight_matrix(layer: Layer, weights: Any, bits: int) -> np.ndarray:
    """A layer's integer weights as (groups of filters * window * channels) x filters.

    Args:
      layer: the layer.
      weights: integers, HWIO for convolutions, (..., in, ..., out) for dense layers.
      bits: width; values must lie in [-2**(bits-1), 2**(bits-1)].

    Returns:
      int64 of shape (K, filters): column f holds filter f's reduction, channels fastest.

    Raises:
      TypeError: not integers. ValueError: wrong size or out of range.
    """
    w = np.asarray(weights)
    if not np.issubdtype(w.dtype, np.integer):
        raise TypeError(f"{layer.name}: weights must be integers, got {w.dtype}")
    if w.size != layer.weight_words:
        raise ValueError(
            f"{layer.name}: weights of shape {w.shape} do not hold the layer's K={layer.K} by "
            f"{layer.filters} filters"
        )
    w = w.astype(np.int64).reshape(layer.K, layer.filters)
    if w.size and np.abs(w).max() > 1 << (bits - 1):
        raise ValueError(f"{layer.name}: weight {np.abs(w).max()} in magnitude exceeds {bits} bits")
    return w


@functools.lru_cache
def term_counts(encoding: terms.Encoding, bits: int) -> np.ndarray:
    """Terms of every integer from -2**(bits-1) to 2**(bits-1), int64."""
    half = 1 << (bits - 1)
    with jax.ensure_compile_time_eval():
        return np.asarray(terms.count(np.arange(-half, half + 1), encoding, bits), np.int64)


def group_sums(layer: Layer, values: np.ndarray, pe: GroupPE) -> np.ndarray:
    """Sums of ``values`` (K, filters) over the PE's groups: (groups, filters)."""
    size, filters = int(pe.group_size), values.shape[1]
    if pe.grouping == "channels" and layer.group_channels > 1:
        values = values.reshape(layer.window, layer.group_channels, filters)
    else:
        values = values.reshape(1, layer.K, filters)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % size), (0, 0)))
    return padded.reshape(-1, size, filters).sum(axis=1)


def measure_terms(network: Network, weights: Mapping[str, Any] | None, pe: GroupPE) -> GroupTerms:
    """Counts the terms in every group of the given layers' weights.

    Args:
      network: the layers.
      weights: integer arrays by layer name (HWIO, or in by out); layers left out are unknown.
      pe: group size, grouping, encoding and width; group_size must be concrete.

    Raises:
      ValueError: a name without a layer, a wrong size, a value out of range.
      TypeError: weights that are not integers.
    """
    weights = weights or {}
    check_names("weights", weights, network)
    counts = term_counts(pe.encoding, pe.bits)
    half = 1 << (pe.bits - 1)
    histograms = []
    for layer in network:
        held = lookup(weights, layer)
        if held is None:
            histograms.append(np.zeros(1, np.int64))
            continue
        matrix = weight_matrix(layer, held, pe.bits)
        histograms.append(np.bincount(group_sums(layer, counts[matrix + half], pe).ravel()))
    histogram = np.zeros((len(network), max(map(len, histograms))), np.int64)
    for row, values in zip(histogram, histograms, strict=True):
        row[: len(values)] = values
    return GroupTerms(histogram, np.asarray(histogram.any(axis=1)), grouping_of(pe))
