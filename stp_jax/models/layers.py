"""Layers shared by the models, with PyTorch's padding, initialisers and BatchNorm constants.

Models follow PyTorch's conventions so that published weights give the same numbers: padding is
explicit and symmetric (XLA's "SAME" pads a strided window on the other side), and BatchNorm has
epsilon 1e-5 and keeps 0.9 of its running statistics (PyTorch's momentum of 0.1).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax.models.small_maps import conv_general_dilated

# He et al., "Delving deep into rectifiers", ICCV 2015, eq. 14 (the fan-out form torchvision uses).
he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Uniform on ±1/√fan_in, the default of torch.nn.Linear: variance 1/(3·fan_in).
torch_uniform = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    rngs: nnx.Rngs,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    padding: str | None = None,
    dtype: Any = None,
) -> nnx.Conv:
    """Returns a square 2-D convolution, (N, H, W, Cin) → (N, ⌈H/stride⌉, ⌈W/stride⌉, Cout).

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: side of the window, odd.
      rngs: random streams for the initial weights.
      stride: step of the window along both axes.
      groups: number of channel groups; `in_features` makes it depthwise.
      use_bias: adds a bias per output channel (off where BatchNorm follows).
      padding: None puts (kernel_size − 1)/2 zeros on every side, as PyTorch's models do; "SAME" is
        TensorFlow's rule, which a strided window sees on the far sides only.
      dtype: type to compute in; parameters stay float32.
    """
    pad = (kernel_size - 1) // 2
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=padding or ((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=he_normal,
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )


def batch_norm(
    features: int,
    *,
    rngs: nnx.Rngs,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    dtype: Any = None,
) -> nnx.BatchNorm:
    """Returns BatchNorm over the last of (N, H, W, features), by default with PyTorch's constants.

    `momentum` is the share of the running statistics that a step keeps. Layers start in training
    mode; `model.eval()` switches every one to the running statistics.
    """
    return nnx.BatchNorm(features, momentum=momentum, epsilon=epsilon, dtype=dtype, rngs=rngs)


def linear(in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Any = None) -> nnx.Linear:
    """Returns a dense layer with bias, (…, in_features) → (…, out_features)."""
    return nnx.Linear(in_features, out_features, kernel_init=torch_uniform, dtype=dtype, rngs=rngs)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Averages (N, H, W, C) over the image to (N, C)."""
    return jnp.mean(x, axis=(1, 2))


def dropout(rate: float, *, rngs: nnx.Rngs) -> nnx.Dropout:
    """Returns dropout that draws from the stream "dropout", and keeps no stream at rate 0.

    Raises:
      ValueError: if the rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be in [0, 1), got {rate}")
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def apply(layers: Iterable[Any], x: jax.Array) -> jax.Array:
    """Applies one layer, or list of layers, after the other, as torch.nn.Sequential does."""
    for layer in layers:
        x = apply(layer, x) if isinstance(layer, nnx.List) else layer(x)
    return x
