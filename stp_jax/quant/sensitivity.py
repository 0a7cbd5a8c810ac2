"""Sensitivity of the loss to budgets by layer and filter, for `stp_jax.terms.allocate_budgets`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax import hooks
from stp_jax.hooks import KernelLayer
from stp_jax.quant.budgets import budgets, set_budgets
from stp_jax.quant.calibration import call_model, check_batches, sound_batches, sum_over_batches
from stp_jax.quant.layers import QuantizedLayer, check_not_stacked, quantized_layers
from stp_jax.terms.projection import error_curve

_LEAST = 1e-12

# What has a budget of its own.
Granularity = Literal["layer", "filter"]


def squared_gradients(
    model: Any, loss: Callable[[Any, Any], jax.Array], batches: Iterable[Any]
) -> dict[str, jax.Array]:
    """The mean squared gradient of each quantized kernel: a diagonal curvature, empirical Fisher.

    To second order the loss rises by half the curvature times the squared change of a weight, and
    near a minimum the expected squared gradient stands for the curvature (as in Optimal Brain
    Damage and its successors; LeCun et al., NeurIPS 1989).

    Args:
      model: an STP model, a Linen one with its variables; it is not changed.
      loss: (model, batch) → scalar.
      batches: what ``loss`` takes; gradients are squared batch by batch.

    Returns:
      Layer path → float32 array of the kernel's shape.

    Raises:
      ValueError: there is no batch.
    """
    params, rebuild = hooks.trainable(model)

    @jax.jit
    def squares(params: Any, batch: Any) -> dict[str, jax.Array]:
        grads = jax.grad(lambda params: loss(rebuild(params), batch))(params)
        # A model that holds its gradient in the place of its parameters.
        layers = quantized_layers(rebuild(grads))
        return {path: layer.kernel**2 for path, layer in layers.items()}

    total, count = sum_over_batches(functools.partial(squares, params), sound_batches(batches))
    if not count:
        raise ValueError("sensitivity needs at least one batch")
    return {path: value / count for path, value in total.items()}


class LayerDivergences:
    """The divergences of `output_divergences`, compiled once for calls with any budgets."""

    def __init__(
        self,
        model: Any,
        batches: Iterable[Any],
        *,
        call: Callable[[Any, Any], jax.Array] = call_model,
        batch_statistics: bool = True,
    ):
        """Takes what `output_divergences` does."""
        check_batches(batches)
        self._model = _with_all_terms(model)
        self._batches = list(sound_batches(batches))
        if not self._batches:
            raise ValueError("sensitivity needs at least one batch")
        self._kernels = {
            path: layer.projected()
            for path, layer in quantized_layers(self._model).items()
            if not layer.is_stacked
        }
        state, rebuild = hooks.functional(self._model)

        @jax.jit
        def outputs(state: Any, kernels: dict[str, jax.Array], batch: Any) -> jax.Array:
            replaced = hooks.Hooks(
                operands=functools.partial(_with_kernel, kernels),
                batch_statistics=batch_statistics,
            )
            logits = call(hooks.attach(rebuild(state), replaced), batch)
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        @jax.jit
        def divergence(
            state: Any, kernels: dict[str, jax.Array], batch: Any, log_p: jax.Array
        ) -> jax.Array:
            return _divergence(log_p, outputs(state, kernels, batch))

        self._references = [outputs(state, self._kernels, batch) for batch in self._batches]
        self._divergence = divergence

    def measure(self, budget: int | Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """Path of each layer that has a budget rule → mean divergence in nats, squared error."""
        found = {}
        for path in budgets(self._model):
            changed = hooks.copy_model(self._model)
            set_budgets(changed, {path: budget[path] if isinstance(budget, Mapping) else budget})
            layer = quantized_layers(changed)[path]
            layer.search_scale(None)
            projected = layer.projected()
            error = jnp.sum((projected - layer.kernel).astype(jnp.float32) ** 2)
            kernels = self._kernels
            if path in kernels:
                kernels = {**kernels, path: projected}
                # One shape of budgets for all, so that nothing is compiled again.
                set_budgets(changed, {path: layer.rule.format.max_budget})
            state, _ = hooks.functional(changed)
            pairs = zip(self._batches, self._references, strict=True)
            each = [self._divergence(state, kernels, x, log_p) for x, log_p in pairs]
            found[path] = float(np.mean(each)), float(error)
        return found

    def weights(self, budget: int | Mapping[str, Any]) -> dict[str, float | None]:
        """By layer, its divergence over its squared error; None if there is no error."""
        # A layer that the outputs do not feel keeps a little weight, to break ties by error.
        return {
            path: max(divergence, _LEAST) / error if error > 0 else None
            for path, (divergence, error) in self.measure(budget).items()
        }


def _with_all_terms(model: Any) -> Any:
    """A copy of the model in which no layer is pruned."""
    whole = hooks.copy_model(model)
    layers, before = quantized_layers(whole), budgets(whole)
    most = {path: layers[path].rule.format.max_budget for path in before}
    set_budgets(whole, most)
    for path, budget in before.items():
        if np.any(np.asarray(budget) < most[path]):
            layers[path].search_scale(None)
    return whole


def _with_kernel(
    kernels: Mapping[str, jax.Array], layer: KernelLayer, promote: Callable
) -> Callable | None:
    """A layer's operands with a kernel that is quantized already; its own is not computed then."""
    if layer.path not in kernels:
        return None

    def operands(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        promoted = list(promote(operands, **kwargs))
        place = 0 if len(promoted) == 1 else 1
        own = promoted[place]
        promoted[place] = kernels[layer.path].astype(own.dtype).reshape(own.shape)
        return tuple(promoted)

    return operands


def output_divergences(
    model: Any,
    batches: Iterable[Any],
    budget: int | Mapping[str, Any],
    *,
    call: Callable[[Any, Any], jax.Array] = call_model,
    batch_statistics: bool = True,
) -> dict[str, float]:
    """The divergence of the model's outputs when one layer alone is projected, layer by layer.

    It is the Kullback–Leibler divergence of the softmax over the last axis, which needs no labels;
    near the model it is half the Gauss–Newton form of the change in the outputs, through all that
    follows the layer. The layer's scales are searched at the budget.

    Args:
      model: an STP model in evaluation mode (a Linen one with its variables), with calibrated
        inputs; it is not changed. Whatever its budgets are, all other layers keep all terms.
      batches: inputs, each given to the model as its only argument. A few hundred examples do.
      budget: terms per group, the same for all layers, or by layer path as for `set_budgets`.
      call: how to call the model on a batch otherwise; it returns logits.
      batch_statistics: BatchNorms normalise by each batch's own statistics, here and before the
        projection, since a projected model's are measured again; batches should then hold some
        tens of examples. False keeps the running ones.

    Returns:
      Path of each layer that has a budget rule → mean divergence in nats.

    Raises:
      ValueError: there is no batch, or a budget is out of its range.
      TypeError: batches is an array.
    """
    single = LayerDivergences(model, batches, call=call, batch_statistics=batch_statistics)
    return {path: divergence for path, (divergence, _) in single.measure(budget).items()}


def output_divergence(
    model: Any,
    reference: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], jax.Array] = call_model,
) -> float:
    """The divergence of a model's outputs from those of a reference.

    It tells without labels which of several allocations leaves a model nearest to what it was; of
    models with BatchNorm, once the statistics are measured again.

    Args:
      model: an STP model in evaluation mode (a Linen one with its variables).
      reference: the float model, or an STP model with all its terms, likewise.
      batches: inputs, each given to both as their only argument. A few hundred examples do.
      call: how to call a model on a batch otherwise; it returns logits.

    Returns:
      Mean Kullback–Leibler divergence of the softmax over the last axis, in nats.

    Raises:
      ValueError: there is no batch.
      TypeError: batches is an array.
    """
    check_batches(batches)

    def log_outputs(model: Any) -> Callable[[Any], jax.Array]:
        state, rebuild = hooks.functional(model)
        logits = jax.jit(lambda state, batch: call(rebuild(state), batch).astype(jnp.float32))
        return lambda batch: jax.nn.log_softmax(logits(state, batch))

    log_p, log_q = log_outputs(reference), log_outputs(model)
    each = [_divergence(log_p(batch), log_q(batch)) for batch in sound_batches(batches)]
    if not each:
        raise ValueError("sensitivity needs at least one batch")
    return float(np.mean(each))


