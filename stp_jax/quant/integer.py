"""The integer model: what an STP model computes, in integers only inside each quantized layer.

Each quantized kernel is replaced by its integers, its input is quantized to integers, products are
summed in int32, and one multiplication by ``input scale * kernel scale`` per output channel leads
back to float for what stands between the layers (bias, normalisation, activation function).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.quant.layers import (
    QuantizedLayer,
    check_not_stacked,
    check_scale_by_filter,
    quantized_layers,
    without_quantizers,
)
from stp_jax.quant.policy import Rule
from stp_jax.quant.tracing import check_calibrated
from stp_jax.terms.activations import activation_integers
from stp_jax.terms.encodings import digit_planes, num_digits

Arithmetic = Literal["multiply", "shift_add"]
Model = TypeVar("Model")


class IntegerOperands(nnx.Module):
    """Takes the place of `promote_dtype`: an integer input beside the integer kernel."""

    def __init__(self, rule: Rule, input_scale: jax.Array):
        """Keeps the positive scale of the input."""
        self.rule = rule
        self.input_scale = nnx.Variable(input_scale)

    def __call__(self, operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        """Quantizes the input; the kernel holds integers already."""
        x, kernel, *rest = operands
        rule = self.rule
        q = activation_integers(
            x,
            self.input_scale[...],
            bits=rule.activation_bits,
            terms=rule.activation_terms,
            method=rule.method,
            encoding=rule.encoding,
        )
        # Terms may reach one beyond the integers of that width. A product takes one type.
        small = rule.activation_bits <= 8 and rule.activation_terms is None
        dtype = jnp.int8 if small and kernel.dtype == jnp.int8 else jnp.int32
        return (q.astype(dtype), kernel.astype(dtype), *rest)


class IntegerProduct(nnx.Module):
    """Takes the place of a layer's product: sums in int32, then scales back to float."""

    def __init__(self, rule: Rule, scale: jax.Array, product: Callable, arithmetic: Arithmetic):
        """Keeps both operands' scale, shaped like the output's last axes."""
        self.rule = rule
        self.scale = nnx.Variable(scale)
        self.product = product
        self.arithmetic = arithmetic

    def __call__(self, x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product of integers x and kernel, times both scales."""
        kwargs["preferred_element_type"] = jnp.int32
        if self.arithmetic == "multiply":
            total = self.product(x, kernel, *args, **kwargs)
        else:
            total = self._shift_add(x, kernel, *args, **kwargs)
        scale = self.scale[...]
        scale = scale.reshape((1,) * (total.ndim - scale.ndim) + scale.shape)
        return total.astype(jnp.float32) * scale

    def _shift_add(self, x, kernel, *args, **kwargs):
        """Sums ``±(x << exponent)`` over the kernel's terms, one exponent after the other."""
        rule = self.rule
        plus, minus = digit_planes(kernel, rule.encoding, rule.bits)
        total = None
        for e in range(num_digits(rule.encoding, rule.bits)):
            signs = (((plus >> e) & 1) - ((minus >> e) & 1)).astype(x.dtype)
            shifted = self.product(x, signs, *args, **kwargs) << e
            total = shifted if total is None else total + shifted
        return total


def integer_model(model: Model, *, arithmetic: Arithmetic = "multiply") -> Model:
    """A copy of an STP model whose quantized layers compute in integers.

    Args:
      model: a calibrated STP model (a Linen one with its variables) whose quantized layers are
        Conv, Linear or LinearGeneral (as in attention) without batch axes, with calibrated or
        learned activation scales.
      arithmetic: ``multiply`` for integer products, ``shift_add`` for shifts and additions of the
        weights' terms. Both give the same integers.

    Returns:
      A model with int8 kernels (int32 above 8 bits) for evaluation. Its outputs equal the STP
      model's up to float rounding outside the integer sums.

    Raises:
      ValueError: a layer is of another kind or has scales by group, its input has no calibrated
        integer scale, or its sums may exceed int32.
    """
    if arithmetic not in ("multiply", "shift_add"):
        raise ValueError(f"arithmetic must be multiply or shift_add, got {arithmetic!r}")
    layers = quantized_layers(model)
    check_scale_by_filter(layers, "integer_model")
    for layer in layers.values():
        check_layer(layer)
    integers = {path: layer.integers() for path, layer in layers.items()}
    for path, layer in layers.items():
        _check_sums(layer, integers[path])
    float_model = without_quantizers(model)
    for path, layer in layers.items():
        dtype = jnp.int8 if layer.rule.bits <= 8 else jnp.int32
        hooks.replace_kernel(float_model, layer.layer, integers[path].astype(dtype))
        bias = layer.quantize_bias(hooks.get_variable(float_model, layer.path, "bias"))
        if bias is not None:
            hooks.set_variable(float_model, layer.path, "bias", bias)
    rules = {path: layer.rule for path, layer in layers.items()}
    scales = {path: _scales(layer) for path, layer in layers.items()}

    def operands(layer: KernelLayer, promote: Callable) -> Callable | None:
        if layer.path not in rules:
            return None
        return IntegerOperands(rules[layer.path], scales[layer.path][0])

    def product(layer: KernelLayer, product: Callable) -> Callable | None:
        if layer.path not in rules:
            return None
        return IntegerProduct(rules[layer.path], scales[layer.path][1], product, arithmetic)

    return hooks.attach(float_model, Hooks(operands=operands, product=product))


def _scales(layer: QuantizedLayer) -> tuple[jax.Array, jax.Array]:
    """The scale of a layer's input, and that of its integer sums by output channel."""
    of_input = layer.input_scale
    assert of_input is not None
    return of_input, layer.scale.reshape(layer.layer.out_features) * of_input


def _check_sums(layer: QuantizedLayer, integers: jax.Array) -> None:
    """Raises ValueError if the sums of a layer with these integers may exceed int32."""
    weights = np.abs(np.asarray(integers, np.int64)).sum(axis=layer.format.axes.scale)
    bound = int(weights.max(initial=0)) << (layer.rule.activation_bits - 1)
    if bound >= 1 << 31:
        raise ValueError(
            f"layer {layer.path!r}: sums of {layer.rule.bits}-bit weights and "
            f"{layer.rule.activation_bits}-bit inputs may reach {bound}, more than int32 holds; "
            "take fewer bits, or keep the layer float"
        )


def check_layer(layer: QuantizedLayer) -> None:
    """Raises ValueError unless a layer can compute in integers; the message names it."""
    path, rule = layer.path, layer.rule
    if not layer.layer.has_plain_product:
        kind = layer.layer.type_name + ("" if layer.layer.mask is None else " with a mask")
        raise ValueError(
            f"layer {path!r}: integer {kind} is not supported; keep it float with "
            f"Rule(path={re.escape(path)!r}, keep_float=True) before the other rules"
        )
    if not rule.stores_input_scale:
        raise ValueError(
            f"layer {path!r}: integer arithmetic needs activations='learned' or 'calibrated' in "
            f"its rule, not {rule.activations!r}"
        )
    check_not_stacked({path: layer}, "integer arithmetic")
    check_calibrated(layer)
