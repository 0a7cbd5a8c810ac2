"""STP on Flax NNX modules: a quantizer in each layer's `promote_dtype` hook.

Every NNX layer with a kernel passes its operands through the callable in its attribute
`promote_dtype` before it computes. The quantizer takes that place, so that the layer's code, its
parameters and their paths, shardings and initialisers stay what they were. What the quantizer
itself keeps is reachable by variable type: `Budget`, `WeightScale`, `ActivationScale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax.quant.layers import (
    KernelAxes,
    LayerFormat,
    conv_axes,
    dense_axes,
    einsum_axes,
    embedding_axes,
)
from stp_jax.quant.policy import Policy, Rule

# A layer with a kernel: one of `_KERNEL_LAYERS`, whose attributes differ too much for a protocol.
Layer = Any


class Budget(nnx.Variable):
    """Terms per group of one layer, int32 scalar; change it without recompiling."""


class RelaxedBudget(nnx.Param):
    """Terms per group of one layer as a real number, float32 scalar, to be trained."""


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

    def __init__(self, rule: Rule, axes: KernelAxes, kernel: jax.Array, promote: Callable):
        """Starts with the best scale at the budget and an uncalibrated input."""
        self.format = LayerFormat(rule, axes)
        self.promote = promote
        self.calibrating = False
        self.budget: nnx.Variable = Budget(jnp.asarray(self.format.first_budget, jnp.int32))
        if rule.weight_scale != "max":
            of_kernel = WeightScale if rule.weight_scale == "learned" else FixedWeightScale
            self.weight_scale = of_kernel(self.format.best_scale(kernel, self.budget[...]))
        if rule.activations in ("learned", "calibrated"):
            of_input = ActivationScale if rule.activations == "learned" else FixedActivationScale
            self.activation_scale = of_input(jnp.zeros((), jnp.float32))

    @property
    def rule(self) -> Rule:
        """The rule that decided this layer."""
        return self.format.rule

    @property
    def axes(self) -> KernelAxes:
        """The kernel's group and scale axes."""
        return self.format.axes

    def _stored_weight_scale(self) -> jax.Array | None:
        return None if self.rule.weight_scale == "max" else self.weight_scale[...]

    def _stored_input_scale(self) -> jax.Array | None:
        stored = self.rule.activations in ("learned", "calibrated")
        return self.activation_scale[...] if stored else None

    def _each(self, function: Callable, kernel: jax.Array, *rest: jax.Array | None) -> jax.Array:
        # Quantizers that `nnx.vmap` stacked hold stacked budgets: layer by layer then.
        for _ in range(self.budget[...].ndim):
            function = jax.vmap(function)
        return function(kernel, self._stored_weight_scale(), *rest)

    def _budget_or(self, budget: jax.typing.ArrayLike | None) -> jax.Array:
        held = self.budget[...]
        if budget is not None:
            return self.format.budgets_like(budget, held)
        if isinstance(self.budget, RelaxedBudget):
            raise ValueError("the budgets are relaxed; set_budgets makes them whole again")
        return held

    def kernel_scale(self, kernel: jax.Array) -> jax.Array:
        """The scale of the kernel, float32, broadcastable to it."""
        return self._each(self.format.kernel_scale, kernel)

    def search(self, kernel: jax.Array, importance: jax.Array | None = None) -> None:
        """Sets the stored scale to the best one for the kernel at the present budget."""
        if self.rule.weight_scale != "max":
            self.weight_scale[...] = self._each(
                lambda kernel, _, *rest: self.format.best_scale(kernel, *rest),
                kernel,
                self.budget[...],
                importance,
            )

    def input_scale(self, x: jax.Array) -> jax.Array:
        """The scale of the layer's input x, float32 scalar; 0 if it was never calibrated."""
        return self.format.input_scale(x, self._stored_input_scale())

    def quantize_kernel(self, kernel: jax.Array) -> jax.Array:
        """The kernel as scale times integers within the budget."""
        return self._each(self.format.quantize_kernel, kernel, self.budget[...])

    def integer_kernel(
        self, kernel: jax.Array, budget: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """The integers of the quantized kernel, int32."""
        return self._each(self.format.integer_kernel, kernel, self._budget_or(budget))

    def project_kernel(
        self, kernel: jax.Array, budget: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """The kernel on its few-term values, in its own dtype."""
        return self._each(self.format.project_kernel, kernel, self._budget_or(budget))

    def quantize_input(self, x: jax.Array) -> jax.Array:
        """The input on its integer grid; float where the rule says so or before calibration."""
        stored = self._stored_input_scale()
        if self.calibrating and stored is not None:
            self.activation_scale[...] = jnp.maximum(stored, self.format.observe_input(x))
            return x
        return self.format.quantize_input(x, stored)

    def __call__(self, operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        """Quantizes (input, kernel, …), or (table,), and promotes them as the layer would."""
        if len(operands) == 1:
            return self.promote((self.quantize_kernel(operands[0]),), **kwargs)
        x, kernel, *rest = operands
        operands = (self.quantize_input(x), self.quantize_kernel(kernel), *rest)
        return self.promote(operands, **kwargs)


_KERNEL_LAYERS = (
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Embed,
)


def _kernel_axes(layer: Layer) -> KernelAxes:
    """The axes of the layer's kernel.

    Raises:
      ValueError: the kernel has no fixed reduction axis, or more axes than the layer reads.
    """
    rank = _kernel(layer)[...].ndim
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        _check_rank(rank, len(layer.kernel_size) + 2)
        transposed = isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel
        return conv_axes(layer.kernel.shape, transposed=transposed)
    if isinstance(layer, nnx.LinearGeneral):
        batch, contracting = len(layer.batch_axis), len(layer.in_features)
        _check_rank(rank, batch + contracting + len(layer.out_features))
        return dense_axes(tuple(range(batch, batch + contracting)))
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise ValueError(
                "an Einsum layer without einsum_str has no fixed reduction axis to group along; "
                "give it its equation when it is built, or keep it float"
            )
        _check_rank(rank, len(layer.kernel_shape))
        return einsum_axes(layer.einsum_str)
    _check_rank(rank, 2)
    return embedding_axes() if isinstance(layer, nnx.Embed) else dense_axes((0,))


def _check_rank(rank: int, expected: int) -> None:
    if rank != expected:
        raise ValueError(
            f"its kernel has {rank} axes where the layer reads {expected}; quantize stacked layers "
            "one by one: nnx.vmap(lambda layer: stp_jax.quantize(layer, policy))(stacked)"
        )


def _kernel(layer: Layer) -> nnx.Variable:
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def _kernel_layers(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """The layers that hold a kernel, with their dotted paths, in the order of the paths."""
    found = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _KERNEL_LAYERS)
    ]
    return iter(sorted(found, key=lambda item: item[0]))


_PRODUCTS: dict[type, str] = {
    nnx.Conv: "conv_general_dilated",
    nnx.Linear: "dot_general",
    nnx.LinearGeneral: "dot_general",
}


def product_hook(layer: Layer) -> str | None:
    """The attribute that computes the layer's product, None if there is none to take."""
    if isinstance(layer, nnx.LinearGeneral) and (layer.dot_general_cls or layer.batch_axis):
        return None
    return next((hook for kind, hook in _PRODUCTS.items() if isinstance(layer, kind)), None)


def check_nnx(model: object) -> None:
    """Raises TypeError unless the model is an NNX module; says what to use for a Linen one."""
    if isinstance(model, nnx.Module):
        return
    linen = [kind.__module__ for kind in type(model).__mro__]
    if "flax.linen.module" in linen or type(model).__name__ == "QuantizedModule":
        raise TypeError(
            f"this function takes an nnx.Module; {type(model).__name__} is a Linen model: what "
            "there is for it are methods of what stp_jax.quantize returns, which take its "
            "variables, as model.calibrate(variables, batches)"
        )
    raise TypeError(f"expected an nnx.Module, got {type(model).__name__}")


def kernel_paths(model: nnx.Module) -> list[str]:
    """Dotted paths of the layers that a rule can name; the model may be abstract.

    Raises:
      TypeError: the model is no `nnx.Module`.
    """
    check_nnx(model)
    return [path for path, _ in _kernel_layers(model)]


def quantize_nnx(model: nnx.Module, policy: Policy) -> nnx.Module:
    """A copy of the model in which the layers that the policy names hold a `Quantizer`."""
    model = nnx.clone(model)
    candidates = list(_kernel_layers(model))
    if any(isinstance(getattr(m, "promote_dtype", None), Quantizer) for _, m in candidates):
        raise ValueError("the model is quantized already; start from the float model")
    tables = [path for path, layer in candidates if isinstance(layer, nnx.Embed)]
    policy.check([path for path, _ in candidates], tables=tables)
    for path, layer in candidates:
        rule = policy.find(path)
        if rule is None or (isinstance(layer, nnx.Embed) and not rule.embeddings):
            continue
        try:
            axes = _kernel_axes(layer)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
        quantizer = Quantizer(rule, axes, _kernel(layer)[...], layer.promote_dtype)
        layer.promote_dtype = nnx.data(quantizer)
    return model


class QuantizedLayer(NamedTuple):
    """A layer and its quantizer, as they stand in the model."""

    layer: Layer
    quantizer: Quantizer

    @property
    def kernel(self) -> jax.Array:
        """The float kernel, before quantization."""
        return _kernel(self.layer)[...]


def quantized_layers(model: nnx.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of an STP model by dotted path.

    Raises:
      ValueError: the model has none.
      TypeError: the model is no `nnx.Module`.
    """
    check_nnx(model)
    layers = {
        path: QuantizedLayer(layer, layer.promote_dtype)
        for path, layer in _kernel_layers(model)
        if isinstance(layer.promote_dtype, Quantizer)
    }
    if not layers:
        raise ValueError("the model has no quantized layer; call stp_jax.quantize first")
    return layers


def budgets(model: nnx.Module) -> dict[str, Any]:
    """Terms per group of each quantized layer that has a budget rule.

    An integer per layer, a real number after `relax_budgets`; lists of them for layers that
    `nnx.vmap` stacks.
    """
    return {
        path: np.asarray(q.quantizer.budget[...]).tolist()
        for path, q in quantized_layers(model).items()
        if q.quantizer.rule.budget is not None
    }


def _check_paths(values: Mapping[str, Any], layers: Mapping[str, QuantizedLayer]) -> None:
    unknown = sorted(set(values) - set(layers))
    if unknown:
        raise ValueError(
            f"no quantized layer at {', '.join(unknown)}; there are: {', '.join(layers)}"
        )


def set_budgets(
    model: nnx.Module, values: Mapping[str, jax.typing.ArrayLike] | jax.typing.ArrayLike
) -> None:
    """Sets terms per group, in place; nothing recompiles.

    A relaxed budget becomes a whole one again.

    Args:
      model: an STP model.
      values: by layer path, or one number for all layers that have a budget rule.

    Raises:
      ValueError: a path is not a quantized layer, or a budget is out of its range. Nothing is
        set then.
    """
    layers = quantized_layers(model)
    if not isinstance(values, Mapping):
        values = dict.fromkeys(budgets(model), values)
    _check_paths(values, layers)
    new = {}
    for path, value in values.items():
        quantizer = layers[path].quantizer
        try:
            new[path] = quantizer.format.budgets_like(value, quantizer.budget[...])
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
    for path, budget in new.items():
        quantizer = layers[path].quantizer
        if isinstance(quantizer.budget, RelaxedBudget):
            quantizer.budget = Budget(budget)
        else:
            quantizer.budget[...] = budget


def relax_budgets(model: nnx.Module) -> None:
    """Makes the budgets of layers with a budget rule real parameters, in place.

    They are `RelaxedBudget`, a kind of `nnx.Param`, so an optimizer of the parameters trains them:
    each kernel lies between its projections onto the two budgets around its own (see
    `stp_jax.terms.quantize_weights_relaxed`). What they cost must be in the loss, for instance
    `stp_jax.hwmodel.evaluate` at `relaxed_budgets`. `set_budgets` makes them whole again, for
    instance with `stp_jax.terms.round_budgets`.
    """
    for _, quantizer in quantized_layers(model).values():
        if quantizer.rule.budget is not None:
            quantizer.budget = RelaxedBudget(quantizer.budget[...].astype(jnp.float32))


def relaxed_budgets(model: nnx.Module) -> dict[str, jax.Array]:
    """The relaxed budgets of a model by layer path, to put a price on them in a loss.

    Each is within its layer's range, as the layer takes it. The model may be merged inside a traced
    function.

    Raises:
      ValueError: the model has none; see `relax_budgets`.
    """
    found = {
        path: jnp.clip(quantizer.budget[...], 0, quantizer.rule.format.max_budget)
        for path, (_, quantizer) in quantized_layers(model).items()
        if isinstance(quantizer.budget, RelaxedBudget)
    }
    if not found:
        raise ValueError("the model has no relaxed budget; call stp_jax.relax_budgets first")
    return found


def call_model(model: Any, batch: Any) -> Any:
    """The model's output for a batch that is its only argument."""
    return model(batch)


def check_batches(batches: object) -> None:
    """Raises TypeError if batches is one array, whose examples would pass for batches."""
    if isinstance(batches, np.ndarray | jax.Array):
        raise TypeError(f"batches must be a list of batches; give [x] for one of {batches.shape}")


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = call_model,
) -> None:
    """Sets the scale of every layer's input from example batches, in place.

    Each scale is the one of least squared error on its batch, the largest over the batches. The
    model runs as it stands (call ``model.eval()`` first) with its kernels quantized and its inputs
    float. Layers whose inputs stay float or have dynamic scales are left alone.

    Args:
      batches: inputs, each given to the model as its only argument.
      call: how to call the model on a batch otherwise, as ``lambda model, batch: model(*batch)``.

    Raises:
      ValueError: there is no batch.
      TypeError: batches is an array.
    """
    check_batches(batches)
    layers = quantized_layers(model).values()

    @nnx.jit
    def observe(model: nnx.Module, batch: Any) -> None:
        call(model, batch)

    for _, quantizer in layers:
        quantizer.calibrating = True
    count = 0
    try:
        for batch in batches:
            observe(model, batch)
            count += 1
    finally:
        for _, quantizer in layers:
            quantizer.calibrating = False
    if not count:
        raise ValueError("calibration needs at least one batch of inputs")


def search_weight_scales(
    model: nnx.Module, *, importance: Mapping[str, jax.Array] | None = None
) -> None:
    """Sets every stored kernel scale to the best one at the layer's present budget, in place.

    Args:
      model: an STP model.
      importance: weights of the squared errors by layer path, of the kernel's shape (see
        `stp_jax.squared_gradients`); ones where there are none.

    Raises:
      ValueError: a path is not a quantized layer.
    """
    layers, importance = quantized_layers(model), importance or {}
    _check_paths(importance, layers)
    for path, layer in layers.items():
        layer.quantizer.search(layer.kernel, importance.get(path))


def project_params(
    model: nnx.Module, values: Mapping[str, jax.typing.ArrayLike] | None = None
) -> nnx.State:
    """The model's parameters with every quantized kernel on its few-term values.

    Args:
      model: an STP model; it may be merged inside a traced function. It is not changed.
      values: terms per group by layer path, in place of the model's own budgets; may be traced.

    Returns:
      The `nnx.Param` state: targets for `stp_jax.terms.guide`, or new values for the model.

    Raises:
      ValueError: a path is not a quantized layer, or a budget is out of its range.
    """
    model = nnx.clone(model)
    layers = quantized_layers(model)
    _check_paths(values or {}, layers)
    for path, (layer, quantizer) in layers.items():
        kernel = _kernel(layer)
        kernel[...] = quantizer.project_kernel(kernel[...], (values or {}).get(path))
    return nnx.state(model, nnx.Param)


def integer_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """The integers of every quantized kernel at the present budgets: int32 by layer path."""
    return {
        path: np.asarray(q.quantizer.integer_kernel(q.kernel))
        for path, q in quantized_layers(model).items()
    }
