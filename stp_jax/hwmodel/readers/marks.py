"""Marks in a jaxpr: which equations belong to which layer.

A layer's hook sees the shapes of one call, but how often that call runs (``scan``, ``vmap``,
``cond``) only the finished jaxpr says. JAX has no public annotation of equations, so this file, and
this file alone, leans on two things that it keeps through its transformations but does not promise:

* the name scopes of an equation (``eqn.source_info.name_stack``), in which the products of a layer
  are recognised as its own;
* ``checkpoint_name``, meant for rematerialisation, whose equation is batched by ``vmap`` with its
  operand: the growth of the result's and of the weights' size are rows and copies of the layer.

Should a release of JAX change either, every layer would be read as an unnamed product, or once
where it runs often: ``tests/hwmodel/readers`` would fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from stp_jax.hwmodel.network import Layer

# Marks differ between traces, since a jitted part of a model may come from JAX's cache.
_serials = itertools.count()
Role = Literal["input", "weights", "key", "value", "result"]


@dataclasses.dataclass
class Mark:
    """One call of a layer's function.

    Attributes:
      name: in the jaxpr.
      layers: that the call computes; two for an attention.
      result_size: elements of its result, as the hook saw it.
      weights_size: elements of its second operand then; 0 if it has no weights.
    """

    name: str
    layers: list[Layer]
    result_size: int = 0
    weights_size: int = 0

    def on_input(self, x: jax.Array) -> jax.Array:
        """The first operand, marked."""
        return checkpoint_name(x, self.name + "input")

    def on_cached(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The second operands of an attention's two products, marked."""
        return checkpoint_name(key, self.name + "key"), checkpoint_name(value, self.name + "value")

    def on_weights(self, weights: jax.Array) -> jax.Array:
        """The weights, marked."""
        self.weights_size = np.size(weights)
        return checkpoint_name(weights, self.name + "weights")

    def on_result(self, result: jax.Array) -> jax.Array:
        """The result, marked."""
        self.result_size = np.size(result)
        return checkpoint_name(result, self.name + "result")


class Marks:
    """The marks of one trace."""

    def __init__(self) -> None:
        """None yet."""
        self._marks: dict[str, Mark] = {}
        self._operands: dict[str, str] = {}

    @contextlib.contextmanager
    def scope(self) -> Iterator[Mark]:
        """A new mark, to which the equations traced within belong."""
        mark = Mark(f"stp#{next(_serials)}#", [])
        self._marks[mark.name] = mark
        with jax.named_scope(mark.name):
            yield mark

    def on_operand(self, name: str, weights: jax.Array) -> jax.Array:
        """Weights, marked: what multiplies them is the layer of that name."""
        mark = f"stp#{next(_serials)}#"
        self._operands[mark] = name
        return checkpoint_name(weights, mark)

    def operand_at(self, eqn: Any) -> str | None:
        """The layer whose weights a ``checkpoint_name`` equation marks so, if it does."""
        return self._operands.get(eqn.params["name"])

    def owns(self, eqn: Any) -> bool:
        """Whether an equation was traced in the scope of one of the marks."""
        scopes = re.findall(r"stp#\d+#", str(eqn.source_info.name_stack))
        return any(scope in self._marks for scope in scopes)

    def on_equation(self, eqn: Any) -> tuple[Mark, Role, int] | None:
        """Contents of a ``checkpoint_name`` equation: mark, what it is on, and that one's size.

        None for names that are not of these marks.
        """
        name, _, role = eqn.params["name"].rpartition("#")
        mark = self._marks.get(f"{name}#")
        if mark is None:
            return None
        return mark, cast(Role, role), math.prod(eqn.outvars[0].aval.shape)
