"""Residual networks of basic blocks (He et al., "Deep residual learning", CVPR 2016).

`ResNet` is the ImageNet family of section 4.1 (ResNet-18 and -34: shortcuts by projection where
the shape changes, option B); `CifarResNet` is the CIFAR-10 family of section 4.2 (6n+2 layers,
shortcuts without weights, option A). Attributes carry the names of torchvision and of
akamaster/pytorch_resnet_cifar10, so that `load_torch` maps published weights by path alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax.models.layers import batch_norm, conv, global_average_pool, linear


def subsample_and_pad(x: jax.Array, *, stride: int, features: int) -> jax.Array:
    """Option-A shortcut: strided slice and zero channels, no weights (He et al., section 4.1).

    Args:
      x: (N, H, W, C).
      stride: step of the slice along height and width.
      features: channels of the result, at least C; the new ones are zero, half on each side.

    Returns:
      (N, ⌈H/stride⌉, ⌈W/stride⌉, features).
    """
    extra = features - x.shape[-1]
    return jnp.pad(
        x[:, ::stride, ::stride, :], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2))
    )


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut around them.

    Where stride or width change, the shortcut is a strided 1×1 convolution with BatchNorm
    (`projection=True`, option B) or a strided slice padded with zero channels (option A).
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        projection: bool,
        rngs: nnx.Rngs,
        dtype: Any = None,
    ):
        """Builds the block: (N, H, W, in_features) → (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        self.features, self.stride = features, stride
        self.conv1 = conv(in_features, features, 3, stride=stride, rngs=rngs, dtype=dtype)
        self.bn1 = batch_norm(features, rngs=rngs, dtype=dtype)
        self.conv2 = conv(features, features, 3, rngs=rngs, dtype=dtype)
        self.bn2 = batch_norm(features, rngs=rngs, dtype=dtype)
        self.reshapes = stride != 1 or in_features != features
        if self.reshapes and projection:
            self.downsample = nnx.List(
                [
                    conv(in_features, features, 1, stride=stride, rngs=rngs, dtype=dtype),
                    batch_norm(features, rngs=rngs, dtype=dtype),
                ]
            )

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Brings the block's input to the shape of its output."""
        if not self.reshapes:
            return x
        if hasattr(self, "downsample"):
            project, normalise = self.downsample
            return normalise(project(x))
        return subsample_and_pad(x, stride=self.stride, features=self.features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


def _stage(
    in_features: int, features: int, blocks: int, *, stride: int, **options: Any
) -> nnx.List[BasicBlock]:
    """A run of blocks at one resolution; the first one changes stride and width."""
    return nnx.List(
        [
            BasicBlock(
                in_features if i == 0 else features,
                features,
                stride=stride if i == 0 else 1,
                **options,
            )
            for i in range(blocks)
        ]
    )


class ResNet(nnx.Module):
    """ImageNet ResNet of basic blocks in four stages (He et al., table 1), named as torchvision.

    `stem="imagenet"` is the 7×7/2 convolution and 3×3/2 max pooling for 224×224 images;
    `stem="small"` is one 3×3/1 convolution, the usual change for images of 32×32 and below.
    """

    # Layers that keep all terms. The first convolution sees three channels, so that groups of eight
    # would be ragged at every window position, and everything after it sees its errors; the errors
    # of the last layer reach the decision unfiltered. 6.5 % of ResNet-18's multiply-accumulates at
    # 224×224 and 1000 classes (`hwmodel.trace`, as all shares at this attribute of a model).
    exempt_layers = ("conv1", "fc")

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        stem: str = "imagenet",
        in_channels: int = 3,
        width: int = 64,
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          blocks: basic blocks in each stage.
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights.
          stem: "imagenet" or "small".
          in_channels: channels of the image.
          width: channels of the first stage; each later one doubles them.
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if `stem` is neither of the two.
        """
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem must be "imagenet" or "small", got {stem!r}')
        self.stem = stem
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        options = {"rngs": rngs, "dtype": dtype}
        self.conv1 = conv(in_channels, width, kernel, stride=stride, **options)
        self.bn1 = batch_norm(width, **options)
        options = {"projection": True, **options}
        self.layer1 = _stage(width, width, blocks[0], stride=1, **options)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2, **options)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2, **options)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2, **options)
        self.fc = linear(8 * width, num_classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, in_channels) to logits (N, num_classes)."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.fc(global_average_pool(x))


class CifarResNet(nnx.Module):
    """CIFAR-10 ResNet of 6n+2 layers (He et al., section 4.2), named as akamaster's PyTorch one."""

    exempt_layers = ("conv1", "linear")  # the first and the last, as in `ResNet`

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        in_channels: int = 3,
        width: int = 16,
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          blocks: basic blocks in each of the three stages (n).
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights.
          in_channels: channels of the image.
          width: channels of the first stage; each later one doubles them.
          dtype: type to compute in; parameters stay float32.
        """
        options = {"rngs": rngs, "dtype": dtype}
        self.conv1 = conv(in_channels, width, 3, **options)
        self.bn1 = batch_norm(width, **options)
        options = {"projection": False, **options}
        self.layer1 = _stage(width, width, blocks, stride=1, **options)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2, **options)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2, **options)
        self.linear = linear(4 * width, num_classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, in_channels) to logits (N, num_classes)."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
        return self.linear(global_average_pool(x))


def resnet18(**options: Any) -> ResNet:
    """ResNet-18 (He et al., table 1); options as for `ResNet`."""
    return ResNet((2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34 (He et al., table 1); options as for `ResNet`."""
    return ResNet((3, 4, 6, 3), **options)


def resnet20(**options: Any) -> CifarResNet:
    """CIFAR ResNet-20, n = 3 (He et al., table 6); options as for `CifarResNet`."""
    return CifarResNet(3, **options)


def resnet32(**options: Any) -> CifarResNet:
    """CIFAR ResNet-32, n = 5 (He et al., table 6); options as for `CifarResNet`."""
    return CifarResNet(5, **options)


def resnet44(**options: Any) -> CifarResNet:
    """CIFAR ResNet-44, n = 7 (He et al., table 6); options as for `CifarResNet`."""
    return CifarResNet(7, **options)


def resnet56(**options: Any) -> CifarResNet:
    """CIFAR ResNet-56, n = 9 (He et al., table 6); options as for `CifarResNet`."""
    return CifarResNet(9, **options)
