"""Networks of ONNX files (operators Conv, Gemm, MatMul and recurrent ones)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
        "Attention",
    }
)
# Operators that hand their first input on; a weight may pass through several of them.
_PASSING = frozenset({"DequantizeLinear", "QuantizeLinear", "Identity", "Transpose", "Cast"})


_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}  # matrices beside each other in a recurrent layer
_BRANCHING = frozenset({"If", "Loop", "Scan"})


def read_onnx(path: str | Path, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Network:
    """The convolutions, dense layers and matrix products of an ONNX graph, in its order.

    Shapes come from ONNX's own shape inference, and where the graph computes them itself from one
    run on zeros (by onnxruntime). Layers are named after their nodes, or after their
    outputs where nodes have no name. A MatMul whose right side is a constant matrix (an initializer
    or Constant, perhaps dequantized, transposed or cast), or any matrix shared by a batch, is a
    dense layer. A recurrent operator is a product with its input over all steps, ``name.input``,
    and one with its state a step: ``name.state``, ``name.state@2`` and so on.

    Args:
      path: an ``.onnx`` file. Needs the ``onnx`` package.
      shapes: of inputs by name, where the file leaves extents open or for others than it says.

    Raises:
      ImportError: the package is missing.
      FileNotFoundError: no such file.
      ValueError: not an ONNX model, no such layer in the graph, an input whose shape is open, a
        layer whose shape does not follow from the inputs', or an operator of such work that is not
        read (transposed, quantised, Einsum; anything within If, Loop and Scan).
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("read_onnx needs the onnx package: pip install onnx") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.load(str(path))
        _set_inputs(model.graph, shapes or {})
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except _OpenShapeError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # protobuf's, onnx's checker's and shape inference's own
        raise ValueError(f"{path}: not a valid ONNX model: {error}") from error
    graph = model.graph
    refused = [node for node in graph.node if node.op_type in _REFUSED or _hides_layers(node)]
    if refused:
        named = ", ".join(f"{_node_name(node)} ({node.op_type})" for node in refused)
        raise ValueError(f"{path}: operators that are not modelled: {named}")
    known: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            known.setdefault(value.name, _extents(value))
    nodes = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul", *_GATES)]
    wanted = {tensor for node in nodes for tensor in (*node.input[:2], *node.output[:1])}
    if unknown := sorted(name for name in wanted if not all(known.get(name, (0,)))):
        known |= _observed(path, model, unknown)
    constants = {t.name for t in graph.initializer}
    for node in graph.node:  # in topological order
        passes = node.op_type in _PASSING and node.input and node.input[0] in constants
        if passes or node.op_type == "Constant":
            constants.update(node.output[:1])
    layers: list[Layer] = []
    for node in nodes:
        try:
            layers += _layers(node, known, constants, onnx.helper.get_attribute_value)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, AttributeError) as error:
            raise ValueError(f"{path}: {_node_name(node)} ({node.op_type}): {error}") from error
    if not layers:
        raise ValueError(f"{path}: no Conv, Gemm, MatMul or recurrent layer in the graph")
    return Network(tuple(layers), name=graph.name or Path(path).stem)


class _OpenShapeError(ValueError):
    """An input's shape is not known."""


def _extents(value: Any) -> tuple[int, ...]:
    """The shape of a value, 0 where an extent is open."""
    return tuple(max(0, d.dim_value) for d in value.type.tensor_type.shape.dim)


