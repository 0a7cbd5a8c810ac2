"""Networks and arrays of SCALE-Sim's files: topologies and configurations.

The formats are those of SCALE-Sim v2 and v3 (Samajdar et al., ISPASS 2020; its documentation).
"""

from __future__ import annotations

import configparser
import csv
import math
from pathlib import Path
from typing import Any, cast

from stp_jax.hwmodel.arrays import Array
from stp_jax.hwmodel.network import Layer, Network, dense


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
    if len(cells) > 1 and ":" in cells[-1]:
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
