"""Tensors between layers: who writes and reads them, and the room they need to stay on the chip.

Elementwise work between layers (biases, activation functions, pooling, normalisation, additions of
residual branches) belongs to the layer after which all its operands are there, and changes the
largest of them, of equals the latest, in place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from stp_jax.hwmodel.network import Layer

Parts = tuple[tuple[str, float], ...]  # layers that wrote an operand, each with its share of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """Where a layer's operands come from, and whether its output leaves the network.

    Attributes:
      inputs: the layers whose outputs it reads, each with its share of the elements read; what is
        missing from 1 comes from outside. A name alone stands for the whole input.
      operands: likewise of the second operand, for products of two activations.
      merged: the layers whose outputs, once this layer is done, are merged into another output by
        elementwise work, as a residual branch is by its addition.
      leaves: whether its output is a result of the network.

    Raises:
      TypeError: inputs or operands are neither a name nor pairs of a name and a share.
    """

    inputs: Parts | str = ()
    operands: Parts | str = ()
    merged: tuple[str, ...] | str = ()
    leaves: bool = False

    def __post_init__(self) -> None:
        """Spells out names that stand alone."""
        for name in ("inputs", "operands"):
            given = getattr(self, name)
            parts = ((given, 1.0),) if isinstance(given, str) else tuple(given)
            if not all(isinstance(part, tuple) and len(part) == 2 for part in parts):
                raise TypeError(
                    f"Links: {name} must be a name, or pairs of a name and its share, got {given!r}"
                )
            object.__setattr__(self, name, parts)
        merged = (self.merged,) if isinstance(self.merged, str) else tuple(self.merged)
        object.__setattr__(self, "merged", merged)

    @property
    def sources(self) -> tuple[Parts, Parts]:
        """Those of the inputs, and of the second operand."""
        return cast(Parts, self.inputs), cast(Parts, self.operands)


def check_links(layers: Sequence[Layer], links: Sequence[Links]) -> None:
    """Raises ValueError unless links fit the layers: one each, of names that come before."""
    if len(links) != len(layers):
        raise ValueError(
            f"a network of {len(layers)} layers needs one Links each, got {len(links)}"
        )
    before: set[str] = set()
    for layer, link in zip(layers, links, strict=True):
        if not isinstance(link, Links):
            raise TypeError(f"layer {layer.name!r}: links must be hwmodel.Links, got {link!r}")
        for parts in link.sources:
            _check_parts(layer.name, parts, before)
        before.add(layer.name)
        _check_names(layer.name, link.merged, before)


def _check_parts(reader: str, parts: Parts, before: set[str]) -> None:
    _check_names(reader, [name for name, _ in parts], before)
    shares = [share for _, share in parts]
    if any(not 0.0 < share <= 1.0 for share in shares) or sum(shares) > 1.0 + 1e-9:
        raise ValueError(
            f"layer {reader!r}: shares of an operand must be above 0 and at most 1 together, got "
            f"{parts}"
        )


def _check_names(reader: str, names: Iterable[str], before: set[str]) -> None:
    for name in names:
        if name not in before:
            raise ValueError(f"layer {reader!r} is linked to {name!r}, which is no layer before it")


def chain(layers: Sequence[Layer]) -> tuple[Links, ...]:
    """The links that a mere sequence of layers suggests.

    A layer reads the output of the one before it, and nothing else does, where its channels are a
    multiple of that one's filters (a dense layer may read what was flattened). Where they are not,
    its input comes from outside. What nobody reads leaves.
    """
    follows = [b.channels % a.filters == 0 for a, b in itertools.pairwise(layers)]
    read = [*follows, False]
    return tuple(
        Links(
            inputs=layers[i - 1].name if i and follows[i - 1] else (),
            leaves=not read[i],
        )
        for i in range(len(layers))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Layers that wrote an operand, arrays of shape (layers, most sources of a layer)."""

    index: np.ndarray  # integers
    share: np.ndarray  # of the operand's elements; 0 where a layer has fewer sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """The outputs of a network's layers, vectors of shape (layers,).

    Attributes:
      room: words that the buffer needs for an output to stay from its layer to its last reader,
        together with the outputs that take precedence in that time; infinite if nothing would be
        saved.
      leaves: whether the output is needed in DRAM as well.
      inputs: of the layers.
      operands: second ones, of products of two activations.
    """

    room: np.ndarray
    leaves: np.ndarray
    inputs: Sources
    operands: Sources


def tensors(layers: Sequence[Layer], links: Sequence[Links]) -> Tensors:
    """The tensors that the layers write, and the room that each needs."""
    position = {layer.name: i for i, layer in enumerate(layers)}
    words = np.array([layer.output_words for layer in layers], np.float64)
    last, saved = np.full(len(layers), -1), np.zeros(len(layers))
    for i, (layer, link) in enumerate(zip(layers, links, strict=True)):
        words_read = layer.input_words, layer.weight_words
        for parts, operand_words in zip(link.sources, words_read, strict=True):
            for name, share in parts:
                last[position[name]] = i
                saved[position[name]] += share * operand_words
        for name in link.merged:
            last[position[name]] = i
    # What no layer reads and no addition takes in is needed elsewhere.
    leaves = np.array([link.leaves for link in links]) | (last < 0)
    saved += np.where(leaves, 0.0, words)
    inputs, operands = zip(*(link.sources for link in links), strict=True)
    return Tensors(
        room=_room(words, last, saved),
        leaves=leaves,
        inputs=_sources(inputs, position),
        operands=_sources(operands, position),
    )


def _room(words: np.ndarray, last: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """Words of room that each output needs to stay.

    Outputs take precedence by the traffic that they save for the words and steps that they occupy.
    An output stays if it fits beside all that take precedence over it, whether these stay or not:
    so what stays always fits, and a larger buffer keeps all that a smaller one does.
    """
    first = np.arange(len(words))
    precedence = np.lexsort((first, words, -saved / (words * (last - first + 1.0).clip(1.0))))
    occupied, room = np.zeros(len(words)), np.full(len(words), np.inf)
    for i in precedence:
        if saved[i] > 0.0 and last[i] >= 0:
            occupied[i : last[i] + 1] += words[i]
            room[i] = occupied[i : last[i] + 1].max()
    return room


def _sources(parts: Sequence[Parts], position: dict[str, int]) -> Sources:
    most = max(map(len, parts))
    index, share = np.zeros((len(parts), most), np.int64), np.zeros((len(parts), most))
    for i, sources in enumerate(parts):
        for j, (name, part) in enumerate(sources):
            index[i, j], share[i, j] = position[name], part
    return Sources(index=index, share=share)
