"""Networks of ONNX files (operators Conv, Gemm, MatMul)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stp_jax.hwmodel.network import Layer, Network, dense, matmul

# Operators of the same work that are not read; silence would leave their multiplications out.
_REFUSED = frozenset(
    {
        "ConvTranspose",
        "DeformConv",
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "Einsum",
        "GRU",
        "LSTM",
        "RNN",
        "Attention",
    }
)
# Operators that hand their first input on; a weight may pass through several of them.
_PASSING = frozenset({"DequantizeLinear", "QuantizeLinear", "Identity", "Transpose", "Cast"})


def read_onnx(path: str | Path) -> Network:
    """The convolutions, dense layers and matrix products of an ONNX graph, in its order.

    Shapes come from ONNX's own shape inference; batch and other symbolic extents must be fixed in
    the file. Layers are named after their nodes, or after their outputs where nodes have no name.
    A MatMul whose right side is a constant matrix (an initializer or Constant, perhaps dequantized,
    transposed or cast), or any matrix shared by a batch, is a dense layer.

    Args:
      path: an ``.onnx`` file. Needs the ``onnx`` package.

    Raises:
      ImportError: the package is missing.
      FileNotFoundError: no such file.
      ValueError: not an ONNX model, no such layer in the graph, one whose shape is unknown, or an
        operator of such work that is not read (transposed, quantised, recurrent; Einsum).
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("read_onnx needs the onnx package: pip install onnx") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    except Exception as error:  # protobuf's, onnx's checker's and shape inference's own
        raise ValueError(f"{path}: not a valid ONNX model: {error}") from error
    graph = model.graph
    refused = [node for node in graph.node if node.op_type in _REFUSED]
    if refused:
        named = ", ".join(f"{node.name or node.output[0]} ({node.op_type})" for node in refused)
        raise ValueError(f"{path}: operators that are not modelled: {named}")
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        extents = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        shapes.setdefault(value.name, extents)
    constants = {t.name for t in graph.initializer}
    for node in graph.node:  # in topological order
        passes = node.op_type in _PASSING and node.input[0] in constants
        if passes or node.op_type == "Constant":
            constants.add(node.output[0])
    layers = [
        _layer(node, shapes, constants, onnx.helper.get_attribute_value)
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    ]
    if not layers:
        raise ValueError(f"{path}: no Conv, Gemm or MatMul in the graph")
    return Network(tuple(layers), name=graph.name or Path(path).stem)


def _layer(
    node: Any, shapes: dict[str, tuple[int, ...]], constants: set[str], value_of: Any
) -> Layer:
    name = node.name or node.output[0]
    lhs, rhs = (shapes.get(tensor, ()) for tensor in node.input[:2])
    out = shapes.get(node.output[0], (0,))  # a product of two vectors is a scalar, ()
    if not all(lhs) or not all(rhs) or not all(out) or not (lhs and rhs):
        raise ValueError(
            f"{name}: shapes {(lhs, rhs, out)} are not known; fix symbolic extents first"
        )
    attributes = {a.name: value_of(a) for a in node.attribute}
    if node.op_type == "Conv":
        return _convolution(name, lhs, rhs, out, attributes)
    if node.op_type == "Gemm":
        rows, columns = out
        return dense(name, math.prod(lhs) // rows, columns, rows=rows)
    # A vector on the left is one row, on the right one column (as numpy.matmul).
    reduction, columns = lhs[-1], rhs[-1] if len(rhs) > 1 else 1
    rows = math.prod(lhs[:-1])
    if len(rhs) <= 2:
        if len(lhs) == 2 and node.input[1] not in constants:
            return matmul(name, rows, reduction, columns)
        return dense(name, reduction, columns, rows=rows)
    rows = lhs[-2] if len(lhs) > 1 else 1
    return matmul(name, rows, reduction, columns, products=math.prod(out) // (rows * columns))


def _convolution(name: str, lhs: Any, rhs: Any, out: Any, attributes: dict[str, Any]) -> Layer:
    kernel = tuple(rhs[2:])
    pads = attributes.get("pads", (0,) * (2 * len(kernel)))
    padding = tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    stride = tuple(attributes.get("strides", (1,) * len(kernel)))
    dilation = tuple(attributes.get("dilations", (1,) * len(kernel)))
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        axes = zip(lhs[2:], out[2:], kernel, stride, dilation, strict=True)
        missing = [max((o - 1) * s + (k - 1) * d + 1 - n, 0) for n, o, k, s, d in axes]
        padding = tuple((m // 2, m - m // 2) for m in missing)
        if automatic == "SAME_LOWER":
            padding = tuple((high, low) for low, high in padding)
    return Layer(
        name=name,
        batch=lhs[0],
        in_size=tuple(lhs[2:]),
        out_size=tuple(out[2:]),
        kernel=kernel,
        stride=stride,
        channels=lhs[1],
        filters=rhs[0],
        groups=attributes.get("group", 1),
        dilation=dilation,
        padding=padding,
    )
