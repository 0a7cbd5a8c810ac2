"""Layers that a jaxpr executes, in order, each as often as it runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from stp_jax.hwmodel.network import Layer
from stp_jax.hwmodel.readers.links import OUTSIDE, LinkReader, Value, joined
from stp_jax.hwmodel.readers.marks import Mark, Marks, Role
from stp_jax.hwmodel.readers.products import convolution, product

_PASSING = ("transpose", "convert_element_type", "copy", "rev")  # the same values in another form
_UPDATES = {"dynamic_update_slice": 1, "scatter": 2}  # what is written into the first operand


def executed_layers(jaxpr: Jaxpr, marks: Marks) -> tuple[LinkReader, list[Value]]:
    """The marked layers of a jaxpr, and the products that no layer makes.

    Returns:
      The layers with what they read of each other, and the values of the jaxpr's results.

    Raises:
      ValueError: a layer in a ``while`` loop, or a product that is not modelled.
    """
    walk = _Walk(marks)
    walk.run(jaxpr, marked=False)
    return walk.reader, list(map(walk.value, jaxpr.outvars))


class _Walk:
    def __init__(self, marks: Marks) -> None:
        self.reader = LinkReader()
        self._marks = marks
        # By mark and role, size and value as the jaxpr has them.
        self._operands: dict[tuple[str, Role], tuple[int, Value]] = {}
        self._named: dict[Any, str] = {}  # variables that hold marked weights → their layer
        self._values: dict[Any, Value] = {}  # of variables that hold what layers wrote

    def value(self, operand: Any) -> Value:
        """Which layers wrote an operand; a literal is from outside."""
        return self._values.get(operand, OUTSIDE) if isinstance(operand, Var) else OUTSIDE

    def run(self, jaxpr: Jaxpr, *, marked: bool) -> None:
        """Reads layers in order; ``marked``: the jaxpr's own products belong to a marked layer."""
        for eqn in jaxpr.eqns:
            self._equation(eqn, marked or self._marks.owns(eqn))

    def _equation(self, eqn: Any, marked: bool) -> None:
        primitive, inner = eqn.primitive.name, _jaxprs(eqn.params)
        if primitive == "name":
            self._at_mark(eqn)
            return
        self._follow_names(eqn)
        if primitive == "scan":
            self._scan(eqn, marked)
        elif primitive == "cond":
            self._cond(eqn, marked)
        elif primitive == "while":
            self._while(eqn, inner, marked)
        elif primitive != "pallas_call" and len(inner) == 1 and _is_call(eqn, inner[0]):
            self._set(inner[0].invars, map(self.value, eqn.invars))
            self.run(inner[0], marked=marked)
            self._set(eqn.outvars, map(self.value, inner[0].outvars))
        elif marked or not self._unmarked(eqn):
            self._elementwise(eqn, marked)

    def _set(self, variables: Iterable[Any], values: Iterable[Value]) -> None:
        self._values.update(zip(variables, values, strict=True))

    def _elementwise(self, eqn: Any, marked: bool) -> None:
        """Values of the results of an equation that is no product."""
        values = list(map(self.value, eqn.invars))
        if eqn.primitive.name == "concatenate":
            sizes = [var.aval.size for var in eqn.invars]
            made = joined(zip(values, sizes, strict=True))
        elif eqn.primitive.name in _UPDATES:
            which = _UPDATES[eqn.primitive.name]
            new, size = eqn.invars[which].aval.size, eqn.outvars[0].aval.size
            made = joined([(values[which], new), (values[0], size - new)])
        elif marked:  # which the mark on the layer's result replaces
            made = OUTSIDE
        else:
            made = self.reader.merge(values)
        self._set(eqn.outvars, [made.within(var.aval.size) for var in eqn.outvars])

    def _scan(self, eqn: Any, marked: bool) -> None:
        """Each step anew, for what a step reads is what the one before it wrote."""
        jaxpr = eqn.params["jaxpr"].jaxpr
        of_carry = len(eqn.outvars) - _stacked(eqn.outvars, jaxpr.outvars)
        carried = len(eqn.invars) - _stacked(eqn.invars, jaxpr.invars)
        values = list(map(self.value, eqn.invars))
        consts, carry = values[: carried - of_carry], values[carried - of_carry : carried]
        xs = values[carried:]
        stacked: list[list[Value]] = []
        for _ in range(eqn.params["length"]):
            before = len(self.reader.layers)
            self._set(jaxpr.invars, [*consts, *carry, *xs])
            self.run(jaxpr, marked=marked)
            outs = list(map(self.value, jaxpr.outvars))
            carry = outs[:of_carry]
            stacked.append(outs[of_carry:])
            if len(self.reader.layers) == before:  # no layers: a further step adds nothing
                break
        count = len(eqn.outvars) - of_carry
        ys = [joined((step[i], step[i].size) for step in stacked) for i in range(count)]
        self._set(eqn.outvars, [*carry, *ys])

    def _cond(self, eqn: Any, marked: bool) -> None:
        """The branch with the most multiply-accumulates."""

        def take(branch: Jaxpr) -> list[Value]:
            self._set(branch.invars, map(self.value, eqn.invars[1:]))
            self.run(branch, marked=marked)
            return list(map(self.value, branch.outvars))

        branches = [functools.partial(take, closed.jaxpr) for closed in eqn.params["branches"]]
        self._set(eqn.outvars, self.reader.largest(branches))

    def _while(self, eqn: Any, inner: list[Jaxpr], marked: bool) -> None:
        before = len(self.reader.layers)
        for jaxpr in inner:
            self.run(jaxpr, marked=marked)
        if len(self.reader.layers) > before:
            names = ", ".join(layer.name for layer in self.reader.layers[before:])
            raise ValueError(f"{names}: runs in a while loop, whose number of steps is not known")
        self._elementwise(eqn, marked)

    def _at_mark(self, eqn: Any) -> None:
        """A layer stands where its result is marked, after its operands."""
        value = self.value(eqn.invars[0])
        self._set(eqn.outvars, [value])
        if (name := self._marks.operand_at(eqn)) is not None:
            self._named[eqn.outvars[0]] = name
            return
        found = self._marks.on_equation(eqn)
        if found is None:
            return
        mark, role, size = found
        if role == "result":
            self._set(eqn.outvars, [self._layers(mark, size)])
        else:
            self._operands[mark.name, role] = size, value

    def _layers(self, mark: Mark, size: int) -> Value:
        """Adds the layers of a mark whose result has so many elements; returns its value."""
        mapped = size // mark.result_size  # by vmap

        def operand(role: Role) -> tuple[int, Value]:
            return self._operands.get((mark.name, role), (mark.weights_size, OUTSIDE))

        copies = operand("weights")[0] // mark.weights_size if mark.weights_size else 1
        roles: tuple[Role, ...] = ("weights",) if mark.weights_size else ("key", "value")
        results = []
        for _ in range(copies):
            _, value = operand("input")
            for layer, role in zip(mark.layers, roles, strict=True):
                layer = _mapped(layer, mapped // copies)
                value = self.reader.layer(layer, value, operand(role)[1])
            results.append((value, value.size))
        return joined(results)

    def _name_of(self, operand: Any) -> str | None:
        """The layer whose marked weights an operand is; a literal is none."""
        return self._named.get(operand) if isinstance(operand, Var) else None

    def _follow_names(self, eqn: Any) -> None:
        """Names what an equation hands marked weights on to."""
        named = list(map(self._name_of, eqn.invars))
        if eqn.primitive.name in _PASSING and named[0] is not None:
            self._named[eqn.outvars[0]] = named[0]
        if not any(named):
            return
        for inner in _jaxprs(eqn.params):
            # A cond's branches do not take its first operand, the index.
            for var, name in zip(reversed(inner.invars), reversed(named), strict=False):
                if name is not None:
                    self._named[var] = name

    def _unmarked(self, eqn: Any) -> bool:
        """Adds a product that no layer makes; whether the equation is one."""
        layer = self._bare_product(eqn)
        if layer is None:
            return False
        lhs, rhs = map(self.value, eqn.invars[:2])
        self._set(eqn.outvars, [self.reader.layer(layer, lhs, rhs)])
        return True

    def _bare_product(self, eqn: Any) -> Layer | None:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            return None
        lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
        name = self._name_of(eqn.invars[1])
        if primitive == "dot_general":
            layer = product(name or "product", lhs, rhs, *params["dimension_numbers"])
            return layer if name else dataclasses.replace(layer, kind="matmul")
        if primitive == "conv_general_dilated":
            out = eqn.outvars[0].aval.shape
            return convolution(name or "convolution", lhs, rhs, out, **params)
        raise ValueError("products with ragged groups (jax.lax.ragged_dot) are not modelled")


def _mapped(layer: Layer, rows: int) -> Layer:
    """The layer, of which vmap executes so many with the same weights."""
    more = ("channels", "filters", "groups") if layer.kind == "matmul" else ("batch",)
    extents: dict[str, Any] = {name: rows * getattr(layer, name) for name in more}
    return dataclasses.replace(layer, **extents)


def _stacked(outer: Iterable[Any], inner: Iterable[Any]) -> int:
    """How many operands, or results, of a scan have an axis of steps.

    Its parameters say so too, by names that differ from one release of JAX to another.
    """
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))


def _is_call(eqn: Any, inner: Jaxpr) -> bool:
    """Whether an equation hands its operands to a jaxpr, and its results back, one by one."""
    operands, results = len(eqn.invars), len(eqn.outvars)
    return operands == len(inner.invars) and results == len(inner.outvars)


def _jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr))
    closed = (leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves)
    return [jaxpr for jaxpr in closed if isinstance(jaxpr, Jaxpr)]
