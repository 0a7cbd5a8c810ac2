"""Layers that a jaxpr executes, in order, each as often as it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from stp_jax.hwmodel.network import Layer
from stp_jax.hwmodel.readers.marks import Marks
from stp_jax.hwmodel.readers.products import convolution, product

_PASSING = ("transpose", "convert_element_type", "copy")  # the same values in another form


def executed_layers(jaxpr: Jaxpr, marks: Marks) -> list[Layer]:
    """The marked layers of a jaxpr, and the products that no layer makes.

    Raises:
      ValueError: a layer in a ``while`` loop, or a product that is not modelled.
    """
    return _Walk(marks).layers(jaxpr, marked=False)


class _Walk:
    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._weights: dict[str, int] = {}  # sizes by mark, as the jaxpr has them
        self._tables: dict[Any, str] = {}  # variables that hold an embedding → its name

    def layers(self, jaxpr: Jaxpr, *, marked: bool) -> list[Layer]:
        """Layers in order; ``marked``: the jaxpr's own products belong to a marked layer."""
        found: list[Layer] = []
        for eqn in jaxpr.eqns:
            found += self._equation(eqn, marked or self._marks.owns(eqn))
        return found

    def _equation(self, eqn: Any, marked: bool) -> list[Layer]:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive == "name":
            return self._at_mark(eqn)
        self._follow_tables(eqn)
        if primitive == "scan":
            return params["length"] * self.layers(params["jaxpr"].jaxpr, marked=marked)
        if primitive == "cond":
            branches = [self.layers(branch.jaxpr, marked=marked) for branch in params["branches"]]
            return max(branches, key=lambda layers: sum(layer.macs for layer in layers))
        if primitive == "pallas_call":
            return []
        inner = [layer for jaxpr in _jaxprs(params) for layer in self.layers(jaxpr, marked=marked)]
        if primitive == "while" and inner:
            names = ", ".join(layer.name for layer in inner)
            raise ValueError(f"{names}: runs in a while loop, whose number of steps is not known")
        return inner if marked else inner + self._unmarked(eqn)

    def _at_mark(self, eqn: Any) -> list[Layer]:
        """A layer stands where its result is marked, after its weights."""
        if (table := self._marks.table_at(eqn)) is not None:
            self._tables[eqn.outvars[0]] = table
            return []
        found = self._marks.on_equation(eqn)
        if found is None:
            return []
        mark, on_weights, size = found
        if on_weights:
            self._weights[mark.name] = size
            return []
        mapped = size // mark.result_size  # by vmap
        copies = 1
        if mark.weights_size:
            copies = self._weights.get(mark.name, mark.weights_size) // mark.weights_size
        return copies * [_mapped(layer, mapped // copies) for layer in mark.layers]

    def _table_in(self, operand: Any) -> str | None:
        """The embedding whose table an operand is; a literal is none."""
        return self._tables.get(operand) if isinstance(operand, Var) else None

    def _follow_tables(self, eqn: Any) -> None:
        """Names what an equation hands an embedding's table on to."""
        named = list(map(self._table_in, eqn.invars))
        if eqn.primitive.name in _PASSING and named[0] is not None:
            self._tables[eqn.outvars[0]] = named[0]
        if not any(named):
            return
        for inner in _jaxprs(eqn.params):
            # A cond's branches do not take its first operand, the index.
            for var, name in zip(reversed(inner.invars), reversed(named), strict=False):
                if name is not None:
                    self._tables[var] = name

    def _unmarked(self, eqn: Any) -> list[Layer]:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            return []
        lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
        if primitive == "dot_general":
            table = self._table_in(eqn.invars[1])
            layer = product(table or "product", lhs, rhs, *params["dimension_numbers"])
            return [layer if table else dataclasses.replace(layer, kind="matmul")]
        if primitive == "conv_general_dilated":
            return [convolution("convolution", lhs, rhs, eqn.outvars[0].aval.shape, **params)]
        raise ValueError("products with ragged groups (jax.lax.ragged_dot) are not modelled")


def _mapped(layer: Layer, rows: int) -> Layer:
    """The layer, of which vmap executes so many with the same weights."""
    more = ("channels", "filters", "groups") if layer.kind == "matmul" else ("batch",)
    extents: dict[str, Any] = {name: rows * getattr(layer, name) for name in more}
    return dataclasses.replace(layer, **extents)


def _jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr))
    closed = (leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves)
    return [jaxpr for jaxpr in closed if isinstance(jaxpr, Jaxpr)]
