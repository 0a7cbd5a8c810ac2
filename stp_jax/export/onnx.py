"""ONNX graphs of STP models: int8 kernels and activations as QuantizeLinear/DequantizeLinear pairs.

The model is traced to a jaxpr in which each quantized layer shows its integers (two primitives of
`stp_jax.quant.tracing`), and every operation of the jaxpr becomes an ONNX node. What follows from
parameters alone is computed on the way, so that the graph holds what depends on the input.
Convolution and matrix product nodes carry their layers' paths as names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from stp_jax import hooks
from stp_jax.quant.layers import quantized_layers
from stp_jax.quant.tracing import check_calibrated, trace_integers, walk

# QuantizeLinear and DequantizeLinear with axes, reductions with axes as inputs: ONNX 1.13 (2022).
OPSET = 18
IR_VERSION = 8


def _check(model: Any) -> None:
    """Raises ValueError if a layer has numbers that this form lacks."""
    for path, quantized in quantized_layers(model).items():
        rule = quantized.rule
        if rule.bits > 8 or rule.activation_bits > 8 or rule.activation_terms is not None:
            raise ValueError(
                f"layer {path!r}: ONNX export is for weights and inputs of up to 8 bits, and for "
                "inputs that keep all their terms"
            )
        check_calibrated(quantized)


# --- Values ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the graph; axes that its variable has been broadcast along may still be 1."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Constant integers and their scales, of which all axes but the channels' have size 1."""

    layer: str
    integers: np.ndarray
    scale: np.ndarray

    def arranged(self, axes: Sequence[int], shape: Sequence[int]) -> _Kernel:
        """Axes permuted, then merged to a shape; the scale keeps to the merged axes."""
        scale = np.broadcast_to(self.scale, self.integers.shape).transpose(axes).reshape(shape)
        same = [bool(np.all(scale == scale.take([0], axis))) for axis in range(len(shape))]
        for axis, constant in enumerate(same):
            scale = scale.take([0], axis) if constant else scale
        return _Kernel(self.layer, self.integers.transpose(axes).reshape(shape), scale)


class _Graph:
    """The nodes and constants so far, each tensor under a name of its own."""

    def __init__(self, onnx: ModuleType):
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._uses: dict[str, int] = {}
        self._known: dict[Any, Any] = {}  # constants by content, dequantized kernels by constants

    def unique(self, name: str, again: str = "_") -> str:
        """The name itself when it is first used, with a number after it from then on."""
        self._uses[name] = use = self._uses.get(name, 0) + 1
        return name if use == 1 else f"{name}{again}{use}"

    def constant(self, value: np.ndarray, name: str = "constant") -> str:
        """The name of a constant, which all that are equal share."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = name = self.unique(name)
            array = np.ascontiguousarray(value).reshape(value.shape)
            self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return self._known[key]

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        name: str = "",
        **attributes: Any,
    ) -> _Tensor:
        """A new node's only output; nodes of one name are numbered from the second on."""
        out = self.unique(op)
        name = self.unique(name, again="@") if name else out
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [out], name=name, **attributes))
        return _Tensor(out, tuple(shape))

    def tensor(self, value: Any) -> _Tensor:
        """A value as a tensor; constants become initializers."""
        if isinstance(value, _Tensor):
            return value
        if isinstance(value, _Kernel):
            return self._dequantized(value)
        return _Tensor(self.constant(value), value.shape)

    def full(self, value: Any, shape: Sequence[int]) -> _Tensor:
        """A value as a tensor of exactly this shape."""
        tensor = self.tensor(value)
        if tensor.shape == tuple(shape):
            return tensor
        return self.node("Expand", [tensor.name, self.integers(shape)], shape)

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(np.asarray(values, np.int64), "integers")

    def _dequantized(self, kernel: _Kernel) -> _Tensor:
        integers = self.constant(kernel.integers, f"{kernel.layer}.kernel")
        shape = kernel.integers.shape
        channels = [axis for axis, size in enumerate(kernel.scale.shape) if size != 1]
        if len(channels) > 1:  # DequantizeLinear knows one axis
            floats = self.node("Cast", [integers], shape, to=self.onnx.TensorProto.FLOAT)
            scale = self.constant(kernel.scale, f"{kernel.layer}.scale")
            return self.node("Mul", [floats.name, scale], shape)
        flat = kernel.scale.reshape([-1] if channels else [])
        pair = [integers, self.constant(flat, f"{kernel.layer}.scale")]
        key = (*pair, *channels)
        if key not in self._known:
            axis = channels[0] if channels else 0  # without meaning for a single scale
            self._known[key] = self.node("DequantizeLinear", pair, shape, axis=axis)
        return self._known[key]

    def transpose(self, tensor: _Tensor, axes: Sequence[int]) -> _Tensor:
        if list(axes) == sorted(axes):
            return tensor
        shape = [tensor.shape[axis] for axis in axes]
        return self.node("Transpose", [tensor.name], shape, perm=list(axes))

    def reshape(self, tensor: _Tensor, shape: Sequence[int]) -> _Tensor:
        if tensor.shape == tuple(shape):
            return tensor
        return self.node("Reshape", [tensor.name, self.integers(shape)], shape)


