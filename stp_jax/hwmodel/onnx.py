"""Reads a network's layers from an ONNX file (operators Conv, Gemm, MatMul)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stp_jax.hwmodel.network import Layer, Network, dense, matmul


def read_onnx(path: str | Path) -> Network:
    """The convolutions, dense layers and matrix products of an ONNX graph, in its order.

    Shapes come from ONNX's own shape inference; batch and other symbolic extents must be fixed in
    the file. Layers are named after their nodes, or after their outputs where nodes have no name.

    Args:
      path: an ``.onnx`` file. Needs the ``onnx`` package.

    Raises:
      ImportError: the package is missing.
      ValueError: no such layer in the graph, or one whose shape is unknown.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("read_onnx needs the onnx package: pip install onnx") from error
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    graph = model.graph
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        extents = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        shapes.setdefault(value.name, extents)
    constants = {t.name for t in graph.initializer}
    layers = [
        _layer(node, shapes, constants, onnx.helper.get_attribute_value)
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    ]
    if not layers:
        raise ValueError(f"{path}: no Conv, Gemm or MatMul in the graph")
    return Network(tuple(layers), name=graph.name or Path(path).stem)


def _layer(node: Any, shapes: dict, constants: set[str], value_of: Any) -> Layer:
    name = node.name or node.output[0]
    operands = [shapes.get(tensor, ()) for tensor in (*node.input[:2], node.output[0])]
    if not all(shape and all(extent > 0 for extent in shape) for shape in operands):
        raise ValueError(f"{name}: shapes {operands} are not known; fix symbolic extents first")
    lhs, rhs, out = operands
    attributes = {a.name: value_of(a) for a in node.attribute}
    if node.op_type == "Conv":
        return Layer(
            name=name,
            batch=lhs[0],
            in_size=lhs[2:],
            out_size=out[2:],
            kernel=rhs[2:],
            stride=tuple(attributes.get("strides", (1,) * len(rhs[2:]))),
            channels=lhs[1],
            filters=rhs[0],
            groups=attributes.get("group", 1),
        )
    if node.op_type == "Gemm":
        rows, columns = out
        return dense(name, math.prod(lhs) // rows, columns, rows=rows)
    reduction, columns = lhs[-1], rhs[-1]
    if node.input[1] in constants and len(rhs) == 2:
        return dense(name, reduction, columns, rows=math.prod(lhs[:-1]))
    return matmul(name, out[-2], reduction, columns, products=math.prod(out[:-2]))
