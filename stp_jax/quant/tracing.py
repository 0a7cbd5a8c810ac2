"""An STP model as a jaxpr in which each quantized layer shows its integers.

What turns a model into another form (ONNX, the integer network) reads it from here: quantizers
leave two primitives in the jaxpr, and `walk` gives every equation that depends on the model's input
to a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.quant.layers import (
    QuantizedLayer,
    check_not_stacked,
    quantized_layers,
    without_quantizers,
)

# Both take their operand and its positive scale, and have the layer's path as a parameter.
quantized_input = core.Primitive("stp_quantized_input")  # float32 x, also ``bits``
quantized_kernel = core.Primitive("stp_quantized_kernel")  # integers
quantized_input.def_abstract_eval(lambda x, scale, *, layer, bits: x)
quantized_kernel.def_abstract_eval(lambda q, scale, *, layer: q.update(dtype=scale.dtype))

# Equations that only call a jaxpr; JAX's remat has had all of these names.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "checkpoint", "remat", "remat2")

Lower = Callable[[Any, Sequence[Any]], Sequence[Any]]


def _show_operands(quantized: QuantizedLayer, promote: Callable) -> Callable:
    """Takes the place of a quantizer: the same numbers through this module's primitives."""
    rule, path = quantized.rule, quantized.path
    integers = quantized.integers().astype(jnp.int8 if rule.bits <= 8 else jnp.int32)
    scale, of_input = quantized.scale, quantized.input_scale

    def shown(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        kernel = quantized_kernel.bind(integers, scale, layer=path)
        if len(operands) == 1:
            return promote((kernel,), **kwargs)
        x, _, *biases = operands
        if of_input is None:
            x = quantized.format.quantize_input(x, None)
        else:
            x = x.astype(jnp.float32)
            x = quantized_input.bind(x, of_input, layer=path, bits=rule.activation_bits)
        return promote((x, kernel, *map(quantized.quantize_bias, biases)), **kwargs)

    return shown


def trace_integers(
    model: Any,
    example: Any,
    *,
    batch_norm: Callable[[str, jax.Array], None] | None = None,
    **kwargs: Any,
) -> core.ClosedJaxpr:
    """The jaxpr of an STP model's evaluation, with its quantizers shown.

    Args:
      model: an STP model, a Linen one with its variables.
      example: its input, or a ``jax.ShapeDtypeStruct``.
      batch_norm: called with the path and the input of every BatchNorm that runs.
      **kwargs: keyword arguments of the model's call.

    Raises:
      ValueError: the model returns more than one array, or a quantized layer is stacked or runs
        inside a transformation of Flax.
    """
    layers = quantized_layers(model)
    check_not_stacked(layers, "tracing a model")

    def operands(layer: KernelLayer, promote: Callable) -> Callable | None:
        return _show_operands(layers[layer.path], promote) if layer.path in layers else None

    def product(layer: KernelLayer, product: Callable) -> Callable | None:
        # Convolutions shall stay such, however JAX computes them.
        return jax.lax.conv_general_dilated if layer.kind == "conv" else None

    replaced = Hooks(operands=operands, product=product, batch_norm_input=batch_norm)
    shown = hooks.attach(without_quantizers(model), replaced)
    if isinstance(shown, nnx.Module):
        shown.eval()
    try:
        closed = jax.make_jaxpr(lambda x: shown(x, **kwargs))(example)
    except (flax.errors.TraceContextError, jax.errors.TracerBoolConversionError) as error:
        raise ValueError(
            "the model cannot be read as one program: a layer runs inside nnx.jit, nnx.remat, scan "
            "or the like, or a traced argument decides what runs; build it without for evaluation"
        ) from error
    if len(closed.out_avals) != 1:
        raise ValueError(f"the model must return one array, it returns {len(closed.out_avals)}")
    return closed


def check_calibrated(layer: QuantizedLayer) -> None:
    """Raises ValueError if the input of a layer lacks the scale that its rule asks for."""
    stored = layer.stored_input_scale
    if stored is not None and not layer.layer.is_table and not jnp.all(stored):
        raise ValueError(
            f"layer {layer.path!r}: its input has no scale yet; call stp_jax.calibrate"
        )


def _inner(eqn: Any) -> core.ClosedJaxpr | None:
    """The jaxpr of an equation that only calls one (jit, custom derivatives, remat)."""
    called = [v for v in eqn.params.values() if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]
    is_call = eqn.primitive.name in _CALLS
    if not (is_call or eqn.primitive.name.startswith("custom_vjp_call")) or len(called) != 1:
        return None
    inner = called[0]
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def _fold(eqn: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Computes an equation whose inputs are all constant."""
    shapes = [var.aval.shape for var in eqn.invars]
    full = [jnp.asarray(np.broadcast_to(x, s)) for x, s in zip(inputs, shapes, strict=True)]
    out = eqn.primitive.bind(*full, **eqn.params)
    return [np.asarray(value) for value in (out if eqn.primitive.multiple_results else [out])]


def _is_constant(eqn: Any, inputs: Sequence[Any]) -> bool:
    """Whether to compute an equation now; kernels stay integers, broadcasts small."""
    kept = ("broadcast_in_dim", quantized_kernel.name)
    return eqn.primitive.name not in kept and all(isinstance(x, np.ndarray) for x in inputs)


def walk(closed: core.ClosedJaxpr, arguments: Sequence[Any], lower: Lower) -> list[Any]:
    """Goes through a jaxpr and returns its outputs.

    Args:
      closed: the jaxpr; calls within it are entered.
      arguments: its inputs, of any type; ``np.ndarray`` are constants.
      lower: takes an equation and its inputs, and returns its outputs. Equations of constants alone
        are computed instead, but for ``broadcast_in_dim`` and `quantized_kernel`.
    """
    jaxpr: Any = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(var: Any) -> Any:
        if not isinstance(var, core.Literal):
            return values[var]
        return np.asarray(var.val, var.aval.dtype)  # type: ignore[attr-defined]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        inner = _inner(eqn)
        if inner is not None:
            outputs: Sequence[Any] = walk(inner, inputs, lower)
        elif _is_constant(eqn, inputs):
            outputs = _fold(eqn, inputs)
        else:
            outputs = lower(eqn, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]
