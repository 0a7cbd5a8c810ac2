"""STP on Flax NNX modules: a quantizer in each layer's `promote_dtype` hook.

The quantizer takes that place, so that the layer's code, its parameters and their paths, shardings
and initialisers stay what they were. What it stores is reachable by variable type: `Budget`,
`WeightScale`, `ActivationScale`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax import hooks
from stp_jax.hooks import KernelLayer
from stp_jax.quant.layers import (
    LayerFormat,
    QuantizedLayer,
    find_layers,
    kernel_axes,
    without_quantizers,
)
from stp_jax.quant.policy import Policy


class Budget(nnx.Variable):
    """Terms per group of one layer, int32: a scalar, or one per filter (output channel).

    Those by filter are shaped to broadcast against the kernel, as `WeightScale`. Values change
    without recompiling, shapes do not.
    """


class RelaxedBudget(nnx.Param):
    """Terms per group of one layer as real numbers, float32, shaped as `Budget`, to be trained."""


class WeightScale(nnx.Param):
    """Learned scale of a kernel, one per output channel, shaped to broadcast against it."""


class FixedWeightScale(nnx.Variable):
    """Scale of a kernel that was searched for and is not trained."""


class ActivationScale(nnx.Param):
    """Learned scale of a layer's input, one per tensor, float32 scalar."""


class FixedActivationScale(nnx.Variable):
    """Calibrated scale of a layer's input that is not trained."""


