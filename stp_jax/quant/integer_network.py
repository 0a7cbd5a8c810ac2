"""From an STP model with power-of-two scales to a program of additions and shifts on integers.

The model is traced to a jaxpr (`stp_jax.quant.tracing`), and each equation that depends on the
input becomes steps (`stp_jax.quant.integer_steps`). Beside its integers every value has facts that
hold for all inputs: exponents, bounds, and an upper bound of what inexact steps have added. So
shifts are constants of the program, and sums that could leave int32 are found before it runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.quant.integer import check_layer
from stp_jax.quant.integer_steps import (
    INT32,
    Arithmetic,
    Arrange,
    Combine,
    IntegerNetwork,
    Pad,
    Product,
    Requantize,
    Scale,
    Shift,
    Step,
    Window,
    few_terms,
)
from stp_jax.quant.layers import QuantizedLayer, quantized_layers
from stp_jax.quant.tracing import quantized_input, quantized_kernel, trace_integers, walk

_FREE = 1 << 12  # the exponent of a constant zero, above all others
_CONV_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
)
_MOVES = ("concatenate", "expand_dims", "reshape", "rev", "slice", "squeeze", "transpose")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Value:
    """Result of a step and its facts, arrays with its axes, 1 where they do not vary."""

    number: int  # of the step
    layer: str  # the last one before it
    shape: tuple[int, ...]
    exponent: np.ndarray
    low: np.ndarray  # bounds of the integers, int64
    high: np.ndarray
    error: np.ndarray  # of the real number
    is_input: bool = False  # elements of the network's input, which the first layer quantizes

    def shift_to(self, exponent: np.ndarray) -> np.ndarray:
        """The shift to the left that gives the exponent; none for zeros, which have any."""
        is_zero = (self.low == 0) & (self.high == 0)
        return np.where(is_zero, 0, self.exponent - exponent)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    layer: str
    integers: np.ndarray
    exponent: np.ndarray  # of each filter


def _compact(facts: np.ndarray) -> np.ndarray:
    """Axes along which nothing varies, cut to 1."""
    for axis in range(facts.ndim):
        first = facts.take([0], axis)
        facts = first if np.array_equal(np.broadcast_to(first, facts.shape), facts) else facts
    return facts


def _exponents(scale: np.ndarray, layer: str) -> np.ndarray:
    """Exponents of scales that are powers of two."""
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    if (mantissa != 0.5).any():
        raise ValueError(f"layer {layer!r}: its scales are not powers of two")
    return exponent.astype(np.int64) - 1


def _lowest_bits(x: np.ndarray) -> np.ndarray:
    """The largest exponents at which numbers are integers times a power of two."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return np.where(x == 0, _FREE, lowest + exponent - 53)


class _Builder:
    """The program so far."""

    def __init__(self, layers: Mapping[str, QuantizedLayer], arithmetic: Arithmetic):
        self.layers, self.arithmetic = layers, arithmetic
        self.steps: list[Step] = []

    def emit(
        self,
        kind: type[Step],
        inputs: Sequence[_Value],
        shape: Sequence[int],
        facts: Mapping[str, np.ndarray],
        layer: str | None = None,
        is_input: bool = False,
        **fields: Any,
    ) -> _Value:
        """Adds a step. Raises ValueError if a result may leave int32."""
        layer = inputs[0].layer if layer is None else layer
        facts = {name: _compact(np.asarray(fact)) for name, fact in facts.items()}
        low, high = int(facts["low"].min()), int(facts["high"].max())
        bits = 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0)
        step = kind(
            layer=layer,
            inputs=tuple(value.number for value in inputs),
            shape=tuple(shape),
            exponent=facts["exponent"].astype(np.int32),
            bits=bits,
            error=float(facts["error"].max()),
            **fields,
        )
        if low < INT32[0] or high > INT32[1]:
            raise ValueError(
                f"after layer {layer!r} the step {step.describe()!r} needs {bits} bits in the "
                "worst case; the network has 32. Coarser scales or fewer bits make room"
            )
        self.steps.append(step)
        number = len(self.steps)
        return _Value(number=number, layer=layer, shape=step.shape, is_input=is_input, **facts)

    def align(self, x: _Value, exponent: np.ndarray) -> _Value:
        """A value at an exponent not above its own, by a shift to the left."""
        amount = _compact(x.shift_to(exponent))
        if not amount.any():
            return dataclasses.replace(x, exponent=exponent)
        wide = np.minimum(amount, 31)  # so that bounds fit int64; 31 is too wide for int32 anyway
        facts = {"exponent": exponent, "low": x.low << wide, "high": x.high << wide}
        facts["error"] = x.error
        return self.emit(Shift, [x], x.shape, facts, amount=amount.astype(np.int32))


