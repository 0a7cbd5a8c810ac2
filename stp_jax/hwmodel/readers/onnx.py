"""Networks of ONNX files: convolutions, products and recurrent layers of the default operators."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from stp_jax.hwmodel.network import Layer, Network, dense, matmul
from stp_jax.hwmodel.readers import products
from stp_jax.hwmodel.readers.links import OUTSIDE, LinkReader, Value, joined

if TYPE_CHECKING:
    from stp_jax.hwmodel.readers.onnx_values import Shape, Values

# Operators of such work that are not read; silence would leave their multiplications out.
_REFUSED = frozenset(
    {
        "Attention",
        "CausalConvWithState",
        "DeformConv",
        "FlexAttention",
        "LinearAttention",
        "LinearClassifier",
        "LinearRegressor",
        "SVMClassifier",
        "SVMRegressor",
    }
)
_UPDATES = frozenset({"ScatterElements", "ScatterND"})  # the third input, into the first
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# What a node without the inputs or attributes that it must have leads to.
_DAMAGE = (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError)


def read_onnx(
    path: str | Path,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    values: Mapping[str, npt.ArrayLike] | None = None,
) -> Network:
    """The convolutions, dense layers, matrix products and recurrent layers of an ONNX graph.

    Layers come in the graph's order and are named after their nodes, or after their outputs where
    nodes have no name; the n-th use of a name ends in ``@n``. The network's ``links`` say which
    layer reads whose output. Layers are read as follows:

    * A product with a constant matrix (an initializer, or what is computed from constants alone,
      such as a dequantized or transposed one), or with a matrix shared by a batch, is a dense
      layer. Products of constants are left out, as runtimes compute them once.
    * Quantized operators (QLinear…, …Integer, QuantizeLinear and DequantizeLinear) are the layers
      that they stand for.
    * A transposed convolution is the product of its input with its kernel. The sums of what
      overlaps in its output are not the array's.
    * LSTM, GRU and RNN are one product ``.input`` with all steps' inputs, and for each step and
      direction one ``.recurrent`` with the state.
    * Of an ``If`` whose condition does not follow from the shapes, the branch with more
      multiply-accumulates counts. Functions of the model are inlined.

    Args:
      path: an ``.onnx`` file. Needs the ``onnx`` package. Weights in files of their own need not be
        there.
      shapes: of inputs whose extents are symbolic in the file, by name.
      values: of inputs on which shapes or branches of the graph depend, such as a sampling rate.

    Raises:
      ImportError: the package is missing.
      FileNotFoundError: no such file.
      ValueError: not an ONNX model, no such layer in the graph, shapes that are missing or do not
        fit, a layer whose shape depends on data, or an operator that is not read: one that
        multiplies in another way (deformable convolutions, Attention, a product in a Loop or Scan),
        or one that the ``onnx`` package does not know. Nodes are named.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise ImportError("read_onnx needs the onnx package: pip install onnx") from error
    from stp_jax.hwmodel.readers.onnx_values import Values

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf's and onnx's own
        raise ValueError(f"{path}: not a valid ONNX model: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path}: not a valid ONNX model: its graph is empty")
    opsets = {
        "" if opset.domain == "ai.onnx" else opset.domain: opset.version
        for opset in model.opset_import
    }
    known = Values(opsets or {"": 1}, path.parent)
    try:
        known.add_inputs(model.graph, shapes or {}, values or {})
        flow = _Flow()
        _graph(model.graph, known, flow)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not flow.reader.layers:
        raise ValueError(f"{path}: no convolution, product or recurrent layer in the graph")
    results = [flow.value(output.name) for output in model.graph.output]
    return flow.reader.network(results, model.graph.name or path.stem)


