"""BatchNorm folded into the layer before it.

In evaluation a BatchNorm is one multiplication and one addition per channel. Both go into the
kernel and the bias of the layer whose output it takes (Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, sec. 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from stp_jax import hooks
from stp_jax.quant.bias import find_batch_norms
from stp_jax.quant.calibration import call_model
from stp_jax.quant.layers import find_layers

Model = TypeVar("Model", bound=nnx.Module)


def fold_batch_norm(
    model: Model, example: Any, *, call: Callable[[Any, Any], Any] = call_model
) -> Model:
    """A float model without BatchNorm that computes what the given one does in evaluation.

    Fold after float training and before `stp_jax.quantize`: the running statistics are used, and
    are not updated any more.

    Args:
      model: an NNX model; it may be abstract, inside ``nnx.eval_shape``. It is not changed.
      example: its input, of which only shape and dtype are used.
      call: how to call the model on it otherwise.

    Returns:
      A copy in which every convolution or dense layer that a BatchNorm follows has that
      BatchNorm's factor in its kernel, and a bias; the BatchNorm's place is taken by an identity.
      The output of such a layer must go nowhere else.

    Raises:
      TypeError: the model is no NNX module.
      ValueError: the model is quantized, no BatchNorm follows a layer, one follows several layers
        or several follow one.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"fold_batch_norm takes an nnx.Module, got {type(model).__name__}")
    if find_layers(model):
        raise ValueError("the model is quantized; fold its BatchNorms before stp_jax.quantize")
    folded = nnx.clone(model)
    layers = {
        path: layer
        for path, layer in hooks.kernel_layers(folded).items()
        if layer.kind in ("conv", "dense")
    }
    probe = nnx.clone(model)
    probe.eval()
    for layer in layers.values():
        hooks.set_bias(probe, layer, None)  # so that BatchNorms take the very products
    followers = find_batch_norms(probe, layers, example, call)
    if not followers:
        raise ValueError("no BatchNorm takes the output of a convolution or dense layer")
    if len(set(followers.values())) < len(followers):
        raise ValueError("a BatchNorm follows several layers, which cannot all take it in")
    for path, norm in followers.items():
        factor, summand = hooks.remove_batch_norm(folded, norm)
        kernel = hooks.get_variable(folded, path, "kernel")
        bias = hooks.get_variable(folded, path, "bias")
        assert kernel is not None
        hooks.set_variable(folded, path, "kernel", _per_filter(kernel, factor))
        summand = summand if bias is None else summand + bias * factor
        hooks.set_bias(folded, layers[path], summand)
    return folded


def _per_filter(kernel: Any, factor: Any) -> Any:
    """A kernel whose last axis, the filters, is multiplied by a factor each."""
    return (kernel * jnp.reshape(factor, (1,) * (kernel.ndim - 1) + (-1,))).astype(kernel.dtype)