# --- Operations -----------------------------------------------------------------------------------
# Each takes (builder, equation, *inputs), values or constants, and returns the equation's output.


def _input(builder: _Builder, eqn: Any, x: _Value, scale: Any) -> _Value:
    layer, bits = eqn.params["layer"], eqn.params["bits"]
    exponent, largest = _exponents(scale, layer), (1 << (bits - 1)) - 1
    if x.is_input:
        if (x.exponent != exponent).any() or (x.high != largest).any():
            raise ValueError(
                f"layer {layer!r} quantizes the network's input otherwise than the first layer; "
                "an integer network has one integer input"
            )
        return dataclasses.replace(x, is_input=False)
    right = -x.shift_to(exponent)
    # Beyond these limits the result is the same: 0, or clipped.
    right = _compact(np.clip(right, 1 - bits, 31))
    rounded = [
        np.clip(np.round(np.ldexp(bound.astype(np.float64), -right)), -largest, largest)
        for bound in (x.low, x.high)
    ]
    if (x.high + ((1 << np.maximum(right, 0)) >> 1) > INT32[1]).any():
        raise ValueError(f"layer {layer!r}: rounding its input may leave int32")
    step = 2.0**exponent
    error = np.where(x.error > 0, (np.floor(x.error / step) + 1) * step, 0.0)
    low, high = (bound.astype(np.int64) for bound in rounded)
    facts = {"exponent": np.broadcast_to(exponent, (1,) * len(x.shape)), "error": error}
    facts |= {"low": low, "high": high}
    fields = {"right": right.astype(np.int32), "largest": largest}
    return builder.emit(Requantize, [x], x.shape, facts, layer, **fields)


def _kernel(builder: _Builder, eqn: Any, integers: np.ndarray, scale: np.ndarray) -> _Kernel:
    layer = eqn.params["layer"]
    return _Kernel(layer, integers.astype(np.int32), _exponents(scale, layer).reshape(-1))


def _is_plain_product(eqn: Any, x: Any, kernel: Any) -> bool:
    """Whether a product is that of a dense layer, or of a convolution with channels last."""
    p, last = eqn.params, len(eqn.invars[0].aval.shape) - 1
    if eqn.primitive.name == "dot_general":
        contracting, batch = p["dimension_numbers"]
        return kernel.integers.ndim == 2 and (contracting, batch) == (((last,), (0,)), ((), ()))
    middle = tuple(range(1, last))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, last, *middle), (last, last - 1, *range(last - 1)), (0, last, *middle)
    )
    plain = p["batch_group_count"] == 1 and not {*p["lhs_dilation"]} - {1}
    return plain and p["dimension_numbers"] == numbers


