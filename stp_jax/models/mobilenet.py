"""MobileNetV2 (Sandler et al., CVPR 2018, table 2), named as torchvision."""

from typing import Any

import jax
from flax import nnx

from stp_jax.models.layers import apply, batch_norm, conv, dropout, global_average_pool, linear

# Table 2: expansion, channels, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _HEAD = 32, 1280


def round_channels(channels: float, divisor: int = 8) -> int:
    """Rounds to the nearest multiple of `divisor` that is not more than 10 % below `channels`.

    The rule of the authors' code for other width multipliers.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _conv_bn_relu6(in_features: int, features: int, kernel: int, **options: Any) -> nnx.List:
    norm = {key: options[key] for key in ("rngs", "dtype")}
    return nnx.List(
        [conv(in_features, features, kernel, **options), batch_norm(features, **norm), nnx.relu6]
    )


class InvertedResidual(nnx.Module):
    """Expansion by 1×1, depthwise 3×3, linear 1×1; the input is added where shapes agree."""

    def __init__(
        self, in_features: int, features: int, *, stride: int, expansion: int, **options: Any
    ):
        """Builds the block: (N, H, W, in_features) → (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        self.adds = stride == 1 and in_features == features
        hidden = expansion * in_features
        expand = [] if expansion == 1 else [_conv_bn_relu6(in_features, hidden, 1, **options)]
        self.conv = nnx.List(
            [
                *expand,
                _conv_bn_relu6(hidden, hidden, 3, stride=stride, groups=hidden, **options),
                conv(hidden, features, 1, **options),
                batch_norm(features, **options),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        y = apply(self.conv, x)
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """MobileNetV2; `stem="small"` keeps the resolution of small images in the first layer."""

    # The first and the last layer keep all terms, as in `ResNet`, and the depthwise convolutions: a
    # filter of 3×3 has no other weight to make up for one that is rounded, and all of them are
    # 6.9 % of the multiply-accumulates.
    exempt_layers = (
        r"features\.0\.0",
        r"features\.1\.conv\.0\.0",  # the block without expansion
        r"features\.\d+\.conv\.1\.0",
        r"classifier\.1",
    )

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        stem: str = "imagenet",
        in_channels: int = 3,
        width_multiplier: float = 1.0,
        dropout_rate: float = 0.0,
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights and dropout.
          stem: "imagenet" (the first convolution has stride 2) or "small" (stride 1).
          in_channels: channels of the image.
          width_multiplier: factor on every width; the last one never shrinks (section 4).
          dropout_rate: before the last layer (torchvision trains with 0.2).
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if `stem` is neither of the two, the multiplier is not positive, or the rate
            is outside [0, 1).
        """
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem must be "imagenet" or "small", got {stem!r}')
        if not width_multiplier > 0:
            raise ValueError(f"width_multiplier must be positive, got {width_multiplier}")
        drop = dropout(dropout_rate, rngs=rngs)
        options = {"rngs": rngs, "dtype": dtype}
        features = round_channels(_STEM * width_multiplier)
        stride = 2 if stem == "imagenet" else 1
        layers: list[nnx.Pytree] = [
            _conv_bn_relu6(in_channels, features, 3, stride=stride, **options)
        ]
        for expansion, channels, blocks, first_stride in _STAGES:
            for block in range(blocks):
                out = round_channels(channels * width_multiplier)
                layers.append(
                    InvertedResidual(
                        features,
                        out,
                        stride=first_stride if block == 0 else 1,
                        expansion=expansion,
                        **options,
                    )
                )
                features = out
        head = round_channels(_HEAD * max(1.0, width_multiplier))
        self.features = nnx.List([*layers, _conv_bn_relu6(features, head, 1, **options)])
        self.classifier = nnx.List([drop, linear(head, num_classes, **options)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, in_channels) to logits (N, num_classes)."""
        return apply(self.classifier, global_average_pool(apply(self.features, x)))


def mobilenet_v2(**options: Any) -> MobileNetV2:
    """MobileNetV2; options as for `MobileNetV2`."""
    return MobileNetV2(**options)
