"""Workloads: the layers of a network as matrix products, whatever operation they come from.

A layer of reduction K, positions P and filters M is ``groups`` independent products of a (P, K) by
a (K, M) matrix. Convolutions are lowered as in SCALE-Sim (Samajdar et al., ISPASS 2020, sec. III):
K = kernel window x input channels, P = output pixels x batch, M = filters.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Kind = Literal["conv", "dense", "matmul"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution, dense layer or matrix product; every extent is a count of elements.

    Dense layers and matrix products have empty spatial tuples: ``batch`` holds their rows.

    Raises:
      ValueError: an extent is not a positive integer, the spatial tuples differ in length, or
        channels or filters do not divide into groups.
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

    def __post_init__(self) -> None:
        """Checks the extents."""
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ValueError(f"layer {self.name!r}: kind must be one of {kinds}, got {self.kind!r}")
        spatial = (self.in_size, self.out_size, self.kernel, self.stride)
        if len({len(extent) for extent in spatial}) != 1:
            raise ValueError(
                f"layer {self.name!r}: in_size, out_size, kernel and stride must have the same "
                f"number of axes, got {spatial}"
            )
        scalars = (self.batch, self.channels, self.filters, self.groups)
        for extent in (*scalars, *(e for extents in spatial for e in extents)):
            if not isinstance(extent, int | np.integer) or extent < 1:
                raise ValueError(
                    f"layer {self.name!r}: every extent must be a positive integer, got {self}"
                )
        if self.channels % self.groups or self.filters % self.groups:
            raise ValueError(
                f"layer {self.name!r}: {self.channels} channels and {self.filters} filters do not "
                f"divide into {self.groups} groups"
            )

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
        """Distinct input activations that the layer reads; strides above the kernel skip some."""
        axes = zip(self.in_size, self.out_size, self.kernel, self.stride, strict=True)
        read = (n if k >= s else min(n, o * k) for n, o, k, s in axes)
        return self.batch * self.channels * math.prod(read)

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

    Raises:
      ValueError: no layers, or two of the same name.
      TypeError: something else than layers.
    """

    layers: tuple[Layer, ...]
    name: str = "network"

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
        """One integer property of every layer, int64 of shape (layers,)."""
        return np.array([getattr(layer, attribute) for layer in self.layers], np.int64)


def conv(
    name: str,
    in_size: tuple[int, ...],
    *,
    channels: int,
    filters: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    padding: Literal["SAME", "VALID"] = "SAME",
    groups: int = 1,
    batch: int = 1,
) -> Layer:
    """A convolution by its input extent; ``padding`` as in ``jax.lax.conv``.

    Raises:
      ValueError: an extent is not positive, extents differ in their axes, the window does not fit
        the input, or the padding is neither SAME nor VALID.
    """
    stride = stride or (1,) * len(kernel)
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"layer {name!r}: padding must be SAME or VALID, got {padding!r}")
    if not len(in_size) == len(kernel) == len(stride):
        raise ValueError(
            f"layer {name!r}: in_size, kernel and stride must have the same number of axes, got "
            f"{in_size}, {kernel} and {stride}"
        )
    if not all(isinstance(s, int | np.integer) and s > 0 for s in stride):
        raise ValueError(f"layer {name!r}: strides must be positive integers, got {stride}")
    if padding == "VALID" and any(n < k for n, k in zip(in_size, kernel, strict=True)):
        raise ValueError(f"layer {name!r}: a window of {kernel} does not fit an input of {in_size}")
    if padding == "SAME":
        out_size = tuple(-(-n // s) for n, s in zip(in_size, stride, strict=True))
    else:
        extents = zip(in_size, kernel, stride, strict=True)
        out_size = tuple((n - k) // s + 1 for n, k, s in extents)
    return Layer(
        name=name,
        batch=batch,
        in_size=tuple(in_size),
        out_size=out_size,
        kernel=tuple(kernel),
        stride=tuple(stride),
        channels=channels,
        filters=filters,
        groups=groups,
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


def read_scalesim_topology(path: str | Path) -> Network:
    """Reads a SCALE-Sim convolution topology (CSV; SCALE-Sim v2/v3 documentation, "topology").

    Columns: layer name, ifmap height, ifmap width, filter height, filter width, channels,
    filters, stride (one for both axes, or one each), one header line. The format has no padding:
    extents are those of the padded input.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is malformed; the message names its line.
    """
    path = Path(path)
    layers = []
    with path.open(newline="") as lines:
        rows = csv.reader(lines)
        next(rows, None)
        for row in rows:
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                layers.append(_scalesim_layer(cells, f"{path}:{rows.line_num}"))
    if not layers:
        raise ValueError(f"{path}: no layers below the header line")
    return Network(tuple(layers), name=path.stem)


def _scalesim_layer(cells: list[str], where: str) -> Layer:
    if len(cells) not in (8, 9):
        raise ValueError(
            f"{where}: expected a name, ifmap height and width, filter height and width, channels, "
            f"filters and one or two strides, got {len(cells)} cells"
        )
    try:
        height, width, kh, kw, channels, filters, *stride = (int(cell) for cell in cells[1:])
        return conv(
            cells[0],
            (height, width),
            channels=channels,
            filters=filters,
            kernel=(kh, kw),
            stride=(stride[0], stride[-1]),
            padding="VALID",
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None