def _product(builder: _Builder, eqn: Any, x: Any, kernel: Any) -> _Value:
    if not isinstance(x, _Value) or not isinstance(kernel, _Kernel):
        raise ValueError(
            f"{eqn.primitive.name} after layer {_last_layer([x, kernel])!r} has no integer kernel; "
            "all layers must be quantized, and products of two activations have no integer form"
        )
    if not _is_plain_product(eqn, x, kernel) or x.exponent.size != 1:
        raise ValueError(f"layer {kernel.layer!r}: this kind of product has no integer form")
    weights, layer = kernel.integers, builder.layers[kernel.layer]
    shape = eqn.outvars[0].aval.shape
    axes = tuple(range(weights.ndim - 1))

    def sums(values: np.ndarray) -> np.ndarray:
        total = values.sum(axes, dtype=np.int64)
        return total.reshape((1,) * (len(shape) - 1) + total.shape)

    plus, minus = sums(np.maximum(weights, 0)), sums(np.minimum(weights, 0))
    # Zeros of the padding are inputs, too.
    low, high = min(int(x.low.min()), 0), max(int(x.high.max()), 0)
    exponent = kernel.exponent.reshape((1,) * (len(shape) - 1) + (-1,))
    facts = {
        "exponent": x.exponent.reshape(-1) + exponent,
        "low": low * plus + high * minus,
        "high": high * plus + low * minus,
        "error": x.error.max() * (plus - minus) * 2.0**exponent,
    }
    narrow = max(-low - 1, high, int(np.abs(weights).max())) <= 127
    options = _CONV_OPTIONS if eqn.primitive is jax.lax.conv_general_dilated_p else ()
    return builder.emit(
        Product,
        [x],
        shape,
        facts,
        kernel.layer,
        weights=weights,
        format=layer.format,
        budget=np.asarray(layer.flat_budget),
        options={name: eqn.params[name] for name in options},
        arithmetic=builder.arithmetic,
        operand=np.int8 if narrow else np.int32,
    )


def _combine(operation: str, builder: _Builder, eqn: Any, x: Any, y: Any) -> _Value:
    if operation != "sub" and not isinstance(x, _Value):
        x, y = y, x
    if not isinstance(x, _Value) or isinstance(y, _Kernel):
        raise _no_form(eqn, [x, y])
    shape, ones = eqn.outvars[0].aval.shape, (1,) * len(eqn.outvars[0].aval.shape)
    if isinstance(y, _Value):
        exponent = np.minimum(x.exponent, y.exponent)
        x, y = builder.align(x, exponent), builder.align(y, exponent)
        inputs, constant, low, high, error = [x, y], None, y.low, y.high, y.error
    else:
        y = np.asarray(y, np.float64).reshape(y.shape or ones)
        exponent = np.minimum(x.exponent, _lowest_bits(y))
        x = builder.align(x, exponent)
        low = high = np.clip(np.ldexp(y, -exponent), -(2.0**60), 2.0**60).astype(np.int64)
        inputs, constant, error = [x], low, np.zeros(ones)
    if operation == "sub":
        low, high = -high, -low
    join = {"max": np.maximum, "min": np.minimum}.get(operation, np.add)
    facts = {
        "exponent": exponent,
        "low": np.asarray(join(x.low, low)),
        "high": np.asarray(join(x.high, high)),
        "error": np.maximum(x.error, error) if join is not np.add else x.error + error,
    }
    if constant is not None and not INT32[0] <= constant.min() <= constant.max() <= INT32[1]:
        facts["high"] = np.maximum(facts["high"], np.abs(constant))  # which is refused
    else:
        constant = None if constant is None else constant.astype(np.int32)
    return builder.emit(Combine, inputs, shape, facts, operation=operation, constant=constant)


def _clamp(builder: _Builder, eqn: Any, low: Any, x: Any, high: Any) -> _Value:
    return _combine("min", builder, eqn, _combine("max", builder, eqn, x, low), high)


