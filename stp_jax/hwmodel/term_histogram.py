"""Histograms of terms per group, measured on a network's integer weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from stp_jax import terms
from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.numbers import Operands, Real, Vector, as_real, namespace_of
from stp_jax.hwmodel.smoothing import smooth_minimum

if TYPE_CHECKING:
    from stp_jax.hwmodel.group_pe import GroupPE

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class GroupTerms:
    """Histogram of terms per group, for each layer of a network.

    Attributes:
      histogram: int64 (layers, maximum + 1), groups that hold so many terms; zeros where a layer's
        weights are not known.
      measured: bool (layers,), whether they are.
      grouped: group size, grouping, encoding and bits of the PE that it was measured for.
      shapes: name, kernel, input channels of a group and filters of each layer; batch and image
        size do not matter to weights.
    """

    histogram: np.ndarray
    measured: np.ndarray
    grouped: tuple[Real, str, str, int]
    shapes: tuple[tuple[str, tuple[int, ...], int, int], ...]

    def check(self, pe: GroupPE, network: Network) -> None:
        """Raises ValueError if the network has other layers or the PE other groups or terms."""
        for mine, theirs in itertools.zip_longest(self.shapes, weight_shapes(network)):
            if mine != theirs:
                raise ValueError(
                    "terms were measured on another network: (layer, kernel, channels, filters) "
                    f"= {mine} then, {theirs} now"
                )
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

    def within(self, budgets: Vector, smoothing: float = 0.0) -> tuple[Vector, Vector]:
        """Terms held by groups capped at ``budgets``, and groups without a term.

        Real vectors over layers, zeros where weights are not known.
        """
        xp = namespace_of(budgets)
        counts = xp.arange(self.histogram.shape[1], dtype=budgets.dtype)[None, :]
        histogram = as_real(self.histogram, xp)
        held = xp.sum(histogram * smooth_minimum(counts, budgets[:, None], smoothing), axis=1)
        return held, histogram[:, 0]


def weight_shapes(network: Network) -> tuple[tuple[str, tuple[int, ...], int, int], ...]:
    """Name, kernel, input channels of a group and filters of every layer."""
    return tuple((la.name, la.kernel, la.group_channels, la.filters) for la in network)


def grouping_of(pe: GroupPE) -> tuple[Real, str, str, int]:
    """What the statistics of a PE depend on."""
    return pe.group_size, pe.grouping, pe.encoding, pe.bits


def base_name(name: str) -> str:
    """A layer's module path, without the ``@n`` of repeated uses."""
    return name.split("@")[0]


def check_names(what: str, given: Mapping[str, object], network: Network) -> None:
    """Raises ValueError that lists keys which name no layer of the network."""
    known = {base_name(name) for name in network.names} | set(network.names)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{what} name no layer: {', '.join(unknown)}; layers are {', '.join(network.names)}"
        )


def lookup(given: Mapping[str, _T], layer: Layer) -> _T | None:
    """A layer's entry by its name or by its module's, None if there is none."""
    return given.get(layer.name, given.get(base_name(layer.name)))


def weight_matrix(layer: Layer, weights: ArrayLike, bits: int) -> np.ndarray:
    """A layer's integer weights as a matrix of reduction x filters.

    Args:
      layer: the layer.
      weights: integers in Flax's layouts: (*kernel, channels of a group, filters) for
        convolutions; axes whose leading ones multiply to K and the others to the filters for dense
        layers (as those of ``DenseGeneral``); (products, K, M) for matrix products; or (K, filters)
        for any of them.
      bits: width; values must lie in [-2**(bits-1), 2**(bits-1)].

    Returns:
      int64 of shape (K, filters): column f holds filter f's reduction, channels fastest.

    Raises:
      TypeError: not integers. ValueError: another layout or out of range. A layout of the same
        shape (a square matrix transposed) cannot be told apart.
    """
    w = np.asarray(weights)
    if not np.issubdtype(w.dtype, np.integer):
        raise TypeError(f"{layer.name}: weights must be integers, got {w.dtype}")
    w = _as_matrix(layer, w.astype(np.int64))
    if w.size and np.abs(w).max() > 1 << (bits - 1):
        raise ValueError(f"{layer.name}: weight {np.abs(w).max()} in magnitude exceeds {bits} bits")
    return w


def _as_matrix(layer: Layer, w: np.ndarray) -> np.ndarray:
    matrix, general = (layer.K, layer.filters), (layer.K, layer.M)
    if layer.kind == "conv":
        described = f"(*kernel, channels of a group, filters) = {weight_shape(layer)}"
        known = w.shape in (weight_shape(layer), matrix)
    elif layer.groups > 1:
        described = f"(products, K, M) = {(layer.groups, *general)}"
        if w.shape == (layer.groups, *general):
            w = w.transpose(1, 0, 2).reshape(matrix)
        known = w.shape == matrix
    else:
        described = "(in, out), or axes whose leading ones multiply to K"
        leading = {math.prod(w.shape[:axis]) for axis in range(1, w.ndim)}
        known = w.size == layer.weight_words and layer.K in leading
    if not known:
        raise ValueError(
            f"{layer.name}: weights of shape {w.shape} do not hold the layer's K={layer.K} by "
            f"{layer.filters} filters in a known layout; expected {described}, or (K, filters) = "
            f"{matrix}"
        )
    return w.reshape(matrix)


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of a convolution's kernel in Flax's layout, HWIO."""
    return (*layer.kernel, layer.group_channels, layer.filters)


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


def measure_terms(network: Network, weights: Operands | None, pe: GroupPE) -> GroupTerms:
    """Counts the terms in every group of the given layers' weights.

    Args:
      network: the layers.
      weights: integer arrays by layer name (HWIO, or in by out); layers left out are unknown.
      pe: group size, grouping, encoding and width; group_size must be concrete.

    Raises:
      ValueError: a name without a layer, another layout (see `weight_matrix`), a value out of
        range.
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
    measured = np.asarray(histogram.any(axis=1))
    return GroupTerms(histogram, measured, grouping_of(pe), weight_shapes(network))
