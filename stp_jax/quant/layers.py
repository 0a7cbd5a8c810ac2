"""Quantized layers: the axes of their kernels, their static format, and their state in a model.

`LayerFormat` is how a layer is quantized, as pure functions of arrays. `QuantizedLayer` is a layer
of an STP model with its kernel, scales and budget, which NNX and Linen keep in different places
(`stp_jax.quant.nnx`, `stp_jax.quant.linen`); whatever works on layers is written once, on it.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stp_jax.hooks import KernelLayer
from stp_jax.quant.policy import Rule
from stp_jax.terms.activations import quantize_activations
from stp_jax.terms.groups import GroupLayout
from stp_jax.terms.quantizers import (
    POWER_RATIOS,
    TINY,
    max_scale,
    power_of_two,
    project_scaled,
    quantize_weights,
    quantize_weights_relaxed,
    search_scale,
)


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


def kernel_axes(layer: KernelLayer, shape: tuple[int, ...]) -> KernelAxes:
    """Axes of the reduction in a layer's kernel.

    Args:
      layer: the layer.
      shape: of the kernel as the layer reads it.

    Raises:
      ValueError: the kernel has no fixed reduction axis or more axes than the layer reads, or
        another module changes it before the layer reads it; the message names the layer.
    """
    try:
        return _kernel_axes(layer, shape)
    except ValueError as error:
        raise ValueError(f"layer {layer.path!r}: {error}") from None


def _kernel_axes(layer: KernelLayer, shape: tuple[int, ...]) -> KernelAxes:
    if layer.kernel_norm is not None:
        raise ValueError(
            f"{layer.kernel_norm} changes its kernel at each call, so integers of the stored "
            "kernel are not those in use; once it is trained, give a plain layer the changed "
            "kernel, or keep it float"
        )
    if layer.kind == "einsum" and layer.equation is None:
        raise ValueError(
            "an Einsum layer without einsum_str has no fixed reduction axis to group along; "
            "give it its equation when it is built, or keep it float"
        )
    if layer.kernel_rank not in (None, len(shape)):
        raise ValueError(
            f"its kernel has {len(shape)} axes where the layer reads {layer.kernel_rank}; quantize "
            "stacked layers one by one: "
            "nnx.vmap(lambda layer: stp_jax.quantize(layer, policy))(stacked)"
        )
    if layer.kind in ("conv", "conv_transpose"):
        return conv_axes(shape, transposed=layer.transposed)
    if layer.kind == "einsum":
        assert layer.equation is not None
        return einsum_axes(layer.equation)
    if layer.kind == "embed":
        return embedding_axes()
    if layer.kind == "conv_local":  # [*positions, window * in, out]
        return dense_axes((len(shape) - 2,))
    first = layer.batch_axes
    return dense_axes(tuple(range(first, first + layer.contracting_axes)))


def spread_scale(
    scale: jax.Array, shape: tuple[int, ...], groups: tuple[int, ...], scale_group: int | None
) -> jax.Array:
    """A scale as it is stored, with the runs that share one number written out.

    Args:
      scale: with the axes of the kernel; by group, the number of runs along the reduction.
      shape: of the kernel.
      groups: the axes of its reduction; one, if scales are by group.
      scale_group: weights of a run; None returns the scale as it is.

    Returns:
      Broadcastable to the kernel.
    """
    if scale_group is None:
        return scale
    (axis,) = groups
    return jnp.repeat(scale, scale_group, axis=axis)[(slice(None),) * axis + (slice(shape[axis]),)]


@dataclasses.dataclass(frozen=True)
class LayerFormat:
    """The quantizers of one layer; all fields are static. Scales and budgets are passed in.

    Stored scales may have any sign, since they are trained without constraint: their magnitude
    counts. A scale of None is the rule's own choice from the tensor ("max", "dynamic"). A stored
    scale has the axes of the kernel: 1 where weights share it, and along the reduction the number
    of runs of ``rule.scale_group`` weights, if scales are by group.

    Raises:
      ValueError: scales by group for a kernel whose reduction is more than one axis.
    """

    rule: Rule
    axes: KernelAxes

    def __post_init__(self) -> None:  # noqa: D105
        if self.rule.scale_group is not None and len(self.axes.groups) != 1:
            raise ValueError(
                f"rule {self.rule.path!r}: scale_group needs kernels that are reduced along one "
                f"axis, this one has {len(self.axes.groups)}"
            )

    @property
    def first_budget(self) -> int:
        """Terms per group as the rule says; all of them if it names none."""
        return self.rule.format.max_budget if self.rule.budget is None else self.rule.budget

    def filter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one value per filter (output channel), to broadcast against a kernel."""
        return tuple(1 if a in self.axes.scale else n for a, n in enumerate(shape))

    @property
    def _runs(self) -> GroupLayout | None:
        """The weights that share a scale, where scales are by group."""
        size = self.rule.scale_group
        return None if size is None else GroupLayout(size, self.axes.groups)

    @property
    def _cut_axes(self) -> KernelAxes:
        """The axes of a kernel as `_cut` leaves it, where a run is what shares a scale."""
        if self._runs is None:
            return self.axes
        (axis,) = self.axes.groups
        shared = tuple(a if a < axis else a + 1 for a in self.axes.scale)
        return KernelAxes((axis + 1,), shared)

    def _cut(self, x: jax.Array) -> jax.Array:
        """A kernel, or what has its shape, with the reduction as two axes: runs, and within one."""
        return x if self._runs is None else self._runs.split(x)

    def _cut_shared(self, x: jax.Array) -> jax.Array:
        """The same of what a run shares: a stored scale, or budgets by filter."""
        if self._runs is None or not x.ndim:
            return x
        return jnp.expand_dims(x, self.axes.groups[0] + 1)

    def _cut_importance(
        self, importance: jax.Array | None, shape: tuple[int, ...]
    ) -> jax.Array | None:
        """The same of weights of errors, which broadcast to the kernel."""
        if importance is None or self._runs is None:
            return importance
        return self._cut(jnp.broadcast_to(importance, shape))

    def _join(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `_cut`."""
        return x if self._runs is None else self._runs.join(x, shape)

    def best_scale(
        self,
        kernel: jax.Array,
        budget: jax.typing.ArrayLike,
        importance: jax.Array | None = None,
        slack: float = 0.0,
    ) -> jax.Array:
        """The scale of least squared error at the budget, float32, as it is stored."""
        axes, cut = self._cut_axes, self._cut(kernel)
        scale = search_scale(
            cut,
            self._cut_shared(jnp.asarray(budget)),
            axes=axes.groups,
            scale_axes=axes.scale,
            fmt=self.rule.format,
            importance=self._cut_importance(importance, kernel.shape),
            slack=slack,
            powers_of_two=self.rule.power_of_two_scales,
        )
        # Weights that are all 0 have no best scale; one for weights as they are drawn at first
        # lets them leave 0 in training.
        fan_in = math.prod(kernel.shape[a] for a in self.axes.scale)
        usual = jnp.float32(3.0 / (math.sqrt(fan_in) * self.rule.format.largest))
        none = jnp.all(cut == 0, axis=axes.scale, keepdims=True)
        scale = jnp.where(none, self._rounded(usual), scale)
        return scale if self._runs is None else jnp.squeeze(scale, axes.groups)

    def _cut_scale(self, kernel: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The positive scale, to broadcast against a kernel that was cut."""
        if stored is None:
            fixed = jax.lax.stop_gradient(self._cut(kernel))
            largest = max_scale(fixed, axes=self._cut_axes.scale, bits=self.rule.bits)
            return self._rounded(largest, up=True)
        return self._rounded(jnp.maximum(jnp.abs(self._cut_shared(stored)), TINY))

    def _rounded(self, scale: jax.Array, *, up: bool = False) -> jax.Array:
        """A scale as the rule allows it."""
        return power_of_two(scale, up=up) if self.rule.power_of_two_scales else scale

    def kernel_scale(self, kernel: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The positive scale of the kernel, float32, broadcastable to it."""
        return self.spread_scale(self.shared_scale(kernel, stored), kernel.shape)

    def shared_scale(self, kernel: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The positive scale as it is stored, each number once."""
        scale = self._cut_scale(kernel, stored)
        return scale if self._runs is None else jnp.squeeze(scale, self._cut_axes.groups)

    def spread_scale(self, scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A scale as it is stored, broadcastable to a kernel of this shape."""
        return spread_scale(scale, shape, self.axes.groups, self.rule.scale_group)

    def quantize_kernel(
        self, kernel: jax.Array, stored: jax.Array | None, budget: jax.typing.ArrayLike
    ) -> jax.Array:
        """The kernel as scale times integers within the budget, in its own dtype.

        A budget of floating type is a relaxed one, and differentiable.
        """
        budget = self._cut_shared(jnp.asarray(budget))
        relaxed = jnp.issubdtype(budget.dtype, jnp.floating)
        quantize = quantize_weights_relaxed if relaxed else quantize_weights
        scale = self._cut_scale(kernel, stored)
        axes, cut = self._cut_axes.groups, self._cut(kernel)
        quantized = quantize(cut, scale, budget, axes=axes, fmt=self.rule.format)
        return self._join(quantized, kernel.shape)

    def integer_kernel(
        self,
        kernel: jax.Array,
        stored: jax.Array | None,
        budget: jax.typing.ArrayLike,
        importance: jax.Array | None = None,
    ) -> jax.Array:
        """The integers of the quantized kernel, int32."""
        integers = project_scaled(
            self._cut(kernel),
            self._cut_scale(kernel, stored),
            self._cut_shared(jnp.asarray(budget)),
            axes=self._cut_axes.groups,
            fmt=self.rule.format,
            importance=self._cut_importance(importance, kernel.shape),
        )
        return self._join(integers, kernel.shape)

    def project_kernel(
        self,
        kernel: jax.Array,
        stored: jax.Array | None,
        budget: jax.typing.ArrayLike,
        importance: jax.Array | None = None,
    ) -> jax.Array:
        """The kernel on its few-term values, in its own dtype; not differentiable."""
        v = self.integer_kernel(kernel, stored, budget, importance).astype(jnp.float32)
        return (self.kernel_scale(kernel, stored) * v).astype(kernel.dtype)

    def input_scale(self, x: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The scale of the layer's input x, float32 scalar; 0 if it was never calibrated."""
        if stored is None:
            everything = tuple(range(x.ndim))
            fixed = jax.lax.stop_gradient(x)
            peak = max_scale(fixed, axes=everything, bits=self.rule.activation_bits)
            return self._rounded(peak.reshape(()), up=True)
        return self.stored_input_scale(stored.reshape(()))

    def stored_input_scale(self, stored: jax.Array) -> jax.Array:
        """The scale of the input that a stored one stands for, of its shape, 0 or more."""
        return self._rounded(jnp.abs(stored))

    def quantize_bias(
        self,
        bias: jax.Array | None,
        kernel: jax.Array,
        stored: jax.Array | None,
        stored_input: jax.Array | None,
    ) -> jax.Array | None:
        """The bias on the grid of the integer sums, where scales are powers of two.

        The gradient passes straight through. Without a calibrated input there is no grid, and the
        bias stays as it is.
        """
        if bias is None or stored_input is None or not self.rule.power_of_two_scales:
            return bias
        of_filters = jnp.squeeze(self.shared_scale(kernel, stored), self.axes.scale)
        grid = jax.lax.stop_gradient(of_filters * self.stored_input_scale(stored_input.reshape(())))
        rounded = jnp.where(grid > 0, jnp.round(bias / grid) * grid, bias)
        return bias + jax.lax.stop_gradient(rounded - bias)

    def quantize_input(self, x: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The input on its integer grid; float where the rule says so or before calibration."""
        if self.rule.activations == "none":
            return x
        return self._quantize_input(x, self.input_scale(x, stored).reshape((1,) * x.ndim))

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
        """The scale of least squared error on x, float32 scalar, for calibration; 0 if x is."""
        bits = self.rule.activation_bits
        peak = max_scale(x, axes=tuple(range(x.ndim)), bits=bits)

        ratios = jnp.linspace(0.2, 1.0, 17, dtype=jnp.float32)
        if self.rule.power_of_two_scales:
            peak, ratios = power_of_two(peak, up=True), jnp.asarray(POWER_RATIOS)

        def error(ratio: jax.Array) -> jax.Array:
            q = self._quantize_input(x, peak * ratio)
            return jnp.mean((q - x).astype(jnp.float32) ** 2)

        found = peak.reshape(()) * ratios[jnp.argmin(jax.lax.map(error, ratios))]
        return jnp.where(jnp.any(x != 0), found, jnp.float32(0))


def of_one_layer(budget: jax.Array) -> jax.Array:
    """The budget of one layer as its format takes it: a scalar, if it is one for all filters."""
    return budget.reshape(()) if budget.size == 1 else budget


class QuantizedLayer(abc.ABC):
    """A quantized layer of an STP model; what it sets, it sets in the model.

    Layers that a transformation stacked share a path: their kernels, scales and budgets are stacked
    alike, and the methods here work on each by itself. ``stack`` below stands for their extents.

    Attributes:
      layer: what the layer is.
      format: how it is quantized.
    """

    layer: KernelLayer
    format: LayerFormat

    @property
    def path(self) -> str:
        """Dotted path in the model."""
        return self.layer.path

    @property
    def rule(self) -> Rule:
        """The rule that decided this layer."""
        return self.format.rule

    @property
    @abc.abstractmethod
    def kernel(self) -> jax.Array:
        """The float kernel, before quantization."""

    @kernel.setter
    @abc.abstractmethod
    def kernel(self, value: jax.Array) -> None: ...

    @property
    def owner(self) -> object:
        """What holds the kernel; layers that share one have the same."""
        return self

    @property
    @abc.abstractmethod
    def stored_scale(self) -> jax.Array | None:
        """The scale of the kernel that is stored; None where it follows from the kernel ("max")."""

    @stored_scale.setter
    @abc.abstractmethod
    def stored_scale(self, value: jax.Array) -> None: ...

    def check_stored_scale(self, value: jax.Array) -> None:
        """Raises ValueError unless a new scale has the shape of the stored one."""
        stored = self.stored_scale
        if stored is not None and stored.shape != value.shape:
            raise ValueError(
                f"layer {self.path!r} stores scales of shape {stored.shape}, got {value.shape}"
            )

    @property
    @abc.abstractmethod
    def stored_input_scale(self) -> jax.Array | None:
        """The scale of the input that is stored, 0 before calibration; None where there is none."""

    @property
    def input_scale(self) -> jax.Array | None:
        """The scale of the input in use, 0 or more; None where none is stored."""
        stored = self.stored_input_scale
        return None if stored is None else self.format.stored_input_scale(stored)

    @property
    @abc.abstractmethod
    def budget(self) -> jax.Array:
        """Terms per group: int32, or float32 while it is relaxed.

        Its shape is ``stack``, or ``[*stack, *filters]`` where budgets are by filter; filters have
        the axes of one layer's kernel, with 1 where weights share a scale.
        """

    @budget.setter
    @abc.abstractmethod
    def budget(self, value: jax.Array) -> None: ...

    @abc.abstractmethod
    def relax(self) -> None:
        """Makes the budget a real parameter; setting a whole one undoes it."""

    @property
    @abc.abstractmethod
    def stack_axes(self) -> tuple[int, ...]:
        """The axes of the kernel along which layers are stacked, ascending; none if it is one."""

    @abc.abstractmethod
    def beside_kernel(self, budget: jax.Array) -> jax.Array:
        """A budget, shaped as `budget`, laid out so that `map_stack` cuts it as the kernel."""

    @abc.abstractmethod
    def map_stack(self, function: Callable, *arrays: jax.Array | None) -> jax.Array:
        """``function(*arrays)`` layer by layer; arrays are stacked as the kernel is, or None."""

    @property
    def is_stacked(self) -> bool:
        """Whether this is a stack of layers."""
        return bool(self.stack_axes)

    @property
    def is_relaxed(self) -> bool:
        """Whether the budget is a real parameter."""
        return jnp.issubdtype(self.budget.dtype, jnp.floating)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape[a] for a in self.stack_axes)

    @property
    def _filters(self) -> tuple[int, ...]:
        shape = self.kernel.shape
        inner = tuple(n for a, n in enumerate(shape) if a not in self.stack_axes)
        return self.format.filter_shape(inner)

    @property
    def filter_count(self) -> int:
        """The number of filters (output channels) of one layer."""
        return math.prod(self._filters)

    @property
    def flat_budget(self) -> jax.Array:
        """The budget as ``stack``, or by filter as ``[*stack, filters]``."""
        budget, stack = self.budget, self._stack
        return budget if budget.shape == stack else budget.reshape(*stack, -1)

    def shaped_budget(self, value: jax.typing.ArrayLike) -> jax.Array:
        """A new budget, int32, in the shape of `budget`.

        Args:
          value: one integer, one per stacked layer, or one per filter, as ``[*stack, filters]`` or
            with the axes of filters.

        Raises:
          ValueError: a budget is out of its range, or there are more or fewer than filters.
          TypeError: a budget is no integer.
        """
        self.rule.format.check_budget(value)
        new, stack, filters = jnp.asarray(value, jnp.int32), self._stack, self._filters
        if new.size == 1:
            return jnp.broadcast_to(new.reshape(()), stack)
        if stack and new.shape in (stack, (math.prod(stack),)):
            return new.reshape(stack)
        if new.shape in ((*stack, self.filter_count), (*stack, *filters)):
            return new.reshape(*stack, *filters)
        layers = f"{stack} stacked layers with " if stack else ""
        raise ValueError(
            f"budgets of shape {new.shape} for {layers}{self.filter_count} filters: give one, or "
            f"an array of shape {(*stack, self.filter_count)}"
        )

    def _on_kernel(
        self, function: Callable, budget: jax.Array, *more: jax.Array | None
    ) -> jax.Array:
        """``function(kernel, stored scale, budget, *more)``, layer by layer."""

        def one(kernel, scale, budget, *rest):
            return function(kernel, scale, of_one_layer(budget), *rest)

        laid_out = self.beside_kernel(budget)
        return self.map_stack(one, self.kernel, self.stored_scale, laid_out, *more)

    def _budget_or(self, budget: jax.typing.ArrayLike | None) -> jax.Array:
        if budget is not None:
            return self.shaped_budget(budget)
        if self.is_relaxed:
            raise ValueError("the budgets are relaxed; set_budgets makes them whole again")
        return self.budget

    @property
    def scale(self) -> jax.Array:
        """The positive scale of the kernel, float32, broadcastable to it."""
        return self.map_stack(self.format.kernel_scale, self.kernel, self.stored_scale)

    @property
    def shared_scale(self) -> jax.Array:
        """The positive scale as it is stored, each number once; see `LayerFormat`."""
        return self.map_stack(self.format.shared_scale, self.kernel, self.stored_scale)

    def quantize_bias(self, bias: jax.Array | None) -> jax.Array | None:
        """The bias as the layer adds it; see `LayerFormat.quantize_bias`."""
        stored = self.stored_scale
        return self.format.quantize_bias(bias, self.kernel, stored, self.stored_input_scale)

    def integers(self, budget: jax.typing.ArrayLike | None = None) -> jax.Array:
        """The integers of the quantized kernel at the present budget or another one, int32."""
        return self._on_kernel(self.format.integer_kernel, self._budget_or(budget))

    def projected(
        self, budget: jax.typing.ArrayLike | None = None, importance: jax.Array | None = None
    ) -> jax.Array:
        """The kernel on its few-term values at the present budget or another one.

        Importance, of the kernel's shape, weighs the squared errors.
        """
        return self._on_kernel(self.format.project_kernel, self._budget_or(budget), importance)

    def search_scale(self, importance: jax.Array | None = None, slack: float = 0.0) -> None:
        """Sets the stored scale to the one of least error at the present budget.

        Args:
          importance: weights of the squared errors, of the kernel's shape.
          slack: as by `stp_jax.search_weight_scales`.
        """
        if self.rule.weight_scale == "max":
            return

        def search(kernel, _, budget, importance):
            return self.format.best_scale(kernel, budget, importance, slack)

        self.stored_scale = self._on_kernel(search, self._budget_or(None), importance)


@functools.singledispatch
def find_layers(model: Any) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model; registered for each kind of model by its module."""
    raise TypeError(
        "expected an nnx.Module or a Linen model with its variables "
        f"(model.bind(variables)), got {type(model).__name__}"
    )


def quantized_layers(model: Any) -> dict[str, QuantizedLayer]:
    """The quantized layers of an STP model by dotted path.

    Args:
      model: an NNX model from `stp_jax.quantize`, or a Linen one with its variables
        (`stp_jax.QuantizedModule.bind`).

    Raises:
      ValueError: the model has none.
      TypeError: the model is of another kind.
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer; call stp_jax.quantize first")
    return layers


@functools.singledispatch
def without_quantizers(model: Any) -> Any:
    """A copy of an STP model that computes as the float model does, with the same parameters."""
    return find_layers(model)  # which says what a model is


def check_scale_by_filter(layers: Mapping[str, QuantizedLayer], what: str) -> None:
    """Raises ValueError if a layer has scales by group, which ``what`` does not take."""
    for path, layer in layers.items():
        if layer.rule.scale_group is not None:
            raise ValueError(
                f"layer {path!r} has scales by group (scale_group={layer.rule.scale_group}); "
                f"{what} takes one scale per output channel"
            )


def check_not_stacked(layers: Mapping[str, QuantizedLayer], what: str) -> None:
    """Raises ValueError if a layer is a stack (`nn.scan`, `nn.vmap`), which ``what`` lacks."""
    for path, layer in layers.items():
        if layer.is_stacked:
            raise ValueError(
                f"layer {path!r} is a stack of layers, as scan and vmap make them; {what} takes "
                "single layers only"
            )


def check_stores_scales(layers: Mapping[str, QuantizedLayer], what: str) -> None:
    """Raises ValueError if scales follow from kernels, which ``what`` changes."""
    for path, layer in layers.items():
        if layer.rule.weight_scale == "max":
            raise ValueError(
                f"layer {path!r}: weight_scale='max' follows from the kernel, which {what} "
                "changes; use 'search' or 'learned'"
            )


def check_own_kernels(layers: Mapping[str, QuantizedLayer], what: str) -> None:
    """Raises ValueError if two layers share one kernel, which ``what`` does not take."""
    first: dict[int, str] = {}
    for path, layer in layers.items():
        other = first.setdefault(id(layer.owner), path)
        if other != path:
            raise ValueError(
                f"layers {other!r} and {path!r} share one kernel, of which each has integers of "
                f"its own; {what} does not take that: keep one of them float, or untie them"
            )


def check_paths(values: Mapping[str, Any], layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises ValueError if a key is not the path of a quantized layer."""
    unknown = sorted(set(values) - set(layers))
    if unknown:
        raise ValueError(
            f"no quantized layer at {', '.join(unknown)}; there are: {', '.join(layers)}"
        )