def _scale(inverse: bool, builder: _Builder, eqn: Any, x: Any, y: Any) -> _Value:
    """Times a constant, or over one: an exponent if it is a power of two, else few terms."""
    if not inverse and not isinstance(x, _Value):
        x, y = y, x
    if not isinstance(x, _Value) or not isinstance(y, np.ndarray) or not (y > 0).all():
        raise _no_form(eqn, [x, y])
    factor = np.asarray(y, np.float64).reshape(y.shape or (1,) * len(x.shape))
    factor = _compact(1 / factor if inverse else factor)
    mantissa, power = np.frexp(factor)
    if (mantissa == 0.5).all():
        exponent = np.where(x.exponent >= _FREE // 2, x.exponent, x.exponent + power - 1)
        return dataclasses.replace(x, exponent=exponent, error=x.error * factor)
    if factor.size > 1:
        raise _no_form(eqn, [x, y])
    number = factor.item()
    fraction, terms = few_terms(number)
    most = max(int(x.high.max()), int(-x.low.min()), 1)
    # Partial sums stay below twice the largest term.
    right = max(0, (most << (terms[0][1] + 1)).bit_length() - 31)
    whole = sum(sign << e for sign, e in terms)
    low, high = (
        np.round(np.ldexp(bound.astype(np.float64), -right)).astype(np.int64) * whole
        for bound in (x.low, x.high)
    )
    size = np.maximum(np.abs(x.low), np.abs(x.high)) * 2.0**x.exponent
    rounding = 2.0 ** (x.exponent + right - 1) * (right > 0)
    taken = whole * 2.0**-fraction
    facts = {
        "exponent": x.exponent + right - fraction,
        "low": low,
        "high": high,
        "error": x.error * number + size * abs(taken - number) + rounding * taken,
    }
    return builder.emit(Scale, [x], x.shape, facts, factor=number, right=right, terms=terms)


def _same(builder: _Builder, eqn: Any, x: Any) -> Any:
    if eqn.outvars[0].aval.dtype != eqn.invars[0].aval.dtype:
        raise _no_form(eqn, [x])
    return x


def _reduce_sum(builder: _Builder, eqn: Any, x: _Value) -> _Value:
    axes = eqn.params["axes"]
    x = builder.align(x, x.exponent.min(axes, keepdims=True))
    facts = {
        name: np.broadcast_to(fact, x.shape).sum(axes)
        for name, fact in (("low", x.low), ("high", x.high), ("error", x.error))
    }
    facts["exponent"] = x.exponent.max(axes)
    shape = eqn.outvars[0].aval.shape
    return builder.emit(Window, [x], shape, facts, operation="sum", options={"axes": axes})


def _window(operation: str, builder: _Builder, eqn: Any, x: _Value) -> _Value:
    size = eqn.params["window_dimensions"]
    axes = tuple(axis for axis, n in enumerate(size) if n > 1)
    x = builder.align(x, x.exponent.min(axes, keepdims=True))
    bounds = {
        "low": x.low.min(axes, keepdims=True),
        "high": x.high.max(axes, keepdims=True),
        "error": x.error.max(axes, keepdims=True),
    }
    if operation == "sum":  # of the padding as well
        count = int(np.prod(size))
        bounds = {"low": np.minimum(bounds["low"], 0) * count, "error": bounds["error"] * count,
                  "high": np.maximum(bounds["high"], 0) * count}  # fmt: skip
    facts = {"exponent": x.exponent.max(axes, keepdims=True), **bounds}
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    options = {name: eqn.params[name] for name in names}
    shape = eqn.outvars[0].aval.shape
    return builder.emit(Window, [x], shape, facts, operation=operation, options=options)


def _moved(
    builder: _Builder, eqn: Any, move: Callable, inputs: Sequence[_Value], kind: type, **fields: Any
) -> _Value:
    """A step that moves elements; ``move`` does so with arrays, and puts -1 where zeros go."""
    ends = np.cumsum([0, *(np.prod(x.shape) for x in inputs)])
    places = [
        jnp.arange(start, end, dtype=jnp.int32).reshape(x.shape)
        for x, start, end in zip(inputs, ends, ends[1:], strict=False)
    ]
    place = np.asarray(move(*places))

    def facts(name: str, of_zero: Any) -> np.ndarray:
        flat = [np.broadcast_to(getattr(x, name), x.shape).reshape(-1) for x in inputs]
        return np.where(place < 0, of_zero, np.concatenate(flat)[place])

    found = {name: facts(name, 0) for name in ("low", "high", "error")}
    is_input = all(x.is_input for x in inputs)
    found["exponent"] = facts("exponent", inputs[0].exponent.max() if is_input else _FREE)
    if is_input:
        found |= {"low": inputs[0].low.min(), "high": inputs[0].high.max()}
        found |= {name: np.broadcast_to(found[name], place.shape) for name in ("low", "high")}
    return builder.emit(kind, inputs, place.shape, found, is_input=is_input, **fields)


def _arrange(builder: _Builder, eqn: Any, *inputs: Any) -> _Value:
    if not all(isinstance(x, _Value) for x in inputs):
        raise _no_form(eqn, inputs)
    move = functools.partial(eqn.primitive.bind, **eqn.params)
    fields = {"primitive": eqn.primitive, "options": eqn.params}
    return _moved(builder, eqn, move, inputs, Arrange, **fields)


def _broadcast_in_dim(builder: _Builder, eqn: Any, x: Any) -> Any:
    if isinstance(x, _Value):
        return _arrange(builder, eqn, x)
    shape = [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return x.reshape(shape)


def _pad(builder: _Builder, eqn: Any, x: Any, value: Any) -> _Value:
    if not isinstance(x, _Value) or not isinstance(value, np.ndarray) or value.any():
        raise _no_form(eqn, [x, value])
    padding = eqn.params["padding_config"]

    def move(place: jax.Array) -> jax.Array:
        return jax.lax.pad(place, np.int32(-1), padding)

    return _moved(builder, eqn, move, [x], Pad, padding=padding)


_LOWERINGS: dict[str, Callable[..., Any]] = {
    **{name: functools.partial(_combine, name) for name in ("add", "sub", "max", "min")},
    **{name: _same for name in ("copy", "stop_gradient", "convert_element_type")},
    **{name: _arrange for name in _MOVES},
    "add_any": functools.partial(_combine, "add"),
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "conv_general_dilated": _product,
    "div": functools.partial(_scale, True),
    "dot_general": _product,
    "mul": functools.partial(_scale, False),
    "pad": _pad,
    "reduce_sum": _reduce_sum,
    "reduce_window_max": functools.partial(_window, "max"),
    "reduce_window_sum": functools.partial(_window, "sum"),
    quantized_input.name: _input,
    quantized_kernel.name: _kernel,
}
_OF_INPUT = (_input, _arrange, _broadcast_in_dim, _pad, _same)  # what may come before a layer


def _last_layer(inputs: Sequence[Any]) -> str:
    return next((x.layer for x in inputs if isinstance(x, _Value | _Kernel)), "")


def _no_form(eqn: Any, inputs: Sequence[Any]) -> ValueError:
    return ValueError(
        f"JAX's operation {eqn.primitive.name!r} after layer {_last_layer(inputs)!r} has no "
        "integer form of additions and shifts"
    )


def _lower(builder: _Builder, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    lowering = _LOWERINGS.get(eqn.primitive.name)
    if lowering is None:
        raise _no_form(eqn, inputs)
    before = any(isinstance(x, _Value) and x.is_input for x in inputs)
    if before and lowering not in _OF_INPUT:
        raise ValueError(
            f"JAX's operation {eqn.primitive.name!r} takes the network's input before a layer has "
            "quantized it; do this outside of the model"
        )
    return [lowering(builder, eqn, *inputs)]


def _first_quantizer(eqn: Any, found: list[Any], inputs: Sequence[Any]) -> list[Any]:
    """Lowers to nothing and notes the scales and widths of layers' inputs."""
    if eqn.primitive is quantized_input:
        found.append((eqn.params["layer"], inputs[1], eqn.params["bits"]))
    return [None] * len(eqn.outvars)


def _refuse_batch_norm(path: str, _: Any) -> None:
    raise ValueError(
        f"BatchNorm {path!r} has no integer form; fold it into the layer before it with "
        "stp_jax.fold_batch_norm before the model is quantized"
    )


def integer_network(
    model: Any, example: Any, *, arithmetic: Arithmetic = "multiply"
) -> IntegerNetwork:
    """An STP model as a program of additions and shifts on integers, from input to outputs.

    Scales are powers of two, so that a layer's quantizer is a rounding shift, biases lie on the
    grid of the sums, and values of different scale are added after a shift to the left. All of that
    is exact. A mean over a number of elements that is no power of two multiplies by a sum of few
    terms, whose error the step and the network state.

    Args:
      model: a calibrated STP model (a Linen one with its variables) of convolutions and dense
        layers whose rules have ``power_of_two_scales``. BatchNorms are folded
        (`stp_jax.fold_batch_norm`).
      example: its input [N, …], or a ``jax.ShapeDtypeStruct``; the network takes any N.
      arithmetic: ``multiply`` for products of integers in the layers, ``shift_add`` for shifts and
        additions of the weights' terms. Both give the same integers.

    Returns:
      The network. Where no step states an error, its outputs are those of the model, bit for bit as
      far as sums of the model stay exact in float32 (below 2**24 in integers).

    Raises:
      ValueError: a layer is float, of another kind or not calibrated, an operation has no integer
        form, or integers may leave int32; the message names layer and operation.
    """
    if arithmetic not in ("multiply", "shift_add"):
        raise ValueError(f"arithmetic must be multiply or shift_add, got {arithmetic!r}")
    layers = quantized_layers(model)
    for layer in layers.values():
        check_layer(layer)
        _check_rule(layer)
    single = jax.ShapeDtypeStruct((1, *example.shape[1:]), example.dtype)
    closed = trace_integers(model, single, batch_norm=_refuse_batch_norm)
    quantizers: list[Any] = []
    walk(closed, [None], lambda eqn, inputs: _first_quantizer(eqn, quantizers, inputs))
    if not quantizers:
        raise ValueError("the model does not use its quantized layers on this input")
    first, scale, bits = quantizers[0]
    exponent, largest = int(_exponents(scale, first).item()), (1 << (bits - 1)) - 1
    ones = np.ones((1,) * len(single.shape), np.int64)
    given = _Value(
        number=0, layer=first, shape=single.shape, exponent=exponent * ones, low=-largest * ones,
        high=largest * ones, error=0.0 * ones, is_input=True,
    )  # fmt: skip
    builder = _Builder(layers, arithmetic)
    (result,) = walk(closed, [given], functools.partial(_lower, builder))
    if not isinstance(result, _Value) or result.is_input:
        raise ValueError("the model's output does not depend on a layer of integers")
    result = builder.align(result, result.exponent.min(keepdims=True))
    if result.number != len(builder.steps):
        raise ValueError("the model computes something behind its output, which has no use")
    return IntegerNetwork(
        steps=tuple(builder.steps),
        input_shape=single.shape[1:],
        input_exponent=exponent,
        input_bits=bits,
        exponent=int(result.exponent.min()),
        error=float(result.error.max()),
    )


def _check_rule(layer: QuantizedLayer) -> None:
    path, rule = layer.path, layer.rule
    if not rule.power_of_two_scales:
        raise ValueError(
            f"layer {path!r}: an integer network needs scales that are powers of two; quantize "
            "with power_of_two_scales=True in its rule"
        )
    kinds, bits = ("conv", "dense"), rule.activation_bits
    if rule.activation_terms is not None or bits > 16 or layer.layer.kind not in kinds:
        raise ValueError(
            f"layer {path!r}: an integer network takes convolutions and dense layers whose inputs "
            "have up to 16 bits and keep all their terms"
        )
