"""Compensated projection of a whole model: grams of the layers' inputs, then `project_compensated`.

The grams come from one pass of example batches through the model as it stands, so that layers are
treated alike and in any order. Dense layers and convolutions without channel groups take part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax.quant.bias import _replace_product
from stp_jax.quant.nnx import (
    QuantizedLayer,
    _kernel,
    call_model,
    check_batches,
    product_hook,
    quantized_layers,
    search_weight_scales,
    set_budgets,
)
from stp_jax.terms.compensation import project_compensated
from stp_jax.terms.groups import GroupLayout


def _takes_part(quantized: QuantizedLayer) -> bool:
    layer = quantized.layer
    if isinstance(layer, nnx.Conv):
        return layer.feature_group_count == 1
    return type(layer) is nnx.Linear and product_hook(layer) is not None


def _patches(layer: Any, x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """The layer's input as rows [N, K], K in the order of the kernel's axes but the last."""
    if not isinstance(layer, nnx.Conv):
        return x.reshape(-1, x.shape[-1])
    window = kernel.shape[:-2]
    names = ("window_strides", "padding")
    given = dict(zip(names, args, strict=False)) | kwargs
    patches = jax.lax.conv_general_dilated_patches(
        x,
        window,
        given["window_strides"],
        given["padding"],
        lhs_dilation=given.get("lhs_dilation"),
        rhs_dilation=given.get("rhs_dilation"),
        dimension_numbers=given["dimension_numbers"],
    )
    # They come with the channel first and the window last.
    patches = patches.reshape(-1, x.shape[-1], int(np.prod(window)))
    return jnp.swapaxes(patches, 1, 2).reshape(len(patches), -1)


def _observe(
    model: nnx.Module, paths: list[str], batches: Iterable[Any], call: Callable
) -> dict[str, jax.Array]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def observe(state: nnx.State, batch: Any) -> dict[str, jax.Array]:
        probe = nnx.merge(graphdef, state, copy=True)
        layers = quantized_layers(probe)
        seen: dict[str, list[jax.Array]] = {path: [] for path in paths}

        def watched(path: str, product: Callable) -> Callable:
            def compute(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
                rows = _patches(layers[path].layer, x, kernel, *args, **kwargs)
                rows = rows.astype(jnp.float32)
                seen[path].append(jnp.matmul(rows.T, rows, precision="highest"))
                return product(x, kernel, *args, **kwargs)

            return compute

        for path in paths:
            _replace_product(layers[path].layer, functools.partial(watched, path))
        call(probe, batch)
        return {path: functools.reduce(jnp.add, calls) for path, calls in seen.items() if calls}

    total = None
    for batch in batches:
        grams = observe(state, batch)
        total = grams if total is None else jax.tree.map(jnp.add, total, grams)
    if total is None:
        raise ValueError("compensation needs at least one batch of inputs")
    return total


def compensate(
    model: nnx.Module,
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
      model: an STP model in evaluation mode, with calibrated inputs and, best, all its terms.
      batches: inputs, each given to the model as its only argument. A few hundred examples do.
      values: terms per group by layer path, as for `stp_jax.set_budgets`.
      damping: as for `stp_jax.terms.project_compensated`.
      call: how to call the model on a batch otherwise.

    Returns:
      Layer path → the squared error of its outputs, over the error without compensation. Layers
      that are neither dense nor a convolution without channel groups are left out and unchanged.

    Raises:
      ValueError: there is no batch, no layer takes part, or one runs inside a scan or vmap, where
        its inputs cannot be seen.
      TypeError: batches is an array.
    """
    check_batches(batches)
    layers = quantized_layers(model)
    paths = [path for path, quantized in layers.items() if _takes_part(quantized)]
    if not paths:
        raise ValueError("no quantized layer is dense or a convolution without channel groups")
    try:
        grams = _observe(model, paths, batches, call)
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "a quantized layer runs inside a scan, vmap or the like; its inputs cannot be seen"
        ) from None
    set_budgets(model, values)
    search_weight_scales(model)
    ratios = {}
    for path, gram in grams.items():
        layer, quantizer = layers[path]
        fmt, kernel = quantizer.rule.format, layers[path].kernel
        outputs = kernel.shape[-1]
        lead, size = int(np.prod(kernel.shape[:-2])), fmt.group_size
        layout = fmt.layout((-2,))  # along a position's input channels

        def whole(x: jax.Array, lead: int = lead, layout: GroupLayout = layout) -> jax.Array:
            """Rows [lead * inputs, n] with each run of inputs filled up to whole groups."""
            return layout.pad(x.reshape(lead, -1, x.shape[-1])).reshape(-1, x.shape[-1])

        scale = quantizer.kernel_scale(kernel)
        padded = whole(kernel.reshape(-1, outputs))
        integers = project_compensated(
            padded.reshape(-1, size, outputs),
            jnp.broadcast_to(scale.reshape(-1, scale.shape[-1]), (1, outputs))[0],
            whole(whole(gram).T),
            quantizer.budget[...],
            fmt=fmt,
            damping=damping,
        )
        kept = layout.join(integers, kernel.shape)
        new = (scale * kept.astype(scale.dtype)).astype(kernel.dtype)
        error = _output_error(gram, new - kernel)
        plain = _output_error(gram, quantizer.project_kernel(kernel) - kernel)
        ratios[path] = float(error / plain) if plain > 0 else 1.0
        _kernel(layer)[...] = new
    return ratios


def _output_error(gram: jax.Array, error: jax.Array) -> jax.Array:
    rows = error.reshape(len(gram), -1).astype(jnp.float32)
    return jnp.sum(rows * jnp.matmul(gram, rows, precision="highest"))
