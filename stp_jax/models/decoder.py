"""Decoder-only language model of the Llama family (Touvron et al., arXiv:2302.13971, section 2.2).

RMSNorm before each block (Zhang and Sennrich, NeurIPS 2019), rotary positions (Su et al.,
arXiv:2104.09864), grouped-query attention (Ainslie et al., EMNLP 2023), SwiGLU (Shazeer,
arXiv:2002.05202), and the embedding's transpose as the last layer. `load_llama2c` reads the files
of Karpathy's llama2.c (version 0, float32).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_normal = nnx.initializers.normal(0.02)


class Cache(NamedTuple):
    """Keys and values of the tokens so far in one block, (N, context, kv_heads, width/heads)."""

    key: jax.Array
    value: jax.Array


def _dense(in_features: int, out_features: int, **options: Any) -> nnx.Linear:
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_init=_normal, **options)


def rotate(x: jax.Array, positions: jax.Array, *, base: float = 10000.0) -> jax.Array:
    """Rotary positions: channels 2i and 2i + 1 turn by position · base^(−2i/channels).

    Args:
      x: (N, T, heads, channels), an even number of channels.
      positions: (T,) of the tokens.
      base: of the angles.

    Returns:
      Of the shape and dtype of x.
    """
    channels = x.shape[-1]
    rates = base ** (-np.arange(0, channels, 2, dtype=np.float32) / channels)
    angles = positions.astype(jnp.float32)[None, :, None, None] * rates[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class GroupedAttention(nnx.Module):
    """Causal attention whose keys and values are shared by groups of query heads."""

    def __init__(self, width: int, *, heads: int, kv_heads: int, **options: Any):
        """Builds the four projections; heads have width/heads channels."""
        self.heads, self.kv_heads, self.channels = heads, kv_heads, width // heads
        self.query = _dense(width, width, **options)
        self.key = _dense(width, kv_heads * self.channels, **options)
        self.value = _dense(width, kv_heads * self.channels, **options)
        self.out = _dense(width, width, **options)
        self.attention_fn = nnx.dot_product_attention

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Maps tokens (N, T, width) to (N, T, width), and the cache to the one after them."""
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).reshape(batch, length, heads, self.channels)
            for layer, heads in (
                (self.query, self.heads),
                (self.key, self.kv_heads),
                (self.value, self.kv_heads),
            )
        )
        query, key = rotate(query, positions), rotate(key, positions)
        seen = positions
        if cache is not None:
            start = (0, positions[0], 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start),
                jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), start),
            )
            key, value = cache
            seen = jnp.arange(key.shape[1])
        mask = seen[None, :] <= positions[:, None]
        shared = self.heads // self.kv_heads
        y = self.attention_fn(
            query, jnp.repeat(key, shared, axis=2), jnp.repeat(value, shared, axis=2), mask=mask
        )
        return self.out(y.reshape(batch, length, -1)), cache