# --- Operations -----------------------------------------------------------------------------------
# Each takes (graph, equation, *inputs) and returns the value of the equation's one output. Inputs
# are NumPy arrays where they are constant.


def _elementwise(op: str, order: Sequence[int] | None = None) -> Callable[..., _Tensor]:
    """A node that broadcasts its inputs, which keep their axes of size 1."""

    def lower(graph: _Graph, eqn: Any, *inputs: Any) -> _Tensor:
        chosen = [inputs[i] for i in order] if order else inputs
        tensors = [graph.tensor(value) for value in chosen]
        shape = np.broadcast_shapes(*(tensor.shape for tensor in tensors))
        return graph.node(op, [tensor.name for tensor in tensors], shape)

    return lower


def _like(x: Any, value: float) -> np.ndarray:
    return np.asarray(value, x.aval.dtype)


def _rsqrt(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    return _elementwise("Reciprocal")(graph, eqn, _elementwise("Sqrt")(graph, eqn, x))


def _erfc(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    error = _elementwise("Erf")(graph, eqn, x)
    return _elementwise("Sub")(graph, eqn, _like(eqn.invars[0], 1), error)


def _square(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    return _elementwise("Mul")(graph, eqn, x, x)


def _integer_pow(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    power = _like(eqn.invars[0], eqn.params["y"])
    return _elementwise("Pow")(graph, eqn, x, power)


def _round(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    if eqn.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise ValueError("ONNX rounds half to even only, the model rounds half away from zero")
    return _elementwise("Round")(graph, eqn, x)


def _clamp(graph: _Graph, eqn: Any, low: Any, x: Any, high: Any) -> _Tensor:
    return _elementwise("Min")(graph, eqn, _elementwise("Max")(graph, eqn, x, low), high)


def _cast(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    tensor = graph.tensor(x)
    to = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
    return graph.node("Cast", [tensor.name], tensor.shape, to=to)


def _same(graph: _Graph, eqn: Any, x: Any) -> Any:
    return x


def _input_shape(eqn: Any, number: int = 0) -> tuple[int, ...]:
    return eqn.invars[number].aval.shape


def _output_shape(eqn: Any) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape


def _broadcast_in_dim(graph: _Graph, eqn: Any, x: Any) -> Any:
    """Puts axes in their place; those along which to broadcast stay 1 until a node needs them."""
    x = x if isinstance(x, np.ndarray) else graph.tensor(x)
    shape = [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return x.reshape(shape) if isinstance(x, np.ndarray) else graph.reshape(x, shape)


def _reshape(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    return graph.reshape(graph.full(x, _input_shape(eqn)), _output_shape(eqn))


def _transpose(graph: _Graph, eqn: Any, x: Any) -> Any:
    axes = eqn.params["permutation"]
    if isinstance(x, _Kernel):
        return x.arranged(axes, [x.integers.shape[axis] for axis in axes])
    return graph.transpose(graph.tensor(x), axes)


def _slice_node(graph: _Graph, eqn: Any, x: Any, starts, limits, strides) -> _Tensor:
    tensor = graph.full(x, _input_shape(eqn))
    arguments = (starts, limits, range(len(starts)), strides)
    names = [tensor.name, *(graph.integers(list(values)) for values in arguments)]
    return graph.node("Slice", names, _output_shape(eqn))


def _slice(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    p = eqn.params
    strides = p["strides"] or [1] * len(p["start_indices"])
    return _slice_node(graph, eqn, x, p["start_indices"], p["limit_indices"], strides)


def _dynamic_slice(graph: _Graph, eqn: Any, x: Any, *starts: Any) -> _Tensor:
    if not all(isinstance(start, np.ndarray) for start in starts):
        raise ValueError("dynamic_slice at a position that depends on the input has no ONNX form")
    sizes = eqn.params["slice_sizes"]
    limits = [n - size for n, size in zip(_input_shape(eqn), sizes, strict=True)]
    first = [int(np.clip(s, 0, most)) for s, most in zip(starts, limits, strict=True)]
    ends = [start + size for start, size in zip(first, sizes, strict=True)]
    return _slice_node(graph, eqn, x, first, ends, [1] * len(sizes))


def _concatenate(graph: _Graph, eqn: Any, *inputs: Any) -> _Tensor:
    names = [graph.full(x, _input_shape(eqn, i)).name for i, x in enumerate(inputs)]
    return graph.node("Concat", names, _output_shape(eqn), axis=eqn.params["dimension"])


def _split(graph: _Graph, eqn: Any, x: Any) -> list[_Tensor]:
    tensor, axis = graph.full(x, _input_shape(eqn)), eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    return [
        graph.node(
            "Slice",
            [tensor.name, *(graph.integers([n]) for n in (end - size, end, axis))],
            out.aval.shape,
        )
        for size, end, out in zip(eqn.params["sizes"], ends, eqn.outvars, strict=True)
    ]


def _stack(graph: _Graph, eqn: Any, *inputs: Any) -> _Tensor:
    out, axis = _output_shape(eqn), eqn.params["axis"]
    slab = [*out[:axis], 1, *out[axis + 1 :]]
    tensors = [graph.full(x, _input_shape(eqn, i)) for i, x in enumerate(inputs)]
    names = [graph.reshape(tensor, slab).name for tensor in tensors]
    return graph.node("Concat", names, out, axis=axis)


def _unstack(graph: _Graph, eqn: Any, x: Any) -> list[_Tensor]:
    tensor, axis = graph.full(x, _input_shape(eqn)), eqn.params["axis"]
    places = [graph.constant(np.asarray(i, np.int64)) for i in range(len(eqn.outvars))]
    return [graph.node("Gather", [tensor.name, i], _output_shape(eqn), axis=axis) for i in places]


def _pad(graph: _Graph, eqn: Any, x: Any, value: Any) -> _Tensor:
    config = eqn.params["padding_config"]
    if any(interior for _, _, interior in config) or not isinstance(value, np.ndarray):
        raise ValueError("pad with holes, or with a value that depends on the input, has no form")
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    names = [graph.full(x, _input_shape(eqn)).name, graph.integers(pads), graph.constant(value)]
    return graph.node("Pad", names, _output_shape(eqn))


def _reduction(op: str) -> Callable[..., _Tensor]:
    def lower(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
        names = [graph.full(x, _input_shape(eqn)).name, graph.integers(eqn.params["axes"])]
        return graph.node(op, names, _output_shape(eqn), keepdims=0)

    return lower


def _max_pool(graph: _Graph, eqn: Any, x: Any) -> _Tensor:
    p, rank = eqn.params, len(_input_shape(eqn))
    window = p["window_dimensions"]
    dilated = {*p["base_dilation"], *p["window_dilation"]} - {1}
    fixed = (window[0], window[-1], p["window_strides"][0], p["window_strides"][-1])
    if fixed != (1, 1, 1, 1) or dilated or any(map(any, (p["padding"][0], p["padding"][-1]))):
        raise ValueError("max pooling is for windows over the middle axes, without dilation")
    padding = p["padding"][1:-1]
    inner = range(1, rank - 1)
    pooled = graph.transpose(graph.full(x, _input_shape(eqn)), [0, rank - 1, *inner])
    out = _output_shape(eqn)
    pooled = graph.node(
        "MaxPool",
        [pooled.name],
        [out[0], out[-1], *out[1:-1]],
        kernel_shape=list(window[1:-1]),
        strides=list(p["window_strides"][1:-1]),
        pads=[low for low, _ in padding] + [high for _, high in padding],
    )
    return graph.transpose(pooled, [0, *range(2, rank), 1])


def _conv(graph: _Graph, eqn: Any, x: Any, kernel: Any) -> _Tensor:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if {*p["lhs_dilation"]} - {1} or p["batch_group_count"] != 1:
        raise ValueError("transposed and batch-grouped convolutions have no ONNX form here")
    lhs = graph.transpose(graph.full(x, _input_shape(eqn)), numbers.lhs_spec)
    name = ""
    if isinstance(kernel, _Kernel):
        name = kernel.layer
        axes = numbers.rhs_spec
        kernel = kernel.arranged(axes, [kernel.integers.shape[axis] for axis in axes])
        rhs = graph.tensor(kernel)
    else:
        rhs = graph.transpose(graph.full(kernel, _input_shape(eqn, 1)), numbers.rhs_spec)
    out = _output_shape(eqn)
    result = graph.node(
        "Conv",
        [lhs.name, rhs.name],
        [out[axis] for axis in numbers.out_spec],
        name=name,
        strides=list(p["window_strides"]),
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
        pads=[low for low, _ in p["padding"]] + [high for _, high in p["padding"]],
    )
    return graph.transpose(result, np.argsort(numbers.out_spec).tolist())


def _dot_general(graph: _Graph, eqn: Any, lhs: Any, rhs: Any) -> _Tensor:
    """Both sides as stacks of matrices, [batch, rows, K] times [batch, K, columns]."""
    contracting, batch = eqn.params["dimension_numbers"]

    def arrange(value: Any, side: int, shape: Sequence[int]) -> tuple[Any, list[int]]:
        fixed = (*contracting[side], *batch[side])
        free = [axis for axis in range(len(shape)) if axis not in fixed]
        middle = [free, contracting[side]] if side == 0 else [contracting[side], free]
        axes = [*batch[side], *middle[0], *middle[1]]
        sizes = [math.prod(shape[axis] for axis in part) for part in middle]
        stacked = [*(shape[axis] for axis in batch[side]), *sizes]
        if isinstance(value, _Kernel):
            return graph.tensor(value.arranged(axes, stacked)), [shape[axis] for axis in free]
        tensor = graph.transpose(graph.full(value, shape), axes)
        return graph.reshape(tensor, stacked), [shape[axis] for axis in free]

    left, rows = arrange(lhs, 0, _input_shape(eqn, 0))
    right, columns = arrange(rhs, 1, _input_shape(eqn, 1))
    name = next((side.layer for side in (rhs, lhs) if isinstance(side, _Kernel)), "")
    shape = [*left.shape[:-1], right.shape[-1]]
    product = graph.node("MatMul", [left.name, right.name], shape, name=name)
    return graph.reshape(product, [*left.shape[: len(batch[0])], *rows, *columns])


def _gather(graph: _Graph, eqn: Any, table: Any, indices: Any) -> _Tensor:
    """Rows of a table by index, as an embedding reads them."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    shape, rows = _input_shape(eqn), _input_shape(eqn, 1)[:-1]
    is_take = (
        tuple(p["slice_sizes"]) == (1, *shape[1:])
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(len(rows), len(rows) + len(shape) - 1))
    )
    if not is_take:
        raise ValueError("gather is for rows of a table, as jnp.take(table, indices, axis=0) reads")
    position = graph.reshape(graph.full(indices, _input_shape(eqn, 1)), rows)
    names = [graph.full(table, shape).name, position.name]
    return graph.node("Gather", names, _output_shape(eqn), axis=0)


def _lower_quantized_input(graph: _Graph, eqn: Any, x: Any, scale: Any) -> _Tensor:
    """Clips to the symmetric range, which QuantizeLinear's own saturation exceeds by −128."""
    tensor, bits = graph.tensor(x), eqn.params["bits"]
    largest = np.asarray(((1 << (bits - 1)) - 1) * scale, np.float32)
    bounds = [graph.constant(-largest), *([graph.constant(largest)] if bits < 8 else [])]
    tensor = graph.node("Clip", [tensor.name, *bounds], tensor.shape)
    pair = [graph.constant(np.asarray(scale, np.float32), "scale")]
    pair.append(graph.constant(np.zeros((), np.int8), "zero_point"))
    tensor = graph.node("QuantizeLinear", [tensor.name, *pair], tensor.shape)
    return graph.node("DequantizeLinear", [tensor.name, *pair], tensor.shape)


def _lower_quantized_kernel(graph: _Graph, eqn: Any, integers: Any, scale: Any) -> _Kernel:
    return _Kernel(eqn.params["layer"], integers, scale)


_LOWERINGS: dict[str, Callable[..., Any]] = {
    **{
        name: _elementwise(op)
        for name, op in {
            "abs": "Abs",
            "add": "Add",
            "add_any": "Add",
            "and": "And",
            "ceil": "Ceil",
            "div": "Div",
            "eq": "Equal",
            "erf": "Erf",
            "exp": "Exp",
            "floor": "Floor",
            "ge": "GreaterOrEqual",
            "gt": "Greater",
            "le": "LessOrEqual",
            "log": "Log",
            "logistic": "Sigmoid",
            "lt": "Less",
            "max": "Max",
            "min": "Min",
            "mul": "Mul",
            "neg": "Neg",
            "not": "Not",
            "or": "Or",
            "pow": "Pow",
            "sign": "Sign",
            "sqrt": "Sqrt",
            "sub": "Sub",
            "tanh": "Tanh",
        }.items()
    },
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "copy": _same,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "erfc": _erfc,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "pad": _pad,
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_window_max": _max_pool,
    "reshape": _reshape,
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _elementwise("Where", (0, 2, 1)),
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": _same,
    "stp_quantized_input": _lower_quantized_input,
    "stp_quantized_kernel": _lower_quantized_kernel,
    "transpose": _transpose,
    "unstack": _unstack,
}

SUPPORTED = tuple(name for name in _LOWERINGS if not name.startswith("stp_"))  # of jax.lax


# --- The whole ------------------------------------------------------------------------------------


def _lower(graph: _Graph, eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    name = eqn.primitive.name
    if name not in _LOWERINGS:
        raise ValueError(
            f"the model uses JAX's operation {name!r}, which has no ONNX form in {__name__}; "
            f"see what has: {__name__}.SUPPORTED"
        )
    variables: list[Any] = [*eqn.invars, *eqn.outvars]
    types = {str(var.aval.dtype) for var in variables}
    if types & {"bfloat16", "float16"}:
        raise ValueError(f"{name} computes in {', '.join(types)}; export a model with dtype=None")
    outputs = _LOWERINGS[name](graph, eqn, *inputs)
    return outputs if isinstance(outputs, list) else [outputs]


def export_onnx(model: Any, example: Any, path: str | Path, **kwargs: Any) -> None:
    """Writes an STP model as an ONNX file for evaluation.

    Kernels are int8 initializers before DequantizeLinear with a scale per output channel, layer
    inputs go through Clip, QuantizeLinear and DequantizeLinear; sums are the runtime's, in float32
    or, where it fuses the pairs, in int32. The graph has one input ``input`` and one output
    ``logits`` in the model's own layout (N, H, W, C) and with the example's batch size.

    Args:
      model: a calibrated STP model (a Linen one with its variables), computing in float32.
      example: an input of the model, or its ``jax.ShapeDtypeStruct``.
      path: the file, conventionally ``*.onnx``.
      **kwargs: keyword arguments of the model's call, such as ``train=False``.

    Raises:
      ImportError: the package ``onnx`` is missing.
      ValueError: the model is not quantized or not calibrated, has weights or inputs above 8 bits,
        or uses an operation that has no ONNX form here; the message names it.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "export_onnx needs the onnx package: pip install 'stp-jax[onnx]'"
        ) from error
    _check(model)
    closed = trace_integers(model, example, **kwargs)
    graph = _Graph(onnx)
    graph.unique("input")
    arguments = [_Tensor("input", example.shape)]
    (result,) = walk(closed, arguments, functools.partial(_lower, graph))
    out = closed.out_avals[0]
    final = graph.full(result, out.shape)
    graph.nodes.append(onnx.helper.make_node("Identity", [final.name], ["logits"], name="logits"))

    def described(name: str, aval: Any) -> Any:
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
        return onnx.helper.make_tensor_value_info(name, element, aval.shape)

    onnx_graph = onnx.helper.make_graph(
        graph.nodes,
        hooks.model_name(model),
        [described("input", closed.in_avals[0])],
        [described("logits", out)],
        graph.constants,
    )
    proto = onnx.helper.make_model(
        onnx_graph,
        producer_name="stp_jax",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(path))
