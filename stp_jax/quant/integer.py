"""The integer model: what an STP model computes, in integers only inside each quantized layer.

Each quantized kernel is replaced by its integers, its input is quantized to integers, products are
summed in int32, and one multiplication by ``input scale * kernel scale`` per output channel leads
back to float for what stands between the layers (bias, normalisation, activation function).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax.quant.nnx import QuantizedLayer, Quantizer, product_hook, quantized_layers
from stp_jax.terms.activations import activation_integers
from stp_jax.terms.encodings import digit_planes, num_digits

Arithmetic = Literal["multiply", "shift_add"]


class IntegerOperands(nnx.Module):
    """Takes the place of `promote_dtype`: an integer input beside the integer kernel."""

    def __init__(self, quantizer: Quantizer):
        """Takes over the input's scale and width."""
        self.quantizer = quantizer

    def __call__(self, operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        """Quantizes the input; the kernel holds integers already."""
        x, kernel, *rest = operands
        rule = self.quantizer.rule
        q = activation_integers(
            x,
            self.quantizer.input_scale(x),
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

    def __init__(
        self, quantizer: Quantizer, scale: jax.Array, product: Callable, arithmetic: Arithmetic
    ):
        """Keeps the kernel's scale, shaped like the output's last axes."""
        self.quantizer = quantizer
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
        scale = self.scale[...] * self.quantizer.activation_scale[...]
        scale = scale.reshape((1,) * (total.ndim - scale.ndim) + scale.shape)
        return total.astype(jnp.float32) * scale

    def _shift_add(self, x, kernel, *args, **kwargs):
        """Sums ``±(x << exponent)`` over the kernel's terms, one exponent after the other."""
        rule = self.quantizer.rule
        plus, minus = digit_planes(kernel, rule.encoding, rule.bits)
        total = None
        for e in range(num_digits(rule.encoding, rule.bits)):
            signs = (((plus >> e) & 1) - ((minus >> e) & 1)).astype(x.dtype)
            shifted = self.product(x, signs, *args, **kwargs) << e
            total = shifted if total is None else total + shifted
        return total


def integer_model(model: nnx.Module, *, arithmetic: Arithmetic = "multiply") -> nnx.Module:
    """A copy of an STP model whose quantized layers compute in integers.

    Args:
      model: a calibrated STP model whose quantized layers are Conv, Linear or LinearGeneral (as in
        attention) without batch axes, with calibrated or learned activation scales.
      arithmetic: ``multiply`` for integer products, ``shift_add`` for shifts and additions of the
        weights' terms. Both give the same integers.

    Returns:
      A model with int8 kernels (int32 above 8 bits) for evaluation. Its outputs equal the STP
      model's up to float rounding outside the integer sums.

    Raises:
      ValueError: a layer is of another kind, or its input has no calibrated integer scale.
    """
    if arithmetic not in ("multiply", "shift_add"):
        raise ValueError(f"arithmetic must be multiply or shift_add, got {arithmetic!r}")
    model = nnx.clone(model)
    for path, quantized in quantized_layers(model).items():
        _to_integers(path, quantized, arithmetic)
    return model


def _to_integers(path: str, quantized: QuantizedLayer, arithmetic: Arithmetic) -> None:
    layer, quantizer = quantized
    hook = product_hook(layer)
    if hook is None:
        raise ValueError(
            f"layer {path!r}: integer {type(layer).__name__} is not supported; keep it float with "
            f"Rule(path={re.escape(path)!r}, keep_float=True) before the other rules"
        )
    if quantizer.rule.activations not in ("learned", "calibrated"):
        raise ValueError(
            f"layer {path!r}: integer arithmetic needs activations='learned' or 'calibrated' in "
            f"its rule, not {quantizer.rule.activations!r}"
        )
    if quantizer.budget[...].ndim:
        raise ValueError(f"layer {path!r}: integer arithmetic of stacked layers is not supported")
    if not quantizer.activation_scale[...] > 0:
        raise ValueError(f"layer {path!r}: its input has no scale yet; call stp_jax.calibrate")
    kernel = quantized.kernel
    scale = quantizer.kernel_scale(kernel)
    if isinstance(layer, nnx.LinearGeneral):
        scale = scale.reshape(layer.out_features)
    else:
        scale = scale.reshape(-1)
    integers = quantizer.integer_kernel(kernel)
    layer.kernel = nnx.Param(integers.astype(jnp.int8 if quantizer.rule.bits <= 8 else jnp.int32))
    layer.promote_dtype = nnx.data(IntegerOperands(quantizer))
    product = IntegerProduct(
        quantizer, scale, getattr(layer, hook) or jax.lax.dot_general, arithmetic
    )
    setattr(layer, hook, nnx.data(product))