class SwiGLU(nnx.Module):
    """Gated feed-forward layer: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int, **options: Any):
        """Builds the three layers."""
        self.gate = _dense(width, hidden, **options)
        self.up = _dense(width, hidden, **options)
        self.down = _dense(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, T, width) to (N, T, width)."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nnx.Module):
    """Attention and feed-forward layer, each after RMSNorm and with its input added."""

    def __init__(self, width: int, *, heads: int, kv_heads: int, hidden: int, **options: Any):
        """Builds the block."""
        self.attention_norm = nnx.RMSNorm(width, epsilon=1e-5, **options)
        self.attention = GroupedAttention(width, heads=heads, kv_heads=kv_heads, **options)
        self.feed_forward_norm = nnx.RMSNorm(width, epsilon=1e-5, **options)
        self.feed_forward = SwiGLU(width, hidden, **options)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Maps tokens (N, T, width) and a cache to the same after the block."""
        y, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class DecoderLM(nnx.Module):
    """Decoder-only language model with tied embeddings."""

    # Every dense layer gets a budget. The embedding is read and, transposed, the last layer; it
    # stays float (`Rule.embeddings`).
    exempt_layers = ()

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        width: int = 64,
        depth: int = 5,
        heads: int = 8,
        kv_heads: int = 4,
        hidden: int = 172,
        context: int = 512,
        dtype: Any = None,
    ):
        """Builds the network; the defaults are the sizes of llama2.c's stories260K.

        Args:
          num_classes: size of the vocabulary.
          rngs: random streams for the initial weights.
          width: channels of a token.
          depth: number of blocks.
          heads: query heads, of width/heads channels each.
          kv_heads: key and value heads; they divide the query heads.
          hidden: channels of the feed-forward layers.
          context: tokens that a cache holds.
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: a size is not positive, heads do not divide the width into an even number of
            channels, or kv_heads do not divide heads.
        """
        sizes = {"width": width, "depth": depth, "hidden": hidden, "context": context}
        for name, size in {**sizes, "heads": heads, "kv_heads": kv_heads}.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if width % (2 * heads):
            raise ValueError(f"heads {heads} must divide width {width} into an even number")
        if heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}")
        self.context = context
        options = {"rngs": rngs, "dtype": dtype}
        self.embed = nnx.Embed(num_classes, width, embedding_init=_normal, **options)
        self.blocks = nnx.List(
            [
                DecoderBlock(width, heads=heads, kv_heads=kv_heads, hidden=hidden, **options)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 tokens (N, T) to logits (N, T, num_classes) of each next token."""
        return self._run(tokens, jnp.arange(tokens.shape[1]), [None] * len(self.blocks))[0]

    def empty_cache(self, batch: int) -> list[Cache]:
        """A cache of zeros for every block."""
        dtype = self.embed.dtype or jnp.float32
        attention = self.blocks[0].attention
        shape = (batch, self.context, attention.kv_heads, attention.channels)
        return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.blocks]

    def continue_from(
        self, tokens: jax.Array, caches: list[Cache], position: jax.typing.ArrayLike
    ) -> tuple[jax.Array, list[Cache]]:
        """Maps tokens (N, T) behind ``position`` earlier ones to logits and the caches after them.

        A prompt is read in one call (prefill), then each new token in one of T = 1 (decode). The
        caller keeps position + T within the context; ``position`` may be traced.
        """
        positions = jnp.asarray(position, jnp.int32) + jnp.arange(tokens.shape[1])
        return self._run(tokens, positions, caches)

    def _run(self, tokens: jax.Array, positions: jax.Array, caches: list) -> tuple[jax.Array, list]:
        x, after = self.embed(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, positions, cache)
            after.append(cache)
        return self.embed.attend(self.norm(x)), after


def generate(
    model: DecoderLM,
    prompt: jax.Array,
    steps: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts token by token, with a cache of keys and values.

    Args:
      model: a `DecoderLM`, float or quantized.
      prompt: int32 (N, T), T at least 1.
      steps: tokens to add.
      temperature: of the softmax that is drawn from; 0 takes the likeliest token.
      key: of the draws; needed above temperature 0.

    Returns:
      int32 (N, T + steps).

    Raises:
      ValueError: prompt and steps exceed the context, a draw lacks its key, or the temperature is
        negative.
    """
    length = prompt.shape[1]
    if not 1 <= length <= length + steps <= model.context:
        raise ValueError(
            f"a prompt of {length} and {steps} more tokens do not fit a context of {model.context}"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError("temperature must be 0, or positive and come with a key")
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(steps, 1))

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits[:, -1] / temperature).astype(jnp.int32)

    @nnx.jit
    def run(model: DecoderLM, prompt: jax.Array) -> jax.Array:
        logits, caches = model.continue_from(prompt, model.empty_cache(len(prompt)), 0)
        first = choose(logits, keys[0])
        graphdef, state = nnx.split(model)

        def step(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
            token, caches = carry
            position, key = inputs
            whole = nnx.merge(graphdef, state)
            logits, caches = whole.continue_from(token[:, None], caches, position)
            token = choose(logits, key)
            return (token, caches), token

        positions = length + jnp.arange(steps - 1)
        _, rest = jax.lax.scan(step, (first, caches), (positions, keys[1:]))
        return jnp.concatenate([prompt, first[:, None], rest.T.astype(prompt.dtype)], axis=1)

    return run(model, prompt) if steps else prompt


def load_llama2c(path: str | Path) -> DecoderLM:
    """The model of a llama2.c file (``.bin``, version 0: seven int32 sizes, then float32 weights).

    Raises:
      ValueError: there is no such file, its sizes are no model's, or its length is not theirs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    length = os.path.getsize(path)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(28), "<i4")
        if len(header) < 7:
            raise ValueError(f"{path} is too short for a llama2.c file")
        width, hidden, depth, heads, kv_heads, vocabulary, context = map(int, header)
        sizes = (width, hidden, depth, heads, kv_heads, abs(vocabulary), context)
        if min(sizes) < 1 or width % (2 * heads) or heads % kv_heads:
            raise ValueError(f"{path} is no llama2.c file of version 0: its sizes are {sizes}")
        kv = width // heads * kv_heads
        # PyTorch's (out, in) kernels, all blocks of a kind together.
        shapes = {
            "embed": (abs(vocabulary), width),
            "attention_norm": (depth, width),
            "query": (depth, width, width),
            "key": (depth, kv, width),
            "value": (depth, kv, width),
            "out": (depth, width, width),
            "feed_forward_norm": (depth, width),
            "gate": (depth, hidden, width),
            "down": (depth, width, hidden),
            "up": (depth, hidden, width),
            "norm": (width,),
            "rotary": (2, context, width // heads // 2),  # angles, which follow from the sizes
        }
        if vocabulary < 0:
            raise ValueError(f"{path} has a last layer of its own, not the embedding's transpose")
        expected = 28 + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
        if length != expected:
            raise ValueError(f"{path} has {length} bytes, where its sizes {sizes} ask {expected}")
        weights = {
            name: np.fromfile(file, "<f4", int(np.prod(shape))).reshape(shape)
            for name, shape in shapes.items()
        }
    model = DecoderLM(
        num_classes=vocabulary,
        rngs=nnx.Rngs(0),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        context=context,
    )

    def assign(variable: Any, value: np.ndarray) -> None:
        variable[...] = jnp.asarray(value)

    assign(model.embed.embedding, weights["embed"])
    assign(model.norm.scale, weights["norm"])
    for i, block in enumerate(model.blocks):
        assign(block.attention_norm.scale, weights["attention_norm"][i])
        assign(block.feed_forward_norm.scale, weights["feed_forward_norm"][i])
        for module, names in (
            (block.attention, ("query", "key", "value", "out")),
            (block.feed_forward, ("gate", "up", "down")),
        ):
            for name in names:
                assign(getattr(module, name).kernel, weights[name][i].T)
    return model


def decoder_lm(**options: Any) -> DecoderLM:
    """Decoder-only language model of the Llama family; options as for `DecoderLM`."""
    return DecoderLM(**options)
