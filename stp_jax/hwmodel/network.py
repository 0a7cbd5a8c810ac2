"""Workloads: the layers of a network as matrix products, whatever operation they come from.

A layer of reduction K, positions P and filters M is ``groups`` independent products of a (P, K) by
a (K, M) matrix. Convolutions are lowered as in SCALE-Sim (Samajdar et al., ISPASS 2020, sec. III):
K = kernel window x input channels, P = output pixels x batch, M = filters.
"""

from __future__ import annotations

import configparser
import csv
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

if TYPE_CHECKING:
    from stp_jax.hwmodel.arrays import Array

Kind = Literal["conv", "dense", "matmul"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution, dense layer or matrix product; every extent is a count of elements.

    Dense layers and matrix products have empty spatial tuples: ``batch`` holds their rows. Left
    out, ``dilation`` is 1 and ``padding`` the fewest zeros that give ``out_size``, divided as by
    ``SAME``.

    Raises:
      ValueError: an extent is not a positive integer, the spatial tuples differ in length, windows
        reach beyond the padded input, or channels or filters do not divide into groups.
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


def read_scalesim_topology(path: str | Path) -> Network:
    """Reads a SCALE-Sim topology (CSV; SCALE-Sim v2/v3 documentation, "topology").

    Convolutions: layer name, ifmap height, ifmap width, filter height, filter width, channels,
    filters, stride (one for both axes, or one each). Matrix products (SCALE-Sim's ``-i gemm``):
    layer name, M, N, K for an (M, K) by (K, N) product. Either may end in the sparsity ratio
    ``1:1``. One header line.

    Read as SCALE-Sim does: there is no padding, extents are those of the padded input, along which
    a window makes ceil((n - k + s) / s) steps, so the last may reach beyond the far side. Layers
    with ``DP`` in their names are depthwise: ``filters`` filters for each channel.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is malformed, sparse, or the first is a layer instead of a header; the
        message names its line.
    """
    path = Path(path)
    layers = []
    with path.open(newline="") as lines:
        rows = csv.reader(lines)
        for row in rows:
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            where = f"{path}:{rows.line_num}"
            if rows.line_num == 1:
                if len(cells) > 1 and cells[1].isdecimal():
                    raise ValueError(f"{where}: expected a header line, got the layer {cells[0]!r}")
            elif cells:
                layers.append(_scalesim_layer(cells, where))
    if not layers:
        raise ValueError(f"{path}: no layers below the header line")
    return Network(tuple(layers), name=path.stem)


def _scalesim_layer(cells: list[str], where: str) -> Layer:
    if ":" in cells[-1]:
        *cells, ratio = cells
        if ratio.replace(" ", "") != "1:1":
            raise ValueError(
                f"{where}: layer {cells[0]!r} has the sparsity ratio {ratio}; sparse layers are "
                "not modelled, only 1:1"
            )
    if len(cells) not in (4, 8, 9):
        raise ValueError(
            f"{where}: expected a name, ifmap height and width, filter height and width, channels, "
            f"filters and one or two strides, or a name, M, N and K, got {len(cells)} cells"
        )
    try:
        name, numbers = cells[0], [int(cell) for cell in cells[1:]]
        if len(numbers) == 3:
            rows, columns, reduction = numbers
            return dense(name, reduction, columns, rows=rows)
        return _scalesim_convolution(name, *numbers)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _scalesim_convolution(
    name: str,
    height: int,
    width: int,
    filter_height: int,
    filter_width: int,
    channels: int,
    filters: int,
    *strides: int,
) -> Layer:
    in_size, kernel = (height, width), (filter_height, filter_width)
    stride = (strides[0], strides[-1])
    if any(k > n for n, k in zip(in_size, kernel, strict=True)):
        raise ValueError(f"a window of {kernel} does not fit an input of {in_size}")
    if min(stride) < 1:
        raise ValueError(f"layer {name!r}: strides must be positive integers, got {stride}")
    axes = list(zip(in_size, kernel, stride, strict=True))
    out_size = tuple(-(-(n - k + s) // s) for n, k, s in axes)
    depthwise = "DP" in name
    return Layer(
        name=name,
        in_size=in_size,
        out_size=out_size,
        kernel=kernel,
        stride=stride,
        channels=channels,
        filters=channels * filters if depthwise else filters,
        groups=channels if depthwise else 1,
        padding=tuple(
            (0, (o - 1) * s + k - n) for o, (n, k, s) in zip(out_size, axes, strict=True)
        ),
    )


_SCALESIM_KEYS = {  # of the section [architecture_presets]
    "rows": "ArrayHeight",
    "cols": "ArrayWidth",
    "ifmap_sram": "IfmapSramSzkB",
    "filter_sram": "FilterSramSzkB",
    "ofmap_sram": "OfmapSramSzkB",
}


def read_scalesim_config(path: str | Path) -> Array:
    """The array that a SCALE-Sim configuration (``.cfg``) describes, with bit-parallel PEs.

    Rows, columns, SRAM sizes (kB) and dataflow are read. ``Bandwidth`` (words per cycle, here
    bytes) is the DRAM's where ``InterfaceBandwidth`` is ``USER``; with ``CALC``, or without it,
    nothing stalls.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a configuration, or an entry is missing, not an integer or unknown.
    """
    from stp_jax.hwmodel.arrays import Array  # arrays builds on this module

    parser = configparser.ConfigParser()
    try:
        with Path(path).open() as lines:
            parser.read_file(lines)
        presets = parser["architecture_presets"]
        numbers: dict[str, Any] = {
            field: int(presets[key]) for field, key in _SCALESIM_KEYS.items()
        }
        dataflow = presets["Dataflow"]
        user = parser.get("run_presets", "InterfaceBandwidth", fallback="CALC").upper() == "USER"
        bandwidth = float(presets["Bandwidth"].split(",")[0]) if user else math.inf
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]} in [architecture_presets]") from None
    except (configparser.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for field in ("ifmap_sram", "filter_sram", "ofmap_sram"):
        numbers[field] *= 1024
    return Array(dataflow=cast(Any, dataflow), dram_bandwidth=bandwidth, **numbers)
