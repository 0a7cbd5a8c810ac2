"""EfficientNet-Lite0 (Tan and Le, ICML 2019; the Lite variants of the authors' tpu repository).

Lite0 is EfficientNet-B0 without squeeze-and-excitation and with ReLU6 in place of swish, so that
it quantizes. Names are timm's; weights under the names of lukemelas/EfficientNet-PyTorch load as
well. Padding and BatchNorm constants are TensorFlow's, in which the weights were trained.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from stp_jax.models.layers import batch_norm, conv, dropout, global_average_pool, linear
from stp_jax.models.mobilenet import round_channels

# Table 1 of the paper: expansion, channels, blocks, stride of the first block, kernel.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_STEM, _HEAD = 32, 1280
_norm = functools.partial(batch_norm, momentum=0.99, epsilon=1e-3)  # the authors' constants

# lukemelas's names → timm's: outside the blocks, in the first block, in every other one.
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_OUTSIDE["_fc"] = "classifier"
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class DepthwiseSeparable(nnx.Module):
    """Depthwise convolution and linear 1×1: the block without expansion."""

    def __init__(
        self, in_features: int, features: int, *, kernel: int, stride: int, **options: Any
    ):
        """Builds the block: (N, H, W, in_features) → (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        self.adds = stride == 1 and in_features == features
        same = {"padding": "SAME", **options}
        self.conv_dw = conv(
            in_features, in_features, kernel, stride=stride, groups=in_features, **same
        )
        self.bn1 = _norm(in_features, **options)
        self.conv_pw = conv(in_features, features, 1, **same)
        self.bn2 = _norm(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        y = nnx.relu6(self.bn1(self.conv_dw(x)))
        y = self.bn2(self.conv_pw(y))
        return x + y if self.adds else y


class MBConv(nnx.Module):
    """Expansion by 1×1, depthwise convolution, linear 1×1 (Sandler et al., CVPR 2018)."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        **options: Any,
    ):
        """Builds the block: (N, H, W, in_features) → (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        self.adds = stride == 1 and in_features == features
        hidden = expansion * in_features
        same = {"padding": "SAME", **options}
        self.conv_pw = conv(in_features, hidden, 1, **same)
        self.bn1 = _norm(hidden, **options)
        self.conv_dw = conv(hidden, hidden, kernel, stride=stride, groups=hidden, **same)
        self.bn2 = _norm(hidden, **options)
        self.conv_pwl = conv(hidden, features, 1, **same)
        self.bn3 = _norm(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        y = nnx.relu6(self.bn1(self.conv_pw(x)))
        y = nnx.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.adds else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite0; `stem="small"` keeps small images' resolution in the first layer."""

    # As in `MobileNetV2`; the depthwise convolutions are 9.0 % of Lite0's multiply-accumulates.
    exempt_layers = ("conv_stem", r"blocks\..*\.conv_dw", "classifier")

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
          width_multiplier: factor on the blocks' widths; stem and head keep theirs in all Lites.
          dropout_rate: before the last layer (the authors train Lite0 with 0.2).
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
        stride = 2 if stem == "imagenet" else 1
        self.conv_stem = conv(in_channels, _STEM, 3, stride=stride, padding="SAME", **options)
        self.bn1 = _norm(_STEM, **options)
        features = _STEM
        stages = []
        for expansion, channels, blocks, first_stride, kernel in _STAGES:
            stage: list[nnx.Module] = []
            out = round_channels(channels * width_multiplier)
            for block in range(blocks):
                shape = {"kernel": kernel, "stride": first_stride if block == 0 else 1}
                stage.append(
                    DepthwiseSeparable(features, out, **shape, **options)
                    if expansion == 1
                    else MBConv(features, out, expansion=expansion, **shape, **options)
                )
                features = out
            stages.append(nnx.List(stage))
        self.blocks = nnx.List(stages)
        self.conv_head = conv(features, _HEAD, 1, padding="SAME", **options)
        self.bn2 = _norm(_HEAD, **options)
        self.dropout = drop
        self.classifier = linear(_HEAD, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, in_channels) to logits (N, num_classes)."""
        x = nnx.relu6(self.bn1(self.conv_stem(x)))
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        x = nnx.relu6(self.bn2(self.conv_head(x)))
        return self.classifier(self.dropout(global_average_pool(x)))

    def adapt_torch(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Translates names of lukemelas/EfficientNet-PyTorch to timm's; others stay as they are."""
        positions = [(s, b) for s, stage in enumerate(self.blocks) for b in range(len(stage))]

        def translate(name: str) -> str:
            in_block = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
            if in_block and int(in_block[1]) < len(positions):
                stage, block = positions[int(in_block[1])]
                layer = (_FIRST if stage == 0 else _OTHER).get(in_block[2], in_block[2])
                return f"blocks.{stage}.{block}.{layer}.{in_block[3]}"
            layer, _, rest = name.partition(".")
            return f"{_OUTSIDE.get(layer, layer)}.{rest}"

        if "_conv_stem.weight" not in state:
            return dict(state)
        return {translate(name): value for name, value in state.items()}


def efficientnet_lite0(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite0; options as for `EfficientNetLite`."""
    return EfficientNetLite(**options)
