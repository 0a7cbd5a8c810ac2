"""Histograms of terms per group, for each layer of a network."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np
from jax.typing import ArrayLike

from stp_jax import terms
from stp_jax.hwmodel.folding import Extents
from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.numbers import Operands, Real, Vector, as_real, namespace_of
from stp_jax.hwmodel.smoothing import smooth_minimum
from stp_jax.terms.groups import GroupLayout, group_count

Grouping = Literal["flat", "channels"]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermGroups:
    """Which weights share a budget, and how their terms are counted: all a histogram depends on.

    Attributes:
      group_size: g; may be traced, but not to measure with.
      grouping: ``flat`` groups run over window and channels, ``channels`` start anew at each
        window position; see `GroupPE`.
      encoding: of the terms.
      bits: width of the integer weights.

    Raises:
      ValueError: an unknown encoding or grouping, or bits out of range.
    """

    group_size: Real = 8
    grouping: Grouping = "flat"
    encoding: terms.Encoding = "naf"
    bits: int = 8

    def __post_init__(self) -> None:
        """Checks what is static."""
        terms.num_digits(self.encoding, self.bits)  # raises where there is no such encoding
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping must be one of {get_args(Grouping)}, got {self.grouping!r}")

    def layout(self, layer: Layer) -> GroupLayout:
        """The groups of a layer's weights as (window, channels of a group, filters)."""
        anew = self.grouping == "channels" and layer.group_channels > 1
        return GroupLayout(int(self.group_size), axes=(1,) if anew else (0, 1))

    def extents(self, extents: Extents) -> np.ndarray:
        """Weights among which groups are cut: integers of shape (layers,)."""
        channels = extents.group_channels
        if self.grouping == "flat":
            return extents.K
        return np.where(channels == 1, extents.K, channels)

    def along_reduction(self, extents: Extents) -> Vector:
        """Groups along each layer's reduction: integers of shape (layers,)."""
        cut = self.extents(extents)
        return extents.K // cut * group_count(cut, self.group_size)


class HasTermGroups(Protocol):
    """A PE whose cycles follow from the terms in groups of weights."""

    @property
    def term_groups(self) -> TermGroups:
        """The groups that it works on."""


@dataclasses.dataclass(frozen=True)
class GroupTerms:
    """Histogram of terms per group, for each layer of a network.

    Attributes:
      histogram: int64 (layers, maximum + 1), groups that hold so many terms; zeros where a layer's
        weights are not known.
      measured: bool (layers,), whether they are.
      groups: what was counted.
      shapes: name, kernel, input channels of a group and filters of each layer; batch and image
        size do not matter to weights.
      by_filter: of each layer, int64 (filters, maximum + 1); the histogram is their sum.
    """

    histogram: np.ndarray
    measured: np.ndarray
    groups: TermGroups
    shapes: tuple[tuple[str, tuple[int, ...], int, int], ...]
    by_filter: tuple[np.ndarray, ...]

    def check(self, groups: TermGroups, network: Network) -> None:
        """Raises ValueError if the network has other layers, or groups or terms are others."""
        for mine, theirs in itertools.zip_longest(self.shapes, weight_shapes(network)):
            if mine != theirs:
                raise ValueError(
                    "terms were measured on another network: (layer, kernel, channels, filters) "
                    f"= {mine} then, {theirs} now"
                )
        kinds = [dataclasses.replace(each, group_size=1) for each in (groups, self.groups)]
        sizes = [groups.group_size, self.groups.group_size]
        concrete = all(isinstance(size, int | np.integer) for size in sizes)
        if kinds[0] != kinds[1] or (concrete and sizes[0] != sizes[1]):
            raise ValueError(f"terms were measured for {self.groups}, the PE has {groups}")

    @property
    def largest(self) -> np.ndarray:
        """The most terms in any group, int64 (layers,)."""
        return _largest(self.histogram)

    def largest_of(self, counts: np.ndarray) -> np.ndarray:
        """The most terms in any group of a layer, or of each filter where ``counts`` is not 1."""
        return _largest(self._rows(counts))

    def within(
        self, budgets: Vector, counts: np.ndarray, smoothing: float = 0.0
    ) -> tuple[Vector, Vector]:
        """Terms held by groups capped at ``budgets``, and groups without a term.

        Args:
          budgets: real vector, a layer's one after the other.
          counts: budgets of each layer: 1, or its filters.
          smoothing: see `evaluate`.

        Returns:
          Real vectors like ``budgets``, zeros where weights are not known.
        """
        xp = namespace_of(budgets)
        terms_held = xp.arange(self.histogram.shape[1], dtype=budgets.dtype)[None, :]
        histogram = as_real(self._rows(counts), xp)
        capped = smooth_minimum(terms_held, budgets[:, None], smoothing)
        return xp.sum(histogram * capped, axis=1), histogram[:, 0]

    def _rows(self, counts: np.ndarray) -> np.ndarray:
        """Histograms of layers, or of their filters where ``counts`` is not 1."""
        if (counts == 1).all():
            return self.histogram
        return np.concatenate(
            [
                self.histogram[i, None] if count == 1 else self.by_filter[i]
                for i, count in enumerate(counts)
            ]
        )


def _largest(histogram: np.ndarray) -> np.ndarray:
    """The last column that is not zero, of each row."""
    return (np.arange(histogram.shape[1]) * (histogram > 0)).max(axis=1)


def weight_shapes(network: Network) -> tuple[tuple[str, tuple[int, ...], int, int], ...]:
    """Name, kernel, input channels of a group and filters of every layer."""
    return tuple((la.name, la.kernel, la.group_channels, la.filters) for la in network)


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


def measure_terms(network: Network, weights: Operands | None, pe: HasTermGroups) -> GroupTerms:
    """Counts the terms in every group of the given layers' weights.

    Args:
      network: the layers.
      weights: integer arrays by layer name (HWIO, or in by out); layers left out are unknown.
      pe: a `GroupPE`, for its group size (concrete), grouping, encoding and width.

    Raises:
      ValueError: a name without a layer, another layout (see `weight_matrix`), a value out of
        range.
      TypeError: weights that are not integers.
    """
    weights = weights or {}
    check_names("weights", weights, network)
    groups = pe.term_groups
    counts = terms.count_table(groups.encoding, groups.bits)
    half = 1 << (groups.bits - 1)
    by_filter = []
    for layer in network:
        held = lookup(weights, layer)
        if held is None:
            by_filter.append(np.zeros((layer.filters, 1), np.int64))
            continue
        matrix = weight_matrix(layer, held, groups.bits)
        by_position = (layer.window, layer.group_channels, layer.filters)
        held_counts = counts[matrix + half].reshape(by_position)
        by_filter.append(_histograms(groups.layout(layer).sums(held_counts)))
    columns = max(rows.shape[1] for rows in by_filter)
    filled = tuple(np.pad(rows, ((0, 0), (0, columns - rows.shape[1]))) for rows in by_filter)
    histogram = np.stack([rows.sum(axis=0) for rows in filled])
    measured = np.asarray(histogram.any(axis=1))
    return GroupTerms(histogram, measured, groups, weight_shapes(network), filled)


def _histograms(held: np.ndarray) -> np.ndarray:
    """Histograms of integers [..., filters] by filter, int64 (filters, maximum + 1)."""
    filters, columns = held.shape[-1], int(held.max(initial=0)) + 1
    bins = held.reshape(-1, filters) + np.arange(filters) * columns
    return np.bincount(bins.ravel(), minlength=filters * columns).reshape(filters, columns)