class Quantizer(nnx.Module):
    """Takes the place of a layer's `promote_dtype`: quantizes input and kernel, then promotes."""

    def __init__(self, format: LayerFormat, kernel: jax.Array, promote: Callable):
        """Starts with the best scale at the budget and an uncalibrated input."""
        self.format = format
        self.rank = kernel.ndim  # of one layer, where `nnx.vmap` stacks them
        self.promote = promote
        self.calibrating = False
        rule = format.rule
        self.budget: nnx.Variable = Budget(jnp.asarray(format.first_budget, jnp.int32))
        if rule.weight_scale != "max":
            of_kernel = WeightScale if rule.weight_scale == "learned" else FixedWeightScale
            self.weight_scale = of_kernel(format.best_scale(kernel, self.budget[...]))
        if rule.stores_input_scale:
            of_input = ActivationScale if rule.activations == "learned" else FixedActivationScale
            self.activation_scale = of_input(jnp.zeros((), jnp.float32))

    @property
    def stored_scale(self) -> jax.Array | None:
        """The kernel's scale if one is stored."""
        return None if self.format.rule.weight_scale == "max" else self.weight_scale[...]

    @property
    def stored_input_scale(self) -> jax.Array | None:
        """The input's scale if one is stored."""
        return self.activation_scale[...] if self.format.rule.stores_input_scale else None

    def map_stack(self, function: Callable, *arrays: jax.Array | None) -> jax.Array:
        """``function(*arrays)``, the kernel first, layer by layer where `nnx.vmap` stacked them."""
        kernel = arrays[0]
        assert kernel is not None
        for _ in range(kernel.ndim - self.rank):
            function = jax.vmap(function)
        return function(*arrays)

    def quantize_kernel(self, kernel: jax.Array) -> jax.Array:
        """The kernel as scale times integers within the budget."""
        quantize = self.format.quantize_kernel
        return self.map_stack(quantize, kernel, self.stored_scale, self.budget[...])

    def quantize_input(self, x: jax.Array) -> jax.Array:
        """The input on its integer grid; float where the rule says so or before calibration."""
        stored = self.stored_input_scale
        if self.calibrating and stored is not None:
            self.activation_scale[...] = jnp.maximum(stored, self.format.observe_input(x))
            return x
        return self.format.quantize_input(x, stored)

    def __call__(self, operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        """Quantizes (input, kernel, …), or (table,), and promotes them as the layer would."""
        if len(operands) == 1:
            return self.promote((self.quantize_kernel(operands[0]),), **kwargs)
        x, kernel, *biases = operands
        stored, of_input = self.stored_scale, self.stored_input_scale
        biases = [self.format.quantize_bias(b, kernel, stored, of_input) for b in biases]
        operands = (self.quantize_input(x), self.quantize_kernel(kernel), *biases)
        return self.promote(operands, **kwargs)


class NNXLayer(QuantizedLayer):
    """A layer of an NNX model, whose quantizer stores its state.

    Attributes:
      module: the Flax layer.
      quantizer: in its `promote_dtype`.
    """

    def __init__(self, layer: KernelLayer):
        """Takes a layer whose `promote_dtype` is a `Quantizer`."""
        self.layer = layer
        self.module = layer.module
        self.quantizer: Quantizer = layer.module.promote_dtype
        self.format = self.quantizer.format

    @property
    def _variable(self) -> nnx.Variable:
        return getattr(self.module, self.layer.kernel_name)

    @property
    def kernel(self) -> jax.Array:
        """The float kernel, before quantization."""
        return self.layer.masked(self._variable[...])

    @kernel.setter
    def kernel(self, value: jax.Array) -> None:
        self._variable[...] = value

    @property
    def owner(self) -> object:
        """The kernel's variable, which another layer may have as well."""
        return self._variable

    @property
    def stored_scale(self) -> jax.Array | None:
        """The scale of the kernel that is stored."""
        return self.quantizer.stored_scale

    @stored_scale.setter
    def stored_scale(self, value: jax.Array) -> None:
        self.check_stored_scale(value)
        self.quantizer.weight_scale[...] = value

    @property
    def stored_input_scale(self) -> jax.Array | None:
        """The scale of the input that is stored."""
        return self.quantizer.stored_input_scale

    @property
    def budget(self) -> jax.Array:
        """Terms per group."""
        return self.quantizer.budget[...]

    @budget.setter
    def budget(self, value: jax.Array) -> None:
        if self.is_relaxed or value.shape != self.budget.shape:
            self.quantizer.budget = Budget(value)
        else:
            self.quantizer.budget[...] = value

    def relax(self) -> None:
        """Makes the budget a `RelaxedBudget`."""
        self.quantizer.budget = RelaxedBudget(self.budget.astype(jnp.float32))

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The first axes of the kernel, where `nnx.vmap` stacked layers."""
        return tuple(range(self.kernel.ndim - self.quantizer.rank))

    def beside_kernel(self, budget: jax.Array) -> jax.Array:
        """The budget as it is: layers are stacked along its first axes, as the kernel's."""
        return budget

    def map_stack(self, function: Callable, *arrays: jax.Array | None) -> jax.Array:
        """``function(*arrays)``, layer by layer."""
        return self.quantizer.map_stack(function, *arrays)


@find_layers.register(nnx.Module)
def _find_layers(model: nnx.Module) -> dict[str, QuantizedLayer]:
    return {
        path: NNXLayer(layer)
        for path, layer in hooks.kernel_layers(model).items()
        if isinstance(layer.module.promote_dtype, Quantizer)
    }


@without_quantizers.register(nnx.Module)
def _without_quantizers(model: nnx.Module) -> nnx.Module:
    model = nnx.clone(model)
    for layer in hooks.kernel_layers(model).values():
        promote = layer.module.promote_dtype
        if isinstance(promote, Quantizer):
            layer.module.promote_dtype = nnx.static(promote.promote)
    return model


def kernel_paths(model: nnx.Module) -> list[str]:
    """Dotted paths of the layers that a rule can name; the model may be abstract.

    Raises:
      TypeError: the model is no `nnx.Module`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected an nnx.Module, got {type(model).__name__}")
    return list(hooks.kernel_layers(model))


def quantize_nnx(model: nnx.Module, policy: Policy) -> nnx.Module:
    """A copy of the model in which the layers that the policy names hold a `Quantizer`."""
    model = nnx.clone(model)
    layers = hooks.kernel_layers(model)
    if any(isinstance(layer.module.promote_dtype, Quantizer) for layer in layers.values()):
        raise ValueError("the model is quantized already; start from the float model")
    policy.check(layers, tables=[path for path, layer in layers.items() if layer.is_table])
    for path, layer in layers.items():
        rule = policy.find(path)
        if rule is None or (layer.is_table and not rule.embeddings):
            continue
        kernel = getattr(layer.module, layer.kernel_name)[...]
        format = LayerFormat(rule, kernel_axes(layer, kernel.shape))
        quantizer = Quantizer(format, kernel, layer.module.promote_dtype)
        layer.module.promote_dtype = nnx.data(quantizer)
    return model


@contextlib.contextmanager
def calibrating(model: nnx.Module) -> Iterator[None]:
    """Within, quantizers observe their inputs, which stay float, from scales of zero on.

    Scales that nothing was observed for, and all of them after an error, are what they were.
    """
    layers = find_layers(model).values()
    quantizers = [layer.quantizer for layer in layers if isinstance(layer, NNXLayer)]
    scales = [q.activation_scale for q in quantizers if q.format.rule.stores_input_scale]
    stored = [(scale, scale[...]) for scale in scales]
    for q in quantizers:
        q.calibrating = True
    for scale, before in stored:
        scale[...] = jnp.zeros_like(before)
    try:
        yield
    except BaseException:
        for scale, before in stored:
            scale[...] = before
        raise
    else:
        for scale, before in stored:
            scale[...] = jnp.where(scale[...] > 0, scale[...], before)
    finally:
        for q in quantizers:
            q.calibrating = False
