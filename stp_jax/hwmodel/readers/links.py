"""Links between layers, as readers find them in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.readers.observe import Uses
from stp_jax.hwmodel.tensors import Links, Parts


@dataclasses.dataclass(frozen=True)
class Value:
    """What a tensor of a graph holds of the outputs of layers.

    Attributes:
      parts: shares by the number of the layer that wrote them; what is missing from 1 is from
        outside: inputs, parameters, constants.
      size: elements, those that were only repeated not counted.
    """

    parts: dict[int, float] = dataclasses.field(default_factory=dict)
    size: int = 0

    def within(self, size: int) -> Value:
        """After work that makes one tensor of so many elements of it, such as pooling."""
        return Value(self.parts, min(size, self.size)) if size else OUTSIDE


OUTSIDE = Value()


class LinkReader:
    """Follows tensors from layer to layer while a reader goes through a graph."""

    def __init__(self) -> None:
        """No layers yet."""
        self.layers: list[Layer] = []
        self._operands: list[tuple[Value, Value]] = []
        self._merged: list[tuple[int, int]] = []  # the later layer, and the output merged there

    def layer(self, layer: Layer, inputs: Value, operands: Value = OUTSIDE) -> Value:
        """Adds a layer with the values of its operands; returns that of its output."""
        self.layers.append(layer)
        self._operands.append((inputs, operands))
        return Value({len(self.layers) - 1: 1.0}, layer.output_words)

    def merge(self, values: Iterable[Value]) -> Value:
        """What elementwise work makes of its operands: the largest of them, the latest of equals.

        The others are read for the last time by this work, when the last of all is there.
        """
        found = [value for value in values if value.parts]
        if not found:
            return OUTSIDE
        carrier = max(found, key=lambda value: (value.size, max(value.parts)))
        others = {i for value in found for i in value.parts} - set(carrier.parts)
        if others:
            latest = max(*others, *carrier.parts)
            self._merged += [(latest, i) for i in sorted(others)]
        return carrier

    def largest(self, branches: Iterable[Callable[[], list[Value]]]) -> list[Value]:
        """Reads branches, of which the one with the most multiply-accumulates stays."""
        before, merged_before = len(self.layers), len(self._merged)
        read = []
        for branch in branches:
            results = branch()
            found = self.layers[before:], self._operands[before:], self._merged[merged_before:]
            del self.layers[before:], self._operands[before:], self._merged[merged_before:]
            read.append((found, results))
        (layers, operands, merged), results = max(
            read, key=lambda branch: sum(layer.macs for layer in branch[0][0])
        )
        self.layers += layers
        self._operands += operands
        self._merged += merged
        return results

    def network(self, results: Iterable[Value], name: str) -> Network:
        """The layers with their links; the n-th use of a layer's name ends in ``@n``."""
        uses = Uses()
        layers = [dataclasses.replace(x, name=uses.unique(x.name)) for x in self.layers]
        leaving = {i for value in results for i in value.parts}
        merged: dict[int, set[int]] = {}
        for later, i in self._merged:
            merged.setdefault(later, set()).add(i)

        def parts(value: Value) -> Parts:
            return tuple((layers[i].name, share) for i, share in sorted(value.parts.items()))

        links = [
            Links(
                inputs=parts(inputs),
                operands=parts(operands),
                merged=tuple(layers[m].name for m in sorted(merged.get(i, ()))),
                leaves=i in leaving,
            )
            for i, (inputs, operands) in enumerate(self._operands)
        ]
        return Network(tuple(layers), name=name, links=tuple(links))


def joined(values: Iterable[tuple[Value, int]]) -> Value:
    """A tensor put together from others, each with its number of elements."""
    values = list(values)
    total = sum(size for _, size in values)
    parts: dict[int, float] = {}
    for value, size in values:
        for i, share in value.parts.items() if size else ():
            parts[i] = min(parts.get(i, 0.0) + share * size / total, 1.0)
    return Value(parts, total)
