"""What NNX and Linen share: where a kernel's reduction lies, and how its layer is quantized."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.quant.policy import Rule
from stp_jax.terms.activations import quantize_activations
from stp_jax.terms.quantizers import (
    max_scale,
    project_scaled,
    quantize_weights,
    quantize_weights_relaxed,
    search_scale,
)

_TINY = 1e-12  # keeps a learned scale off zero


class KernelAxes(NamedTuple):
    """The axes of a kernel that matter to its quantizer."""

    groups: tuple[int, ...]  # adjacent axes along which groups lie, flattened in order
    scale: tuple[int, ...]  # axes that share a scale: all but output channels and batch


def conv_axes(shape: tuple[int, ...], *, transposed: bool = False) -> KernelAxes:
    """Kernels [*window, in / groups, out]: groups along input channels, or the window if 1.

    A depthwise kernel has one input channel per group, so its groups run over the window.
    Transposed kernels are [*window, out, in].
    """
    window = tuple(range(len(shape) - 2))
    inputs = len(shape) - 1 if transposed else len(shape) - 2
    groups = window if shape[inputs] == 1 and window else (inputs,)
    return KernelAxes(groups, (*window, inputs))


def dense_axes(contracting: tuple[int, ...]) -> KernelAxes:
    """Kernels of dense layers: groups along the contracted axes, which share a scale."""
    return KernelAxes(contracting, contracting)


def einsum_axes(equation: str) -> KernelAxes:
    """The kernel is the second operand: groups along the axes that the first one contracts.

    Raises:
      ValueError: the contracted axes of the kernel are not adjacent, or an ellipsis before them
        leaves their position open.
    """
    operands, out = equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    if "..." in kernel and not kernel.endswith("..."):
        raise ValueError(
            f"einsum {equation!r}: name the kernel's axes instead of '...', so that its reduction "
            "axis is known"
        )
    kernel = kernel.removesuffix("...")
    contracting = tuple(i for i, letter in enumerate(kernel) if letter not in out)
    if not contracting or contracting[-1] - contracting[0] != len(contracting) - 1:
        raise ValueError(
            f"einsum {equation!r}: the kernel's contracted axes must be adjacent to form groups; "
            "reorder them or keep this layer float"
        )
    return dense_axes(contracting)


def embedding_axes() -> KernelAxes:
    """Tables [entries, features]: groups along the features of one entry, one scale each."""
    return KernelAxes((1,), (1,))


@dataclasses.dataclass(frozen=True)
class LayerFormat:
    """How one layer is quantized; all of it static. Scales and budgets are passed in.

    Stored scales may have any sign, since they are trained without constraint: their magnitude
    counts. A scale of None is the rule's own choice from the tensor ("max", "dynamic").
    """

    rule: Rule
    axes: KernelAxes

    @property
    def first_budget(self) -> int:
        """Terms per group as the rule says; all of them if it names none."""
        return self.rule.format.max_budget if self.rule.budget is None else self.rule.budget

    def budgets_like(self, value: jax.typing.ArrayLike, held: jax.Array) -> jax.Array:
        """A new budget in the shape of the one held, which has an entry per stacked layer.

        Raises:
          ValueError: a budget is out of its range, or there are more or fewer than layers.
        """
        if isinstance(value, jax.core.Tracer) or np.ndim(value) == 0:
            self.rule.format.check_budget(value)
        else:
            for one in np.asarray(value).reshape(-1):
                self.rule.format.check_budget(one)
        new = jnp.asarray(value, jnp.int32).reshape(-1)
        if new.size not in (1, held.size):
            raise ValueError(f"{new.size} budgets for {held.size} stacked layers")
        return jnp.broadcast_to(new, (held.size,)).reshape(held.shape)

    def best_scale(
        self, kernel: jax.Array, budget: jax.Array, importance: jax.Array | None = None
    ) -> jax.Array:
        """The scale of least squared error at the budget, float32, broadcastable to the kernel."""
        return search_scale(
            kernel,
            budget,
            axes=self.axes.groups,
            scale_axes=self.axes.scale,
            fmt=self.rule.format,
            importance=importance,
        )

    def kernel_scale(self, kernel: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The positive scale of the kernel, float32, broadcastable to it."""
        if stored is None:
            fixed = jax.lax.stop_gradient(kernel)
            return max_scale(fixed, axes=self.axes.scale, bits=self.rule.bits)
        return jnp.maximum(jnp.abs(stored), _TINY)

    def quantize_kernel(
        self, kernel: jax.Array, stored: jax.Array | None, budget: jax.typing.ArrayLike
    ) -> jax.Array:
        """The kernel as scale times integers within the budget, in its own dtype.

        A budget of floating type is a relaxed one, and differentiable.
        """
        scale = self.kernel_scale(kernel, stored)
        relaxed = jnp.issubdtype(jnp.result_type(budget), jnp.floating)
        quantize = quantize_weights_relaxed if relaxed else quantize_weights
        return quantize(kernel, scale, budget, axes=self.axes.groups, fmt=self.rule.format)

    def integer_kernel(
        self, kernel: jax.Array, stored: jax.Array | None, budget: jax.typing.ArrayLike
    ) -> jax.Array:
        """The integers of the quantized kernel, int32."""
        scale = self.kernel_scale(kernel, stored)
        return project_scaled(kernel, scale, budget, axes=self.axes.groups, fmt=self.rule.format)

    def project_kernel(
        self, kernel: jax.Array, stored: jax.Array | None, budget: jax.typing.ArrayLike
    ) -> jax.Array:
        """The kernel on its few-term values, in its own dtype; not differentiable."""
        v = self.integer_kernel(kernel, stored, budget).astype(jnp.float32)
        return (self.kernel_scale(kernel, stored) * v).astype(kernel.dtype)

    def input_scale(self, x: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The scale of the layer's input x, float32 scalar; 0 if it was never calibrated."""
        if stored is None:
            everything = tuple(range(x.ndim))
            fixed = jax.lax.stop_gradient(x)
            return max_scale(fixed, axes=everything, bits=self.rule.activation_bits).reshape(())
        return jnp.abs(stored.reshape(()))

    def quantize_input(self, x: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The input on its integer grid; float where the rule says so or before calibration."""
        if self.rule.activations == "none":
            return x
        scale = self.input_scale(x, stored)
        quantized = self._quantize_input(x, jnp.maximum(scale, _TINY).reshape((1,) * x.ndim))
        return quantized if stored is None else jnp.where(scale > 0, quantized, x)

    def _quantize_input(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        rule = self.rule
        return quantize_activations(
            x,
            scale,
            bits=rule.activation_bits,
            terms=rule.activation_terms,
            method=rule.method,
            encoding=rule.encoding,
        )

    def observe_input(self, x: jax.Array) -> jax.Array:
        """The scale of least squared error on x, float32 scalar, for calibration."""
        bits = self.rule.activation_bits
        peak = max_scale(x, axes=tuple(range(x.ndim)), bits=bits)

        def error(ratio: jax.Array) -> jax.Array:
            q = self._quantize_input(x, peak * ratio)
            return jnp.mean((q - x).astype(jnp.float32) ** 2)

        ratios = jnp.linspace(0.2, 1.0, 17, dtype=jnp.float32)
        return peak.reshape(()) * ratios[jnp.argmin(jax.lax.map(error, ratios))]
