"""Bias correction: undo what the error of quantized kernels does to the mean of each channel.

A kernel's error e moves the expected output of its layer by E[e x], a constant per output channel
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
sec. 4.2). Here E[e x] is measured on batches, each layer on the inputs that it has once the layers
before it are corrected, and taken off the layer's bias, or, where there is none, added to the
running mean of the BatchNorm that follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.quant.calibration import (
    call_model,
    check_batches,
    outside_of_loops,
    sound_batches,
    sum_over_batches,
)
from stp_jax.quant.layers import quantized_layers


def find_batch_norms(
    model: Any, layers: Container[str], batch: Any, call: Callable
) -> dict[str, str]:
    """The BatchNorm that takes the very product of each of the layers, by the layers' paths.

    Raises:
      ValueError: products of a layer go into several BatchNorms.
    """
    state, rebuild = hooks.functional(model)
    followers: dict[str, str] = {}

    def trace(state: Any, batch: Any) -> None:
        outputs: list[tuple[str, jax.Array]] = []

        def remember(layer: KernelLayer, product: Callable) -> Callable | None:
            if layer.path not in layers or not layer.has_plain_product:
                return None

            def remembered(*args: Any, **kwargs: Any) -> jax.Array:
                outputs.append((layer.path, product(*args, **kwargs)))
                return outputs[-1][1]

            return remembered

        def recognise(path: str, x: jax.Array) -> None:
            for name in (name for name, y in outputs if y is x):
                if followers.setdefault(name, path) != path:
                    raise ValueError(
                        f"layer {name!r} goes into the BatchNorms {followers[name]!r} and {path!r}"
                    )

        probe = hooks.attach(rebuild(state), Hooks(product=remember, batch_norm_input=recognise))
        call(probe, batch)

    jax.eval_shape(trace, state, batch)
    return followers


def _observing(ndims: dict[str, int], seen: dict[str, list[jax.Array]]) -> Hooks:
    """Records each layer's shift per channel, while layers compute as if they were corrected.

    Args:
      ndims: axes of the channels by layer path.
      seen: takes the shifts, call by call.
    """
    kernels: dict[str, jax.Array] = {}  # as they were before quantization

    def operands(layer: KernelLayer, promote: Callable) -> Callable | None:
        if layer.path not in ndims:
            return None

        def promoted(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
            kernels[layer.path] = operands[1]
            return promote(operands, **kwargs)

        return promoted

    def product(layer: KernelLayer, product: Callable) -> Callable | None:
        if layer.path not in ndims:
            return None

        def compute(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            error = kernel - kernels[layer.path].astype(kernel.dtype)
            moved = product(x, error, *args, **kwargs)
            lead = moved.ndim - ndims[layer.path]
            shift = jnp.mean(moved.astype(jnp.float32), axis=tuple(range(lead)))
            seen[layer.path].append(shift)
            correction = shift.reshape((1,) * lead + shift.shape).astype(moved.dtype)
            return product(x, kernel, *args, **kwargs) - correction

        return compute

    return Hooks(operands=operands, product=product)


def _mean_shifts(
    model: Any, ndims: dict[str, int], batches: Iterable[Any], call: Callable
) -> dict[str, jax.Array]:
    state, rebuild = hooks.functional(model)

    @jax.jit
    def observe(state: Any, batch: Any) -> dict[str, jax.Array]:
        seen: dict[str, list[jax.Array]] = {path: [] for path in ndims}
        call(hooks.attach(rebuild(state), _observing(ndims, seen)), batch)
        return {path: jnp.mean(jnp.stack(calls), axis=0) for path, calls in seen.items() if calls}

    total, count = sum_over_batches(functools.partial(observe, state), batches)
    return {path: shift / count for path, shift in total.items()}


def correct_bias(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = call_model,
) -> dict[str, jax.Array]:
    """Corrects the mean of every output channel for the error of its quantized kernel, in place.

    Layers with a bias (Conv, Linear, LinearGeneral) and layers whose output goes straight into a
    BatchNorm are corrected; others stay as they are. Run it once for given kernels and budgets,
    after calibration and after ``model.eval()``: a second run would correct as much again.

    Args:
      model: an STP model in evaluation mode; a Linen one with its variables.
      batches: inputs, each given to the model as its only argument; batches count equally.
      call: how to call the model on a batch otherwise.

    Returns:
      Layer path → the shift that was taken off, float32 of the bias's (or the channels') shape.

    Raises:
      ValueError: there is no batch, or one is empty or holds NaN or infinity; no layer can be
        corrected, a BatchNorm is in training mode, or a layer runs inside a scan or vmap, where its
        outputs cannot be seen.
      TypeError: batches is an array.
    """
    check_batches(batches)
    batches = list(sound_batches(batches))
    if not batches:
        raise ValueError("bias correction needs at least one batch of inputs")
    training = hooks.training_batch_norms(model)
    if training:
        raise ValueError(
            f"BatchNorm {training[0]!r} is in training mode and would not use its running mean; "
            "call model.eval() first"
        )
    layers = quantized_layers(model)
    followers = find_batch_norms(model, layers, batches[0], call)
    biases = {
        path: bias
        for path, quantized in layers.items()
        if quantized.layer.has_plain_product
        and (bias := hooks.get_variable(model, path, "bias")) is not None
    }
    ndims = {path: bias.ndim for path, bias in biases.items()}
    ndims |= {path: 1 for path in followers if path not in biases}
    if not ndims:
        raise ValueError("no quantized layer has a bias or goes straight into a BatchNorm")
    with outside_of_loops("outputs"):
        shifts = _mean_shifts(model, ndims, batches, call)
    for path, shift in shifts.items():
        if path in biases:
            bias = biases[path]
            hooks.set_variable(model, path, "bias", bias - shift.astype(bias.dtype))
        else:
            mean = hooks.get_variable(model, followers[path], "mean")
            assert mean is not None
            hooks.set_variable(model, followers[path], "mean", mean + shift.astype(mean.dtype))
    return shifts
