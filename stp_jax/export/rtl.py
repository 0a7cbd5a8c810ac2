"""A trained layer as a job for the RTL test bench: its terms and the activations that it sees.

The test bench multiplies matrices (`stp_jax.hwmodel.rtl.images`), so a convolution becomes its
patches times its kernel, window position by window position. Channels of a position are filled up
with zeros to whole groups, as in training, and a grouped convolution is one job per group.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.hwmodel.rtl.images import BITS, ENCODING, Job, write_images
from stp_jax.quant.integer import integer_model
from stp_jax.quant.layers import QuantizedLayer, quantized_layers


def _find(model: Any, path: str) -> QuantizedLayer:
    layers = quantized_layers(model)
    if path not in layers:
        raise ValueError(f"no quantized layer at {path!r}; there are: {', '.join(layers)}")
    quantized = layers[path]
    if quantized.layer.kind not in ("conv", "dense"):
        raise ValueError(
            f"layer {path!r} is a {quantized.layer.type_name}; jobs are made of convolutions and "
            "dense layers"
        )
    rule = quantized.rule
    if (rule.encoding, rule.bits) != (ENCODING, BITS) or rule.activation_bits > 8:
        raise ValueError(
            f"layer {path!r}: the array takes NAF terms of 8-bit weights and 8-bit activations, "
            f"not {rule.encoding} of {rule.bits} bits and {rule.activation_bits} bits"
        )
    if np.max(quantized.budget) < 1:
        raise ValueError(f"layer {path!r}: a budget of 0 leaves nothing to compute")
    return quantized


def _first_product(model: Any, path: str, x: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a layer's first product when the integer model runs on x."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def record(layer: KernelLayer, product: Callable) -> Callable | None:
        if layer.path != path:
            return None

        def recorded(*args: Any, **kwargs: Any) -> jax.Array:
            calls.append((args, kwargs))
            return product(*args, **kwargs)

        return recorded

    integer: Any = hooks.attach(integer_model(model), Hooks(product=record))
    if isinstance(integer, nnx.Module):
        integer.eval()
    integer(x)
    if not calls:
        raise ValueError(f"the model does not use layer {path!r} on this input")
    return calls[0]


def layer_jobs(model: Any, layer: str, x: Any) -> list[Job]:
    """A layer's integer operands when the model runs on x, as jobs for the array.

    Args:
      model: a calibrated STP model; a Linen one with its variables.
      layer: dotted path of a quantized Conv or Linear with the NAF, 8-bit weights and a budget.
      x: an input of the model. The layer's first use counts.

    Returns:
      One job, or one per feature group. Weights are [filters, K], activations [pixels, K]; a job's
      ``activations @ weights.T`` are the layer's int32 sums, pixels in the order of its output.

    Raises:
      ValueError: the layer does not exist, is not used, is of another kind or format, or the model
        is not calibrated.
    """
    quantized = _find(model, layer)
    rule = quantized.rule
    # A filter without a term still takes a slot, which is empty.
    budgets = np.maximum(np.asarray(quantized.flat_budget), 1)
    (lhs, kernel, *positional), options = _first_product(model, layer, x)
    weights = np.asarray(kernel, np.int32)
    if weights.ndim == 2:
        groups, patches = 1, np.asarray(lhs, np.int32).reshape(-1, 1, len(weights))
    else:
        groups = options.pop("feature_group_count", 1)
        # Exact in float32 for integers of 8 bits.
        windows = hooks.conv_patches(lhs.astype(jnp.float32), kernel, *positional, **options)
        patches = np.asarray(windows, np.int32)
    # Weights as [filters, positions, channels of a group].
    weights = weights.reshape(-1, *weights.shape[-2:]).transpose(2, 0, 1)
    window_groups = weights.shape[2] == 1 and quantized.format.axes.groups == tuple(
        range(kernel.ndim - 2)
    )

    layout = rule.format.layout((-1,))  # every window position starts anew

    def job(weights: np.ndarray, patches: np.ndarray, budget: np.ndarray) -> Job:
        if window_groups:
            weights, patches = weights.swapaxes(1, 2), patches.swapaxes(1, 2)
        whole = [layout.pad(v).reshape(len(v), -1) for v in (weights, patches)]
        own = budget if by_filter else int(budget[0])
        return Job(weights=whole[0], activations=whole[1], budget=own)

    by_filter = budgets.ndim == 1
    each = np.broadcast_to(budgets, len(weights))
    parts = (np.split(weights, groups), np.split(patches, groups, axis=2), np.split(each, groups))
    return [job(*part) for part in zip(*parts, strict=True)]


def write_layer_images(
    model: Any,
    layer: str,
    x: Any,
    directory: str | Path,
    *,
    rows: int,
    cols: int,
    encode_at_edge: bool = False,
) -> dict[str, int]:
    """Writes the memory images of a trained layer for an array of ``rows`` × ``cols`` group PEs.

    Args:
      model: a calibrated STP model; a Linen one with its variables.
      layer: as in `layer_jobs`.
      x: an input of the model.
      directory: where the files go; made if it does not exist.
      rows: R, rows of the array.
      cols: C, columns of the array.
      encode_at_edge: False writes the term stream, True int8 weights for the encoders at the edge.

    Returns:
      The number of words in each image, under the names of the test bench's parameters.

    Raises:
      ValueError: as `layer_jobs` and `stp_jax.hwmodel.rtl.write_images` do.
    """
    jobs = layer_jobs(model, layer, x)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return write_images(
        directory,
        jobs,
        rows=rows,
        cols=cols,
        group_size=quantized_layers(model)[layer].rule.group_size,
        encode_at_edge=encode_at_edge,
    )