class _Flow:
    """The layers read so far, and which of them wrote what the graph's tensors hold."""

    def __init__(self) -> None:
        self.reader = LinkReader()
        self._tensors: dict[str, Value] = {}

    def value(self, tensor: str) -> Value:
        return self._tensors.get(tensor, OUTSIDE)

    def assign(self, tensors: Sequence[str], made: Sequence[Value]) -> None:
        self._tensors.update(zip(tensors, made, strict=True))

    def add(self, node: Any, layers: list[Layer], values: Values) -> None:
        """Adds the layers of a node."""
        if node.op_type in _GATES:
            made = self._recurrent(node, layers)
        else:
            operands = _operands(node)
            if operands[0] in values.constant:
                operands = operands[::-1]
            inputs, others = map(self.value, operands)
            made = OUTSIDE
            for layer in layers:
                made = self.reader.layer(layer, inputs, others)
        self.assign(node.output, [made] * len(node.output))

    def _recurrent(self, node: Any, layers: list[Layer]) -> Value:
        """Each step reads the state of the one before it, and adds its part of the inputs'."""
        of_input = self.reader.layer(layers[0], self.value(node.input[0]))
        steps, directions = layers[1:], layers[0].filters // layers[1].filters
        states: list[Value] = []
        for i, layer in enumerate(steps):
            first = i % (len(steps) // directions) == 0
            state = self.reader.layer(layer, OUTSIDE if first else states[-1])
            states.append(self.reader.merge([state, of_input.within(layer.output_words)]))
        return joined((state, state.size) for state in states)

    def follow(self, node: Any, tensors: Sequence[str], values: Values) -> None:
        """Takes a node that is no layer; of a tensor's shape, nothing is read."""
        if node.op_type in ("Shape", "Size"):
            return
        inputs = list(map(self.value, tensors))
        sizes = [math.prod(values.shape(tensor) or ()) for tensor in tensors]
        if node.op_type == "Concat":
            made = joined(zip(inputs, sizes, strict=True))
        elif node.op_type in _UPDATES:
            rest = max(sizes[0] - sizes[2], 0)
            made = joined([(inputs[2], sizes[2]), (inputs[0], rest)])
        else:
            made = self.reader.merge(inputs)
        shapes = map(values.shape, node.output)
        outputs = [made if shape is None else made.within(math.prod(shape)) for shape in shapes]
        self.assign(node.output, outputs)


def _graph(graph: Any, values: Values, flow: _Flow) -> None:
    """Reads a graph in its order; what its nodes tell of its tensors is added to ``values``."""
    refused = [node for node in graph.node if node.op_type in _REFUSED]
    if refused:
        named = ", ".join(f"{_name(node)} ({node.op_type})" for node in refused)
        raise ValueError(f"operators that are not modelled: {named}")
    values.add_initializers(graph)
    for node in graph.node:
        try:
            _node(node, values, flow)
        except _DAMAGE as error:
            raise ValueError(f"{_name(node)} ({node.op_type}) is damaged: {error!r}") from error


def _name(node: Any) -> str:
    return node.name or next(filter(None, node.output), node.op_type)


def _node(node: Any, values: Values, flow: _Flow) -> None:
    name = _name(node)
    if node.op_type == "If":
        _branch(node, values, flow)
        return
    if subgraphs := values.subgraphs(node):
        nodes = _nodes(subgraphs)
        for inner in nodes:
            if inner.op_type in _READ or inner.op_type in _REFUSED or inner.domain:
                raise ValueError(
                    f"{name}: layers in a {node.op_type} are not read: {_name(inner)} "
                    f"({inner.op_type})"
                )
        values.leave_unknown(node, name)
        flow.follow(node, [*node.input, *(t for inner in nodes for t in inner.input)], values)
        return
    if node.op_type == "DynamicQuantizeLSTM":
        node = values.float_lstm(node)
    values.infer(node, name)
    if values.constant.issuperset(node.output):
        return
    read = _READ.get(node.op_type)
    if read is not None and (layers := read(name, node, values)):
        flow.add(node, layers, values)
    else:
        flow.follow(node, node.input, values)


def _nodes(graphs: Iterable[Any]) -> list[Any]:
    """Nodes of graphs and of the graphs within."""
    nodes = [node for graph in graphs for node in graph.node]
    inner = [a.g for node in nodes for a in node.attribute if a.HasField("g")]
    return nodes + _nodes(inner) if inner else nodes


def _branch(node: Any, values: Values, flow: _Flow) -> None:
    """Of an If, the branch that is taken, or else the one with more multiply-accumulates."""
    branches = {a.name: a.g for a in node.attribute}
    taken = [branches["then_branch"], branches["else_branch"]]
    condition = values.known.get(node.input[0])
    if condition is not None:
        taken = [taken[0] if condition.item() else taken[1]]
    inner = [(branch, values.within()) for branch in taken]

    def read(branch: Any, seen: Values) -> list[Value]:
        _graph(branch, seen, flow)
        return [flow.value(output.name) for output in branch.output]

    results = flow.reader.largest([functools.partial(read, *each) for each in inner])
    outputs = [[output.name for output in branch.output] for branch in taken]
    values.join(node.output, [seen for _, seen in inner], outputs, _name(node))
    flow.assign(node.output, results)


def _operands(node: Any) -> tuple[str, str]:
    # Scale and zero point of the first come before the second.
    return node.input[0], node.input[3 if node.op_type.startswith("QLinear") else 1]


def _shapes(
    name: str, node: Any, values: Values, tensors: Sequence[str] | None = None
) -> list[Shape]:
    """Shapes of tensors; of the operands and the output by default."""
    found: list[Shape] = []
    for tensor in tensors or (*_operands(node), node.output[0]):
        shape = values.shape(tensor)
        if shape is None:
            since = values.unknown_since.get(tensor, tensor)
            raise ValueError(
                f"{name} ({node.op_type}): the shape of {tensor!r} is not known; it depends on the "
                f"data, or on an operator without shape inference, from {since!r} on"
            )
        found.append(shape)
    return found


def _product(name: str, node: Any, values: Values) -> list[Layer]:
    lhs, rhs, out = _shapes(name, node, values)
    first_is_constant, is_constant = (t in values.constant for t in _operands(node))
    while is_constant and len(rhs) > 2 and rhs[0] == 1:
        rhs = rhs[1:]
    # A vector on the left is one row, on the right one column (as numpy.matmul).
    reduction, columns = lhs[-1], rhs[-1] if len(rhs) > 1 else 1
    if first_is_constant and len(lhs) <= 2:  # W x, the transpose of x' W'
        return [dense(name, reduction, math.prod(lhs[:-1]), rows=math.prod(rhs) // reduction)]
    if len(rhs) <= 2:
        rows = math.prod(lhs[:-1])
        if len(lhs) == 2 and not is_constant:
            return [matmul(name, rows, reduction, columns)]
        return [dense(name, reduction, columns, rows=rows)]
    rows = lhs[-2] if len(lhs) > 1 else 1
    products = math.prod(out) // (rows * columns)
    if first_is_constant and not is_constant:  # again W x, for each product
        rows, columns = columns, rows
    return [matmul(name, rows, reduction, columns, products=products)]


def _gemm(name: str, node: Any, values: Values) -> list[Layer]:
    lhs, _, (rows, columns) = _shapes(name, node, values)
    return [dense(name, math.prod(lhs) // rows, columns, rows=rows)]


def _einsum(name: str, node: Any, values: Values) -> list[Layer]:
    if len(node.input) == 1:  # a sum or a transposition
        return []
    if len(node.input) > 2:
        raise ValueError(f"{name}: an Einsum of {len(node.input)} operands is not modelled")
    equation = values.attributes(node)["equation"].decode()
    lhs, rhs, _ = _shapes(name, node, values)
    if node.input[0] in values.constant:
        operands, *result = equation.split("->")
        left, right = operands.split(",")
        equation = "->".join([f"{right},{left}", *result])
        lhs, rhs = rhs, lhs
    layer = products.einsum(name, equation, lhs, rhs)
    if not values.constant.intersection(node.input):
        layer = dataclasses.replace(layer, kind="matmul")
    return [layer]


def _recurrent(name: str, node: Any, values: Values) -> list[Layer]:
    attributes = values.attributes(node)
    ((*steps_and_batch, features),) = _shapes(name, node, values, node.input[:1])
    steps, batch = reversed(steps_and_batch) if attributes.get("layout") else steps_and_batch
    hidden = attributes["hidden_size"]
    directions = 2 if attributes.get("direction") == b"bidirectional" else 1
    filters = _GATES[node.op_type] * hidden
    of_input = dense(f"{name}.input", features, directions * filters, rows=steps * batch)
    of_state = dense(f"{name}.recurrent", hidden, filters, rows=batch)
    return [of_input, *(directions * steps * [of_state])]


def _transposed_convolution(name: str, node: Any, values: Values) -> list[Layer]:
    (batch, channels, *in_size), (_, filters, *kernel), _ = _shapes(name, node, values)
    groups = values.attributes(node).get("group", 1)
    extents = {"channels": channels, "filters": groups * filters, "groups": groups}
    return [products.transposed(name, batch, in_size, kernel, **extents)]


def _convolution(name: str, node: Any, values: Values) -> list[Layer]:
    lhs, rhs, out = _shapes(name, node, values)
    attributes = values.attributes(node)
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
    layer = Layer(
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
    return [layer]


_READ: dict[str, Callable[[str, Any, Any], list[Layer]]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv"), _convolution),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul"), _product),
    "Einsum": _einsum,
    **dict.fromkeys(_GATES, _recurrent),
}
