"""Decoder-only transformers on the array: prefill, decode, and the traffic of their KV cache.

A decoder of the Llama family (Touvron et al., arXiv:2302.13971) as matrix products. Prefill reads a
prompt in one call, so that every weight serves all its tokens; decode reads one token a sequence,
so that every weight and every cached key and value is fetched for that token alone. The cache is
what attention's products have as their second operand: `evaluate` charges its reads where it
charges theirs, and its writes as the outputs of the key and value projections.

With grouped-query attention (Ainslie et al., EMNLP 2023) the query heads that share keys and values
are rows of one product, so that the shared ones are fetched once.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from stp_jax.hwmodel.network import Layer, Network, dense, matmul
from stp_jax.hwmodel.report import Report
from stp_jax.hwmodel.tensors import Links

_CACHED = ("scores", "context")  # products whose second operand is the cache
_WRITING = ("key", "value")  # projections whose outputs are the cache
_EXTENTS = ("width", "depth", "heads", "kv_heads", "hidden", "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Extents of a decoder-only transformer with SwiGLU and grouped-query attention.

    Raises:
      ValueError: an extent is not a positive integer, or heads do not divide the width, or kv_heads
        the heads.
    """

    width: int  # channels of a token
    depth: int  # blocks
    heads: int  # query heads
    kv_heads: int  # key and value heads
    hidden: int  # channels of the feed-forward layers
    vocabulary: int

    def __post_init__(self) -> None:  # noqa: D105
        for name in _EXTENTS:
            extent = getattr(self, name)
            if isinstance(extent, bool) or not isinstance(extent, int | np.integer) or extent < 1:
                raise ValueError(f"{name} must be a positive integer, got {extent!r}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def cache_words_per_token(self) -> int:
        """Keys and values that one token of one sequence adds to the cache, in all blocks."""
        return 2 * self.depth * self.kv_heads * self.channels

    def step(self, *, tokens: int = 1, past: int = 0, batch: int = 1) -> Network:
        """The products of one call of the model.

        Args:
          tokens: of each sequence that the call reads: a prompt, or 1 to decode.
          past: tokens of each sequence that are in the cache already.
          batch: sequences.

        Returns:
          Layers named as `trace` names those of `stp_jax.models.decoder_lm`, so that the budgets
          and integer weights of such a model fit; the last layer is ``embed``. Scores of all
          tokens with all others are computed, the masked half too. Keys and values leave, for
          later calls read them.

        Raises:
          ValueError: tokens or batch are not positive integers, or past is a negative one.

        >>> tiny = Decoder(width=8, depth=1, heads=4, kv_heads=2, hidden=16, vocabulary=32)
        >>> [layer.name for layer in tiny.step(past=9)][3:5]
        ['blocks.0.attention.scores', 'blocks.0.attention.context']
        """
        for name, extent, least in (("tokens", tokens, 1), ("past", past, 0), ("batch", batch, 1)):
            if isinstance(extent, bool) or not isinstance(extent, int) or extent < least:
                raise ValueError(f"{name} must be an integer, {least} or more, got {extent!r}")
        rows, layers, links = batch * tokens, [], []
        for i in range(self.depth):
            layers += self._block(f"blocks.{i}", tokens, past, batch)
            before = f"blocks.{i - 1}.feed_forward.down" if i else ()
            links += _block_links(f"blocks.{i}", before, tokens / (past + tokens))
        layers.append(dense("embed", self.width, self.vocabulary, rows=rows))
        links.append(Links(inputs=f"blocks.{self.depth - 1}.feed_forward.down", leaves=True))
        name = "prefill" if tokens > 1 else "decode"
        return Network(tuple(layers), name=name, links=tuple(links))

    def _block(self, name: str, tokens: int, past: int, batch: int) -> list[Layer]:
        rows, length = batch * tokens, past + tokens
        shared, products = self.heads // self.kv_heads, batch * self.kv_heads
        kv = self.kv_heads * self.channels

        def layer(path: str, inputs: int, outputs: int) -> Layer:
            return dense(f"{name}.{path}", inputs, outputs, rows=rows)

        def product(path: str, reduction: int, columns: int) -> Layer:
            full = f"{name}.attention.{path}"
            return matmul(full, shared * tokens, reduction, columns, products=products)

        return [
            layer("attention.query", self.width, self.width),
            layer("attention.key", self.width, kv),
            layer("attention.value", self.width, kv),
            product("scores", self.channels, length),
            product("context", length, self.channels),
            layer("attention.out", self.width, self.width),
            layer("feed_forward.gate", self.width, self.hidden),
            layer("feed_forward.up", self.width, self.hidden),
            layer("feed_forward.down", self.hidden, self.width),
        ]


def _block_links(name: str, before: str | tuple[()], new: float) -> list[Links]:
    """Links of a block's layers; ``new`` is the share of this call's tokens in the cache."""
    attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
    return [
        Links(inputs=before),
        Links(inputs=before, leaves=True),
        Links(inputs=before, leaves=True),
        Links(inputs=f"{attention}.query", operands=((f"{attention}.key", new),)),
        Links(inputs=f"{attention}.scores", operands=((f"{attention}.value", new),)),
        Links(inputs=f"{attention}.context", merged=before),
        Links(inputs=f"{attention}.out"),
        Links(inputs=f"{attention}.out", merged=f"{feed_forward}.gate"),
        Links(inputs=f"{feed_forward}.up", merged=f"{attention}.out"),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCost:
    """What one token of one sequence costs, in the mean over a call's tokens.

    Attributes:
      cycles: of the array.
      weight_bytes: of weights, from DRAM.
      cache_read_bytes: of keys and values, from DRAM.
      cache_write_bytes: the same, to DRAM.
      other_bytes: activations and partial sums, from and to DRAM.
      energy_pj: by component, as in `Report`.
      node_nm: process node of the energies.
      basis: of the energies, as in `Report`.
    """

    cycles: float
    weight_bytes: float
    cache_read_bytes: float
    cache_write_bytes: float
    other_bytes: float
    energy_pj: dict[str, float]
    node_nm: float
    basis: str

    @property
    def dram_bytes(self) -> float:
        """All bytes to and from DRAM."""
        cache = self.cache_read_bytes + self.cache_write_bytes
        return self.weight_bytes + cache + self.other_bytes

    @property
    def total_energy_pj(self) -> float:
        """Energy of all components."""
        return sum(self.energy_pj.values())


def token_cost(report: Report) -> TokenCost:
    """The cost of a token, from the report of a network of `Decoder.step`.

    The keys and values that a prefill has just computed are charged as written to the cache and
    read from it again, as `evaluate` charges every layer's output and input. An activation buffer
    saves the second if it holds them.

    Raises:
      ValueError: the network is of another origin.
    """
    network = report.network
    if network.names[-1] != "embed" or len(network) % 9 != 1:
        raise ValueError(f"{network.name!r} is no network of hwmodel.Decoder.step")
    tokens = network.layers[-1].P
    ends = [name.rpartition(".")[2] for name in network.names]
    cached, writing = np.isin(ends, _CACHED), np.isin(ends, _WRITING)
    moved = {n: np.asarray(x, np.float64) for n, x in report.dram_operand_bytes.items()}
    operand, outputs = moved["filter"], moved["ofmap"]
    others = moved["ifmap"] + outputs + moved["psum"]
    written = outputs * writing
    return TokenCost(
        cycles=float(report.total_cycles) / tokens,
        weight_bytes=float(operand[~cached].sum()) / tokens,
        cache_read_bytes=float(operand[cached].sum()) / tokens,
        cache_write_bytes=float(written.sum()) / tokens,
        other_bytes=float((others - written).sum()) / tokens,
        energy_pj={k: float(np.sum(v)) / tokens for k, v in report.energy_pj.items()},
        node_nm=report.node_nm,
        basis=report.basis,
    )
