"""Bias correction: undo what the error of quantized kernels does to the mean of each channel.

A kernel's error e moves the expected output of its layer by E[e x], a constant per output channel
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
sec. 4.2). Here E[e x] is measured on batches, each layer on the inputs that it has once the layers
before it are corrected, and taken off the layer's bias, or, where there is none, added to the
running mean of the BatchNorm that follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax.quant.nnx import (
    Layer,
    QuantizedLayer,
    call_model,
    check_batches,
    product_hook,
    quantized_layers,
)


def _replace_product(layer: Layer, wrap: Callable[[Callable], Callable]) -> None:
    hook = product_hook(layer)
    assert hook is not None
    setattr(layer, hook, nnx.static(wrap(getattr(layer, hook) or jax.lax.dot_general)))


def _batch_norms(model: nnx.Module) -> Iterator[tuple[str, nnx.BatchNorm]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            yield ".".join(map(str, path)), module


def _find_batch_norms(model: nnx.Module, batch: Any, call: Callable) -> dict[str, str]:
    """The BatchNorm that takes the very output of each quantized layer, by the layers' paths."""
    graphdef, state = nnx.split(model)
    followers: dict[str, str] = {}

    def trace(state: nnx.State, batch: Any) -> None:
        probe = nnx.merge(graphdef, state, copy=True)
        outputs: list[tuple[str, jax.Array]] = []

        def remember(path: str, product: Callable) -> Callable:
            def remembered(*args: Any, **kwargs: Any) -> jax.Array:
                outputs.append((path, product(*args, **kwargs)))
                return outputs[-1][1]

            return remembered

        def recognise(path: str, promote: Callable) -> Callable:
            def recognised(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
                followers.update((name, path) for name, y in outputs if y is operands[0])
                return promote(operands, **kwargs)

            return recognised

        for path, quantized in quantized_layers(probe).items():
            if product_hook(quantized.layer):
                _replace_product(quantized.layer, functools.partial(remember, path))
        for path, norm in _batch_norms(probe):
            norm.promote_dtype = nnx.static(recognise(path, norm.promote_dtype))
        call(probe, batch)

    jax.eval_shape(trace, state, batch)
    return followers


def _watch(quantized: QuantizedLayer, record: Callable[[jax.Array], None]) -> None:
    """Makes the layer record its channels' shift, and compute as if it were corrected."""
    layer, quantizer = quantized
    before: list[jax.Array] = []

    def promote(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        before[:] = [operands[1]]
        return quantizer(operands, **kwargs)

    def corrected(product: Callable) -> Callable:
        def compute(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            error = kernel - before[0].astype(kernel.dtype)
            moved = product(x, error, *args, **kwargs)
            channels = 1 if layer.bias is None else layer.bias[...].ndim
            shift = jnp.mean(moved.astype(jnp.float32), axis=tuple(range(moved.ndim - channels)))
            record(shift)
            lead = (1,) * (moved.ndim - channels)
            return product(x, kernel, *args, **kwargs) - shift.reshape(lead + shift.shape).astype(
                moved.dtype
            )

        return compute

    layer.promote_dtype = nnx.static(promote)
    _replace_product(layer, corrected)


def _mean_shifts(
    model: nnx.Module, paths: list[str], batches: Iterable[Any], call: Callable
) -> dict[str, jax.Array]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def observe(state: nnx.State, batch: Any) -> dict[str, jax.Array]:
        probe = nnx.merge(graphdef, state, copy=True)
        layers = quantized_layers(probe)
        seen: dict[str, list[jax.Array]] = {path: [] for path in paths}
        for path in paths:
            _watch(layers[path], seen[path].append)
        call(probe, batch)
        return {path: jnp.mean(jnp.stack(calls), axis=0) for path, calls in seen.items() if calls}

    total, count = None, 0
    for batch in batches:
        shifts = observe(state, batch)
        total = shifts if total is None else jax.tree.map(jnp.add, total, shifts)
        count += 1
    assert total is not None
    return {path: shift / count for path, shift in total.items()}


def correct_bias(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = call_model,
) -> dict[str, jax.Array]:
    """Corrects the mean of every output channel for the error of its quantized kernel, in place.

    Layers with a bias (Conv, Linear, LinearGeneral) and layers whose output goes straight into a
    BatchNorm are corrected; others stay as they are. Run it once for given kernels and budgets,
    after calibration and after ``model.eval()``: a second run would correct as much again.

    Args:
      model: an STP model in evaluation mode.
      batches: inputs, each given to the model as its only argument; batches count equally.
      call: how to call the model on a batch otherwise.

    Returns:
      Layer path → the shift that was taken off, float32 of the bias's (or the channels') shape.

    Raises:
      ValueError: there is no batch, no layer can be corrected, a BatchNorm is in training mode, or
        a layer runs inside a scan or vmap, where its outputs cannot be seen.
      TypeError: batches is an array.
    """
    check_batches(batches)
    batches = list(batches)
    if not batches:
        raise ValueError("bias correction needs at least one batch of inputs")
    norms = dict(_batch_norms(model))
    training = [path for path, norm in norms.items() if not norm.use_running_average]
    if training:
        raise ValueError(
            f"BatchNorm {training[0]!r} is in training mode and would not use its running mean; "
            "call model.eval() first"
        )
    layers = quantized_layers(model)
    followers = _find_batch_norms(model, batches[0], call)
    biased = [p for p, q in layers.items() if product_hook(q.layer) and q.layer.bias is not None]
    paths = biased + [path for path in followers if path not in biased]
    if not paths:
        raise ValueError("no quantized layer has a bias or goes straight into a BatchNorm")
    try:
        shifts = _mean_shifts(model, paths, batches, call)
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "a quantized layer runs inside a scan, vmap or the like; its outputs cannot be seen"
        ) from None
    for path, shift in shifts.items():
        if path in biased:
            bias = layers[path].layer.bias
            bias[...] = bias[...] - shift.astype(bias[...].dtype)
        else:
            mean = norms[followers[path]].mean
            mean[...] = mean[...] + shift.astype(mean[...].dtype)
    return shifts
