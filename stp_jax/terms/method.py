"""The record of a projection method: what a new one has to give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from stp_jax.terms.encodings import Encoding, EncodingRule, max_terms


class GroupRule(Protocol):
    """Few-term integers for groups of weights, all at once."""

    def __call__(
        self,
        groups: jax.Array,
        budget: jax.Array,
        importance: jax.Array | None,
        encoding: Encoding,
        bits: int,
        limit: int,
    ) -> jax.Array:
        """Integers of at most ``budget`` terms in each group.

        Args:
          groups: float32 ``[n, group_size, m]``, already clipped to the limit; n * m groups.
          budget: int32, traced: a scalar, or ``[n, 1, m]`` where groups have budgets of their own.
            At `max_budget` integers must be the rounded weights; see `few_terms`.
          importance: float32 weights of the squared errors, of the groups' shape, or None.
          encoding: how terms are counted.
          bits: width of the integers.
          limit: the largest magnitude, ``2**(bits - 1)`` or one less.

        Returns:
          int32 of the shape of groups.
        """


class ValueRule(Protocol):
    """Few-term integers, each on its own."""

    def __call__(self, q: jax.Array, terms: int, encoding: Encoding, bits: int) -> jax.Array:
        """float32 integers of the shape of the integers q (float32), of at most ``terms`` terms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionMethod:
    """A way to choose the terms that a group keeps.

    Attributes:
      groups: the rule for groups of weights.
      values: the same for integers on their own (activations); None applies ``groups`` to groups
        of one.
      takes: whether the method can project an encoding's terms.
      remedy: what the message says about encodings that it does not take.
      importance: whether it takes the weights' importance.
    """

    groups: GroupRule
    values: ValueRule | None = None
    takes: Callable[[EncodingRule], bool] = lambda rule: True
    remedy: str = ""
    importance: bool = True

    def limit_values(self, q: jax.Array, terms: int, encoding: Encoding, bits: int) -> jax.Array:
        """Every integer of q (float32, any shape) cut to at most ``terms`` terms, float32."""
        if self.values is not None:
            return self.values(q, terms, encoding, bits)
        alone, limit = q.reshape(1, 1, -1), 1 << (bits - 1)
        v = self.groups(alone, jnp.int32(terms), None, encoding, bits, limit)
        return v.reshape(q.shape).astype(jnp.float32)


def few_terms(
    groups: jax.Array,
    budget: jax.Array,
    encoding: Encoding,
    bits: int,
    project: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """``project(groups)``, or the rounded groups where the budget holds all terms of any values."""
    enough = budget >= groups.shape[1] * max_terms(encoding, bits)
    rounded = lambda groups: jnp.round(groups).astype(jnp.int32)  # noqa: E731
    if not budget.ndim:
        return jax.lax.cond(enough, rounded, project, groups)
    mixed = lambda groups: jnp.where(enough, rounded(groups), project(groups))  # noqa: E731
    return jax.lax.cond(jnp.all(enough), rounded, mixed, groups)