def _set_inputs(graph: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fixes the inputs' shapes, from which all others are to be inferred anew."""
    constants = {t.name for t in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in constants}
    if unknown := sorted(set(shapes) - set(inputs)):
        raise _OpenShapeError(f"no such inputs: {', '.join(unknown)}; it has {', '.join(inputs)}")
    for name, shape in shapes.items():
        extents = inputs[name].type.tensor_type.shape
        if len(shape) != len(extents.dim) or any(n < 1 for n in shape):
            raise _OpenShapeError(
                f"the shape of input {name!r} must be {len(extents.dim)} positive extents, got "
                f"{tuple(shape)}"
            )
        for dim, extent in zip(extents.dim, shape, strict=True):
            dim.dim_value = extent
    is_open = {n: v for n, v in inputs.items() if n not in shapes and not all(_extents(v))}
    if is_open:
        named = ", ".join(
            f"{name} ({', '.join(d.dim_param or str(max(0, d.dim_value) or '?') for d in dims)})"
            for name, dims in ((n, v.type.tensor_type.shape.dim) for n, v in is_open.items())
        )
        raise _OpenShapeError(f"extents of inputs are open: {named}; give them as shapes={{…}}")
    if shapes:  # what the file says of other values may hold for other inputs only
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")


def _observed(path: Any, model: Any, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes that the graph computes itself: those of one run on zeros."""
    import numpy as np
    import onnx

    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"{path} computes the shape of {names[0]}, which takes a run of it: "
            "pip install onnxruntime"
        ) from error
    graph = model.graph
    declared = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    constants = {t.name for t in graph.initializer}
    zeros = {
        value.name: np.zeros(
            _extents(value), onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        )
        for value in graph.input
        if value.name not in constants
    }
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return {n: v.shape for n, v in zip(names, session.run(names, zeros), strict=True)}
    except Exception as error:  # onnxruntime's own are no common class
        raise ValueError(
            f"{path}: the shape of {names[0]} does not follow from the inputs', and onnxruntime "
            f"cannot run the graph: {error}"
        ) from error


def _node_name(node: Any) -> str:
    return node.name or next(iter(node.output), "") or node.op_type


def _hides_layers(node: Any) -> bool:
    """Whether a layer stands in a graph within the node."""
    if node.op_type not in _BRANCHING:
        return False
    inner = [n for a in node.attribute for g in (a.g, *a.graphs) for n in g.node]
    of_work = _REFUSED | _GATES.keys() | {"Conv", "Gemm", "MatMul"}
    return any(n.op_type in of_work or _hides_layers(n) for n in inner)


def _layers(
    node: Any, known: dict[str, tuple[int, ...]], constants: set[str], value_of: Any
) -> list[Layer]:
    name = _node_name(node)
    attributes = {a.name: value_of(a) for a in node.attribute}
    if node.op_type in _GATES:
        return _recurrent(node, known, attributes)
    if len(node.input) < 2 or not node.output:
        raise ValueError("it needs two operands and a result")
    lhs, rhs = (known.get(tensor, (0,)) for tensor in node.input[:2])
    out = known.get(node.output[0], (0,))  # a product of two vectors is a scalar, ()
    if not all(lhs) or not all(rhs) or not all(out) or not (lhs and rhs):
        raise ValueError(f"its operands {lhs} and {rhs} and its result {out} are no product's")
    if node.op_type == "Conv":
        return [_convolution(name, lhs, rhs, out, attributes)]
    if node.op_type == "Gemm":
        rows, columns = out
        return [dense(name, math.prod(lhs) // rows, columns, rows=rows)]
    # A vector on the left is one row, on the right one column (as numpy.matmul).
    reduction, columns = lhs[-1], rhs[-1] if len(rhs) > 1 else 1
    rows = math.prod(lhs[:-1])
    if len(rhs) <= 2:
        if len(lhs) == 2 and node.input[1] not in constants:
            return [matmul(name, rows, reduction, columns)]
        return [dense(name, reduction, columns, rows=rows)]
    rows = lhs[-2] if len(lhs) > 1 else 1
    return [matmul(name, rows, reduction, columns, products=math.prod(out) // (rows * columns))]


def _recurrent(
    node: Any, known: dict[str, tuple[int, ...]], attributes: dict[str, Any]
) -> list[Layer]:
    """The products of RNN, GRU and LSTM, both directions side by side."""
    sequence, weights, *_ = (*(known.get(tensor, (0,)) for tensor in node.input), (0,), (0,))
    if len(sequence) != 3 or len(weights) != 3 or not all(sequence + weights):
        raise ValueError(
            f"the shapes of its input and weights, {sequence} and {weights}, are not known"
        )
    directions, hidden, inputs = weights
    if hidden % _GATES[node.op_type]:
        raise ValueError(f"its weights {weights} are not those of {_GATES[node.op_type]} gates")
    steps, batch = sequence[:2] if not attributes.get("layout", 0) else sequence[1::-1]
    name, state = _node_name(node), hidden // _GATES[node.op_type]
    step = dense(f"{name}.state", state, hidden, rows=batch)
    return [
        dense(f"{name}.input", inputs, directions * hidden, rows=steps * batch),
        *(replace(step, name=_use(step.name, n)) for n in range(1, directions * steps + 1)),
    ]


def _use(name: str, number: int) -> str:
    return name if number == 1 else f"{name}@{number}"


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
