"""Sensitivity of the loss to budgets by layer and filter, for `stp_jax.terms.allocate_budgets`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax import hooks
from stp_jax.quant.calibration import sum_over_batches
from stp_jax.quant.layers import QuantizedLayer, quantized_layers
from stp_jax.terms.projection import error_curve

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

    total, count = sum_over_batches(functools.partial(squares, params), batches)
    if not count:
        raise ValueError("sensitivity needs at least one batch")
    return {path: value / count for path, value in total.items()}


def _single_layers(model: Any) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model)
    for path, quantized in layers.items():
        if quantized.is_stacked:
            raise ValueError(f"layer {path!r} is a stack of layers, which share no one budget")
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