def _divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def measured_importance(
    model: Any,
    batches: Iterable[Any],
    budget: int | Mapping[str, Any],
    *,
    call: Callable[[Any, Any], jax.Array] = call_model,
    batch_statistics: bool = True,
) -> dict[str, jax.Array]:
    """Weights of the squared errors such that each layer's error is its `output_divergences`.

    One weight for a whole kernel: what a unit of its squared error does to the outputs, measured at
    one budget. It ranks layers better than a diagonal of squared gradients does, which few batches
    leave noisy and which sees no error that others cancel. `allocate_by_divergence` measures it
    where it allocates.

    Args:
      model: as for `output_divergences`.
      batches: likewise.
      budget: terms per group at which to measure, best near what is to be allocated.
      call: likewise.
      batch_statistics: likewise.

    Returns:
      Layer path → float32 array of the kernel's shape, for `allocate` and `search_weight_scales`.

    Raises:
      ValueError: as by `output_divergences`.
    """
    single = LayerDivergences(model, batches, call=call, batch_statistics=batch_statistics)
    weights = single.weights(budget)
    return {
        path: jnp.full(layer.kernel.shape, weights.get(path) or 1.0, jnp.float32)
        for path, layer in quantized_layers(model).items()
    }


def _single_layers(model: Any) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model)
    check_not_stacked(layers, "allocation of budgets")
    return layers


