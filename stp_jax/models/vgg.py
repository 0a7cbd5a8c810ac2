"""VGG-16 with BatchNorm (Simonyan and Zisserman, ICLR 2015, configuration D), named as torchvision.

BatchNorm after each convolution is torchvision's `vgg16_bn`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax.models.layers import (
    apply,
    batch_norm,
    conv,
    dropout,
    global_average_pool,
    linear,
)

# Configuration D of table 1: (convolutions, channels ÷ 64) between poolings.
_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
_POOLED = 7  # side of the map that the first dense layer sees
_HIDDEN = 4096


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Halves (N, H, W, C) along height and width by the maximum of 2×2 windows."""
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


def _averaging_matrix(size: int, bins: int) -> np.ndarray:
    """(bins, size) rows that average ⌊i·size/bins⌋ … ⌈(i+1)·size/bins⌉ − 1."""
    edges, position = np.arange(bins + 1)[:, None] * size, np.arange(size)[None, :]
    inside = (position >= edges[:-1] // bins) & (position < -(-edges[1:] // bins))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """Averages (N, H, W, C) to (N, side, side, C) over PyTorch's adaptive bins."""
    if x.shape[1:3] == (side, side):
        return x
    rows, columns = (jnp.asarray(_averaging_matrix(n, side), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x)


class VGG(nnx.Module):
    """VGG-16 with BatchNorm.

    `head="imagenet"` is the published one: pooling to 7×7 and two dense layers of 4096.
    `head="small"` is global pooling and a single dense layer, the usual change for small images.
    """

    @property
    def exempt_layers(self) -> tuple[str, ...]:
        """The first and the last layer keep all terms, as in `ResNet`: 0.6 %.

        The hidden dense layers of the published head, with 86 % of the weights, do not.
        """
        return (r"features\.0", rf"classifier\.{len(self.classifier) - 1}")

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        head: str = "imagenet",
        in_channels: int = 3,
        width: int = 64,
        dropout_rate: float = 0.0,
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights and dropout.
          head: "imagenet" or "small".
          in_channels: channels of the image.
          width: channels of the first stage; 2, 4, 8 and 8 times as many follow.
          dropout_rate: after each hidden dense layer (0.5 in the paper, section 3.1).
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if `head` is neither of the two or the rate is outside [0, 1).
        """
        if head not in ("imagenet", "small"):
            raise ValueError(f'head must be "imagenet" or "small", got {head!r}')
        self.head = head
        drop = [dropout(dropout_rate, rngs=rngs) for _ in range(2)]
        options = {"rngs": rngs, "dtype": dtype}
        layers: list[Any] = []
        features = in_channels
        for convolutions, multiple in _STAGES:
            for _ in range(convolutions):
                layers += [
                    conv(features, multiple * width, 3, use_bias=True, **options),
                    batch_norm(multiple * width, **options),
                    nnx.relu,
                ]
                features = multiple * width
            layers.append(max_pool_2x2)
        self.features = nnx.List(layers)
        self.classifier = nnx.List(
            [linear(features, num_classes, **options)]
            if head == "small"
            else [
                linear(features * _POOLED**2, _HIDDEN, **options),
                nnx.relu,
                drop[0],
                linear(_HIDDEN, _HIDDEN, **options),
                nnx.relu,
                drop[1],
                linear(_HIDDEN, num_classes, **options),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, in_channels), at least 32×32, to logits (N, num_classes)."""
        if min(x.shape[1:3]) < 2 ** len(_STAGES):
            raise ValueError(f"VGG halves the image 5 times: at least 32×32, got {x.shape[1:3]}")
        x = apply(self.features, x)
        if self.head == "small":
            return apply(self.classifier, global_average_pool(x))
        x = adaptive_average_pool(x, _POOLED)
        # PyTorch flattens channels first, and so are the published dense weights ordered.
        return apply(self.classifier, x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def vgg16_bn(**options: Any) -> VGG:
    """VGG-16 with BatchNorm; options as for `VGG`."""
    return VGG(**options)
