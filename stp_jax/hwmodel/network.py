"""Networks: layers as matrix products, whatever operation they come from.

A layer of reduction K, positions P and filters M is ``groups`` independent products of a (P, K) by
a (K, M) matrix. Convolutions are lowered as in SCALE-Sim (Samajdar et al., ISPASS 2020, sec. III):
K = kernel window x input channels, P = output pixels x batch, M = filters.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from stp_jax.hwmodel.tensors import Links, Tensors, chain, check_links, tensors

Kind = Literal["conv", "dense", "matmul"]

# Far above any network, and small enough that nothing derived from a layer overflows.
_MAX_SCALAR, _MAX_SPATIAL = 2**40, 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution, dense layer or matrix product; every extent is a count of elements.

    Dense layers and matrix products have empty spatial tuples: ``batch`` holds their rows. Left
    out, ``dilation`` is 1 and ``padding`` the fewest zeros that give ``out_size``, divided as by
    ``SAME``.

    Raises:
      ValueError: an extent is not a positive integer or is absurdly large, the spatial tuples
        differ in length, windows reach beyond the padded input, or channels or filters do not
        divide into groups.
    """

    name: str
    kind: Kind = "conv"
    batch: int = 1
    in_size: tuple[int, ...] = ()  # spatial input, without padding where it is known
    out_size: tuple[int, ...] = ()  # spatial output
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    channels: int  # of all groups together
    filters: int  # of all groups together
    groups: int = 1  # filter groups of a convolution, batched products of a matmul
    dilation: tuple[int, ...] = ()  # steps between the elements of a window
    padding: tuple[tuple[int, int], ...] = ()  # zeros before and after each spatial axis

    def __post_init__(self) -> None:
        """Checks the extents and fills in dilation and padding."""
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ValueError(f"layer {self.name!r}: kind must be one of {kinds}, got {self.kind!r}")
        object.__setattr__(self, "dilation", tuple(self.dilation) or (1,) * len(self.kernel))
        spatial = (self.in_size, self.out_size, self.kernel, self.stride, self.dilation)
        if len({len(extent) for extent in spatial}) != 1:
            raise ValueError(
                f"layer {self.name!r}: in_size, out_size, kernel, stride and dilation must have "
                f"the same number of axes, got {spatial}"
            )
        scalars = (self.batch, self.channels, self.filters, self.groups)
        extents = (*scalars, *itertools.chain(*spatial))
        for extent in extents:
            if not isinstance(extent, int | np.integer) or extent < 1:
                raise ValueError(
                    f"layer {self.name!r}: every extent must be a positive integer, got {self}"
                )
        largest = (_MAX_SCALAR,) * len(scalars) + (_MAX_SPATIAL,) * (5 * len(self.kernel))
        if any(extent > most for extent, most in zip(extents, largest, strict=True)):
            raise ValueError(
                f"layer {self.name!r}: batch, channels, filters and groups go up to {_MAX_SCALAR}, "
                f"spatial extents to {_MAX_SPATIAL}; got {self}"
            )
        if self.channels % self.groups or self.filters % self.groups:
            raise ValueError(
                f"layer {self.name!r}: {self.channels} channels and {self.filters} filters do not "
                f"divide into {self.groups} groups"
            )
        if self.macs >= 2**63:
            raise ValueError(f"layer {self.name!r}: {self.macs:.3g} multiplications are too many")
        self._pad()

    def _pad(self) -> None:
        axes = zip(self.in_size, self.out_size, self.stride, self.reach, strict=True)
        missing = [max((out - 1) * stride + reach - n, 0) for n, out, stride, reach in axes]
        if not self.padding:
            object.__setattr__(self, "padding", tuple((m // 2, m - m // 2) for m in missing))
            return
        padding = tuple(tuple(pair) for pair in self.padding)
        if len(padding) != len(missing) or any(len(p) != 2 or min(p) < 0 for p in padding):
            raise ValueError(
                f"layer {self.name!r}: padding must be two counts for each spatial axis, got "
                f"{self.padding}"
            )
        if any(m > sum(pair) for m, pair in zip(missing, padding, strict=True)):
            raise ValueError(
                f"layer {self.name!r}: windows for {self.out_size} outputs reach beyond an input "
                f"of {self.in_size} padded by {padding}"
            )
        object.__setattr__(self, "padding", padding)

    @property
    def reach(self) -> tuple[int, ...]:
        """Input extent of a window along each spatial axis, its gaps included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def window(self) -> int:
        """Kernel positions; 1 for dense layers and matrix products."""
        return math.prod(self.kernel)

    @property
    def group_channels(self) -> int:
        """Input channels that one filter sees."""
        return self.channels // self.groups

    @property
    def K(self) -> int:
        """Length of the reduction."""
        return self.window * self.group_channels

    @property
    def P(self) -> int:
        """Positions: output pixels times batch, or rows."""
        return self.batch * math.prod(self.out_size)

    @property
    def M(self) -> int:
        """Filters per group."""
        return self.filters // self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole layer."""
        return self.groups * self.K * self.P * self.M

    @property
    def input_words(self) -> int:
        """Distinct input activations that some window reads; padding is not read."""
        axes = zip(
            self.in_size,
            self.out_size,
            self.kernel,
            self.stride,
            self.dilation,
            self.padding,
            strict=True,
        )
        return self.batch * self.channels * math.prod(_pixels_read(*axis) for axis in axes)

    @property
    def weight_words(self) -> int:
        """Weights, or the elements of the second operand of a matrix product."""
        return self.groups * self.K * self.M

    @property
    def output_words(self) -> int:
        """Outputs."""
        return self.groups * self.P * self.M


@dataclasses.dataclass(frozen=True)
class Network:
    """An ordered, hashable list of layers whose names are distinct.

    ``links`` say which layer reads whose output, one `Links` a layer. Without them the network is a
    mere sequence, in which each layer reads the output of the one before it (see `tensors.chain`).

    Raises:
      ValueError: no layers, two of the same name, or links that do not fit them.
      TypeError: something else than layers or links.
    """

    layers: tuple[Layer, ...]
    name: str = "network"
    links: tuple[Links, ...] | None = None

    def __post_init__(self) -> None:
        """Checks the names."""
        if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
            raise TypeError(f"a network takes a sequence of layers, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"a network takes a sequence of layers; one of them is {layer!r}")
        if not self.layers:
            raise ValueError("a network needs at least one layer")
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen:
                raise ValueError(f"two layers are named {layer.name!r}; names must be distinct")
            seen.add(layer.name)
        if self.links is not None:
            object.__setattr__(self, "links", tuple(self.links))
            check_links(self.layers, self.links)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        """The layers, in order."""
        return iter(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names, in order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    def extents(self, attribute: str) -> np.ndarray:
        """One integer property of every layer, int64 of shape (layers,), read-only."""
        if attribute not in self._extents:
            values = np.array([getattr(layer, attribute) for layer in self.layers], np.int64)
            values.flags.writeable = False
            self._extents[attribute] = values
        return self._extents[attribute]

    @functools.cached_property
    def tensors(self) -> Tensors:
        """The outputs of the layers: who reads them, and the room they need to stay on the chip."""
        return tensors(self.layers, chain(self.layers) if self.links is None else self.links)

    @functools.cached_property
    def _extents(self) -> dict[str, np.ndarray]:
        """Properties asked for before: a network is evaluated many times and never changes."""
        return {}


@functools.lru_cache
def _pixels_read(size: int, out: int, window: int, stride: int, dilation: int, padding) -> int:
    starts = np.arange(out)[:, None] * stride
    pixels = starts + np.arange(window) * dilation - padding[0]
    return len(np.unique(pixels[(pixels >= 0) & (pixels < size)]))


def conv(
    name: str,
    in_size: tuple[int, ...],
    *,
    channels: int,
    filters: int,
    kernel: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]] = "SAME",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    batch: int = 1,
) -> Layer:
    """A convolution by its input extent.

    Args:
      name: of the layer.
      in_size: spatial input, without padding.
      channels: of the input, all groups together.
      filters: of all groups together.
      kernel: spatial window; one integer serves every axis, as for stride and dilation.
      stride: step of the window.
      padding: ``SAME`` or ``VALID`` as in ``jax.lax``, or zeros before and after each axis.
      dilation: step between the elements of a window.
      groups: of channels and filters.
      batch: images.

    Raises:
      ValueError: an extent is not positive, extents differ in their axes, the window does not fit
        the input, or the padding is neither SAME nor VALID nor pairs of counts.
    """
    kernel, stride, dilation = (
        (extent,) * len(in_size) if isinstance(extent, int | np.integer) else tuple(extent)
        for extent in (kernel, stride, dilation)
    )
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(
            f"layer {name!r}: padding must be SAME or VALID, or two counts for each axis, got "
            f"{padding!r}"
        )
    if not len(in_size) == len(kernel) == len(stride) == len(dilation):
        raise ValueError(
            f"layer {name!r}: in_size, kernel, stride and dilation must have the same number of "
            f"axes, got {in_size}, {kernel}, {stride} and {dilation}"
        )
    if not all(isinstance(s, int | np.integer) and s > 0 for s in stride):
        raise ValueError(f"layer {name!r}: strides must be positive integers, got {stride}")
    pairs: tuple[tuple[int, int], ...] = ()  # the layer's default is SAME
    if padding == "SAME":
        out_size = tuple(-(-n // s) for n, s in zip(in_size, stride, strict=True))
    else:
        pairs = ((0, 0),) * len(in_size) if padding == "VALID" else tuple(padding)  # type: ignore[arg-type]
        if len(pairs) != len(in_size):
            raise ValueError(
                f"layer {name!r}: padding must be two counts for each of {len(in_size)} axes, got "
                f"{padding}"
            )
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padded = [n + sum(pair) for n, pair in zip(in_size, pairs, strict=True)]
        if any(n < r for n, r in zip(padded, reach, strict=True)):
            raise ValueError(
                f"layer {name!r}: a window of {kernel} does not fit an input of {in_size}"
            )
        out_size = tuple((n - r) // s + 1 for n, r, s in zip(padded, reach, stride, strict=True))
    return Layer(
        name=name,
        batch=batch,
        in_size=tuple(in_size),
        out_size=out_size,
        kernel=kernel,
        stride=stride,
        channels=channels,
        filters=filters,
        groups=groups,
        dilation=dilation,
        padding=pairs,
    )


def dense(name: str, channels: int, filters: int, *, rows: int = 1) -> Layer:
    """A dense layer from ``channels`` to ``filters`` applied to ``rows`` vectors."""
    return Layer(name=name, kind="dense", batch=rows, channels=channels, filters=filters)


def matmul(name: str, rows: int, reduction: int, columns: int, *, products: int = 1) -> Layer:
    """``products`` independent (rows, reduction) by (reduction, columns) products."""
    return Layer(
        name=name,
        kind="matmul",
        batch=rows,
        channels=products * reduction,
        filters=products * columns,
        groups=products,
    )
