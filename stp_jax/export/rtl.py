"""A trained layer as a job for the RTL test bench: its terms and the activations that it sees.

The test bench multiplies matrices (`stp_jax.hwmodel.rtl.images`), so a convolution becomes its
patches times its kernel, window position by window position. Channels of a position are filled up
with zeros to whole groups, as in training, and a grouped convolution is one job per group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.hwmodel.rtl.images import BITS, ENCODING, Job, write_images
from stp_jax.hwmodel.rtl.simulate import JobResult, simulate_array
from stp_jax.quant.integer import integer_model
from stp_jax.quant.integer_steps import IntegerNetwork, Product
from stp_jax.quant.layers import LayerFormat, QuantizedLayer, quantized_layers
from stp_jax.quant.policy import Rule


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
    _check(path, quantized.rule, np.asarray(quantized.budget))
    return quantized


def _check(path: str, rule: Rule, budget: np.ndarray) -> None:
    if (rule.encoding, rule.bits) != (ENCODING, BITS) or rule.activation_bits > 8:
        raise ValueError(
            f"layer {path!r}: the array takes NAF terms of 8-bit weights and 8-bit activations, "
            f"not {rule.encoding} of {rule.bits} bits and {rule.activation_bits} bits"
        )
    if np.max(budget) < 1:
        raise ValueError(f"layer {path!r}: a budget of 0 leaves nothing to compute")


def _first_product(model: Any, path: str, x: Any, **options: Any) -> tuple[tuple, dict[str, Any]]:
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
    integer(x, **options)
    if not calls:
        raise ValueError(f"the model does not use layer {path!r} on this input")
    return calls[0]


def layer_jobs(model: Any, layer: str, x: Any, **kwargs: Any) -> list[Job]:
    """A layer's integer operands when the model runs on x, as jobs for the array.

    Args:
      model: a calibrated STP model; a Linen one with its variables.
      layer: dotted path of a quantized Conv or Linear with the NAF, 8-bit weights and a budget.
      x: an input of the model. The layer's first use counts.
      **kwargs: keyword arguments of the model's call, such as ``train=False``.

    Returns:
      One job, or one per feature group. Weights are [filters, K], activations [pixels, K]; a job's
      ``activations @ weights.T`` are the layer's int32 sums, pixels in the order of its output.

    Raises:
      ValueError: the layer does not exist, is not used, is of another kind or format, or the model
        is not calibrated.
    """
    quantized = _find(model, layer)
    (lhs, kernel, *positional), options = _first_product(model, layer, x, **kwargs)
    options |= zip(("window_strides", "padding"), positional, strict=False)
    budget = np.asarray(quantized.flat_budget)
    return _jobs(lhs, np.asarray(kernel), options, quantized.format, budget)


def _jobs(
    lhs: jax.Array,
    kernel: np.ndarray,
    options: Mapping[str, Any],
    format: LayerFormat,
    budget: np.ndarray,
) -> list[Job]:
    """The jobs of one product; options are those of ``conv_general_dilated``."""
    options = dict(options)
    # A filter without a term still takes a slot, which is empty.
    budgets = np.maximum(budget, 1)
    weights = np.asarray(kernel, np.int32)
    if weights.ndim == 2:
        groups, patches = 1, np.asarray(lhs, np.int32).reshape(-1, 1, len(weights))
    else:
        groups = options.pop("feature_group_count", 1)
        # Exact in float32 for integers of 8 bits.
        windows = hooks.conv_patches(lhs.astype(jnp.float32), kernel, **options)
        patches = np.asarray(windows, np.int32)
    # Weights as [filters, positions, channels of a group].
    weights = weights.reshape(-1, *weights.shape[-2:]).transpose(2, 0, 1)
    window_groups = weights.shape[2] == 1 and format.axes.groups == tuple(range(kernel.ndim - 2))

    layout = format.rule.format.layout((-1,))  # every window position starts anew

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


def simulate_network(
    network: IntegerNetwork, q: jax.typing.ArrayLike, *, rows: int, cols: int
) -> tuple[list[np.ndarray], dict[str, list[JobResult]]]:
    """Runs an integer network with every product on the simulated array of group PEs.

    The array gives the sums of each layer, tile by tile; what stands between the layers, the
    shifts, additions and maxima of the network's other steps, runs in JAX. A simulation takes
    seconds for some ten thousand multiplications.

    Args:
      network: from `stp_jax.integer_network`; weights are of 8 bits in NAF, inputs of up to 8.
      q: integers of one example, [*network.input_shape].
      rows: R, rows of the array.
      cols: C, columns of the array.

    Returns:
      The integers of the input and of every step, as by `IntegerNetwork.run`, and by layer what was
      observed, a job for each of its feature groups.

    Raises:
      ValueError: a layer is of another format, or q of another shape.
      FileNotFoundError: Icarus Verilog is not installed.
    """
    q = jnp.asarray(q, jnp.int32)
    if q.shape != network.input_shape:
        raise ValueError(f"expected one example of shape {network.input_shape}, got {q.shape}")
    observed: dict[str, list[JobResult]] = {}

    def product(step: Product, x: jax.Array) -> jax.Array:
        rule = step.format.rule
        _check(step.layer, rule, step.budget)
        jobs = _jobs(x, step.weights, step.options, step.format, step.budget)
        results = simulate_array(jobs, rows=rows, cols=cols, group_size=rule.group_size)
        observed[step.layer] = results
        sums = np.concatenate([result.outputs for result in results], axis=1)
        return jnp.asarray(sums.reshape(step.shape), jnp.int32)

    values = network.run(q[None], product)
    return [np.asarray(value) for value in values], observed
