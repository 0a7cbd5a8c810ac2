"""Vision transformer (Dosovitskiy et al., ICLR 2021), named as timm's.

ViT-S/16 (384 channels, 12 blocks, 6 heads) is the small model of Touvron et al. (DeiT, ICML 2021,
table 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stp_jax.models.layers import linear

_EPSILON = 1e-6  # of every LayerNorm, as in the authors' code
_truncated = nnx.initializers.truncated_normal(0.02)


def _dense(in_features: int, out_features: int, **options: Any) -> nnx.Linear:
    return nnx.Linear(in_features, out_features, kernel_init=_truncated, **options)


class PatchEmbed(nnx.Module):
    """Cuts the image into patches and projects each: a convolution with stride = window."""

    def __init__(self, in_channels: int, width: int, *, patch_size: int, **options: Any):
        """Builds the projection."""
        self.proj = nnx.Conv(
            in_channels,
            width,
            (patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            **options,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H·W/patch_size², width)."""
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for query, key and value, as in timm."""

    def __init__(self, width: int, *, heads: int, **options: Any):
        """Builds the projections for heads of width/heads channels."""
        self.heads = heads
        self.qkv = _dense(width, 3 * width, **options)
        self.proj = _dense(width, width, **options)
        self.attention_fn = nnx.dot_product_attention

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (N, T, width) to (N, T, width)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        y = self.attention_fn(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(y.reshape(batch, tokens, width))


class FeedForward(nnx.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, width: int, hidden: int, **options: Any):
        """Builds the layers."""
        self.fc1 = _dense(width, hidden, **options)
        self.fc2 = _dense(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, T, width) to (N, T, width)."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Attention and feed-forward layers, each after LayerNorm and with its input added."""

    def __init__(self, width: int, *, heads: int, expansion: int, **options: Any):
        """Builds the block."""
        self.norm1 = nnx.LayerNorm(width, epsilon=_EPSILON, **options)
        self.attn = Attention(width, heads=heads, **options)
        self.norm2 = nnx.LayerNorm(width, epsilon=_EPSILON, **options)
        self.mlp = FeedForward(width, expansion * width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (N, T, width) to (N, T, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Vision transformer with a class token and learned positions."""

    # The patch embedding is the first convolution (1.3 %), the head the last layer. Query, key and
    # value projections get budgets like the rest: they are 23 %, and as wide as the feed-forward
    # layers' inputs.
    exempt_layers = (r"patch_embed\.proj", "head")

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights.
          image_size: side of the square image; the positions are learned for it.
          patch_size: side of a patch.
          in_channels: channels of the image.
          width: channels of a token.
          depth: number of blocks.
          heads: attention heads.
          expansion: hidden channels of the feed-forward layers ÷ width.
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if patches do not tile the image or heads do not divide the width.
        """
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} must divide image_size {image_size}")
        if width % heads:
            raise ValueError(f"heads {heads} must divide width {width}")
        self.image_size = image_size
        options = {"rngs": rngs, "dtype": dtype}
        tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(in_channels, width, patch_size=patch_size, **options)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
        self.pos_embed = nnx.Param(_truncated(rngs.params(), (1, tokens, width), jnp.float32))
        self.blocks = nnx.List(
            [Block(width, heads=heads, expansion=expansion, **options) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, epsilon=_EPSILON, **options)
        self.head = linear(width, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, image_size, image_size, in_channels) to logits (N, num_classes)."""
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"the positions are for {self.image_size}² pixels, got {x.shape[1:3]}")
        x = self.patch_embed(x)
        token = self.cls_token[...].astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit_s16(**options: Any) -> VisionTransformer:
    """ViT-S/16 (timm's vit_small_patch16_224); options as for `VisionTransformer`."""
    return VisionTransformer(**options)