def group_counts(model: Any) -> dict[str, int]:
    """The number of groups of each quantized kernel: the terms that one more of budget costs.

    Raises:
      ValueError: layers are stacked.
    """
    counts = {}
    for path, quantized in _single_layers(model).items():
        layout = quantized.rule.format.layout(quantized.format.axes.groups)
        counts[path] = layout.count(quantized.kernel.shape)
    return counts


def error_curves(
    model: Any,
    *,
    importance: Mapping[str, jax.Array] | None = None,
    by: Granularity = "layer",
) -> dict[str, np.ndarray]:
    """The weighted squared error of each quantized kernel, or each filter, at every budget.

    Args:
      model: an STP model whose rules use the NAF and optimal projection.
      importance: layer path → weights of the squared errors, of the kernel's shape (see
        `squared_gradients`); all ones by default.
      by: ``layer`` or ``filter``.

    Returns:
      Layer path → float array ``[max_budget + 1]``, by filter ``[filters, max_budget + 1]``, in
      squared weights times importance. Filters are in the kernel's order.

    Raises:
      ValueError: a rule uses another encoding or method, whose curves need not be convex, or
        layers are stacked, or importance lacks a layer, or there is no such granularity.
    """
    if by not in get_args(Granularity):
        raise ValueError(f"by must be one of {', '.join(get_args(Granularity))}, got {by!r}")
    curves = {}
    layers = _single_layers(model)
    missing = [path for path in layers if path not in (importance or layers)]
    if missing:
        raise ValueError(f"importance lacks the layers {', '.join(missing)}")
    for path, quantized in layers.items():
        rule, kernel = quantized.rule, quantized.kernel
        if not rule.format.has_error_curve:
            raise ValueError(f"layer {path!r}: error curves are for encoding naf, method optimal")
        axes = quantized.format.axes
        shape, axis = rule.format.layout(axes.groups).merged(kernel.shape)
        # Axes behind the reduction moved to the front when its axes were merged.
        merged = len(axes.groups) - 1
        apart = tuple(
            a if a < axis else a - merged for a in range(kernel.ndim) if a not in axes.scale
        )
        scale = quantized.scale
        weights = jnp.broadcast_to(scale**2, kernel.shape)
        if importance is not None:
            weights = weights * importance[path]
        curve = error_curve(
            (kernel.astype(jnp.float32) / scale).reshape(shape),
            group_size=rule.group_size,
            axis=axis,
            bits=rule.bits,
            limit=rule.format.largest,
            importance=weights.reshape(shape),
            apart=apart if by == "filter" else (),
        )
        curves[path] = np.asarray(curve).reshape(
            *((-1,) if by == "filter" else ()), curve.shape[-1]
        )
    return curves
