"""Compensated projection of a model: each layer's errors make up for each other on its inputs.

The Gram matrices of the layers' inputs come from one pass of example batches through the model as
it stands, so that layers are treated alike and in any order; `stp_jax.terms.project_compensated`
does the rest. Dense layers and convolutions without channel groups take part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.quant.budgets import set_budgets
from stp_jax.quant.calibration import (
    call_model,
    check_batches,
    outside_of_loops,
    search_weight_scales,
    sound_batches,
    sum_over_batches,
)
from stp_jax.quant.kernel_rows import KernelRows
from stp_jax.quant.layers import (
    check_own_kernels,
    check_scale_by_filter,
    check_stores_scales,
    quantized_layers,
)
from stp_jax.terms.compensation import project_compensated


def _takes_part(layer: KernelLayer) -> bool:
    dense = layer.kind == "dense" or (layer.kind == "conv" and layer.feature_groups == 1)
    return dense and layer.has_plain_product


def _input_rows(
    layer: KernelLayer, x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
    """The layer's input as rows [N, K], K in the order of the kernel's axes but the last."""
    if layer.kind == "dense":
        return x.reshape(-1, x.shape[-1])
    patches = hooks.conv_patches(x, kernel, *args, **kwargs)
    return patches.reshape(len(patches), -1)


def _gram_matrices(
    model: Any, paths: list[str], batches: Iterable[Any], call: Callable
) -> dict[str, jax.Array]:
    state, rebuild = hooks.functional(model)

    @jax.jit
    def observe(state: Any, batch: Any) -> dict[str, jax.Array]:
        seen: dict[str, list[jax.Array]] = {path: [] for path in paths}

        def product(layer: KernelLayer, product: Callable) -> Callable | None:
            if layer.path not in seen:
                return None

            def compute(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
                rows = _input_rows(layer, x, kernel, *args, **kwargs).astype(jnp.float32)
                seen[layer.path].append(jnp.matmul(rows.T, rows, precision="highest"))
                return product(x, kernel, *args, **kwargs)

            return compute

        call(hooks.attach(rebuild(state), Hooks(product=product)), batch)
        return {path: functools.reduce(jnp.add, calls) for path, calls in seen.items() if calls}

    total, count = sum_over_batches(functools.partial(observe, state), sound_batches(batches))
    if not count:
        raise ValueError("compensation needs at least one batch of inputs")
    return total


def compensate(
    model: Any,
    batches: Iterable[Any],
    values: Mapping[str, jax.typing.ArrayLike],
    *,
    damping: float = 0.01,
    call: Callable[[Any, Any], Any] = call_model,
) -> dict[str, float]:
    """Sets budgets and projects onto them so that layers' outputs move least, in place.

    Each kernel is replaced by few-term values whose errors make up for each other on the inputs
    that the layer has in the model as it stands, before the new budgets. The forward pass projects
    a kernel of such values onto itself, so retraining starts from there.

    Args:
      model: an STP model in evaluation mode (a Linen one with its variables), with calibrated
        inputs and, best, all its terms.
      batches: inputs, each given to the model as its only argument. A few hundred examples do.
      values: terms per group by layer path, as for `stp_jax.set_budgets`.
      damping: as for `stp_jax.terms.project_compensated`.
      call: how to call the model on a batch otherwise.

    Returns:
      Layer path → the squared error of its outputs, over the error without compensation. Layers
      that are neither dense nor a convolution without channel groups are left out and unchanged.

    Raises:
      ValueError: there is no batch, or one is empty or holds NaN or infinity; no layer takes part;
        a layer has scales by group, or scales that follow from its kernel ("max"), or one runs
        inside a scan or vmap, where its inputs cannot be seen.
      TypeError: batches is an array.
    """
    check_batches(batches)
    layers = quantized_layers(model)
    check_scale_by_filter(layers, "compensate")
    check_own_kernels(layers, "compensate")
    paths = [path for path, quantized in layers.items() if _takes_part(quantized.layer)]
    if not paths:
        raise ValueError("no quantized layer is dense or a convolution without channel groups")
    check_stores_scales({path: layers[path] for path in paths}, "compensate")
    with outside_of_loops("inputs"):
        grams = _gram_matrices(model, paths, batches, call)
    set_budgets(model, values)
    search_weight_scales(model)
    ratios = {}
    for path, gram in grams.items():
        layer = layers[path]
        fmt, kernel, scale = layer.rule.format, layer.kernel, layer.scale
        outputs, rows = kernel.shape[-1], KernelRows.of(layer)
        integers = project_compensated(
            rows.split(kernel).reshape(-1, fmt.group_size, outputs),
            jnp.broadcast_to(scale.reshape(-1, scale.shape[-1]), (1, outputs))[0],
            rows.pad_square(gram[None])[0],
            layer.flat_budget,
            fmt=fmt,
            damping=damping,
        )
        kept = rows.join(integers.reshape(1, -1, outputs))
        new = (scale * kept.astype(scale.dtype)).astype(kernel.dtype)
        error = _output_error(gram, new - kernel)
        plain = _output_error(gram, layer.projected() - kernel)
        ratios[path] = float(error / plain) if plain > 0 else 1.0
        layer.kernel = new
    return ratios


def _output_error(gram: jax.Array, error: jax.Array) -> jax.Array:
    rows = error.reshape(len(gram), -1).astype(jnp.float32)
    return jnp.sum(rows * jnp.matmul(gram, rows, precision="highest"))
