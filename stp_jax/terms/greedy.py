"""Greedy projection: term revealing (Kung, McDanel and Zhang, "Term Quantization", SC20).

A group's values are rounded and encoded, and its ``budget`` largest terms stay: by exponent, then
by index. So values are truncated, although the nearest value of few terms is often larger.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stp_jax.terms.encodings import Encoding, digit_planes, max_terms, num_digits
from stp_jax.terms.method import ProjectionMethod, few_terms


def _project_groups(groups, budget, importance, encoding: Encoding, bits: int, limit: int):
    """Term revealing where the budget is not enough for all terms; importance is never given."""
    reveal = lambda groups: _reveal_terms(groups, budget, encoding, bits, limit)  # noqa: E731
    return few_terms(groups, budget, encoding, bits, reveal)


def _reveal_terms(groups, budget, encoding: Encoding, bits: int, limit: int) -> jax.Array:
    """The largest terms of each group first, ties to the lower index."""
    top = 1 << (bits - 1)
    q = jnp.round(groups).astype(jnp.int32)
    planes = digit_planes(q, encoding, bits)

    # One exponent at a time, from the top: all members' terms of it compete for what the budget
    # has left, and the cumulative sum over the group serves the lower indices first.
    def take(position, state):
        value, left = state
        e = num_digits(encoding, bits) - 1 - position
        plus, minus = ((plane >> e) & 1 for plane in planes)
        present = plus | minus
        before = jnp.cumsum(present, axis=1) - present
        kept = jnp.where(before < left, plus - minus, 0)
        left = left - jnp.sum(jnp.abs(kept), axis=1, keepdims=True)
        return value + (kept << e), left

    left = jnp.broadcast_to(budget, (groups.shape[0], 1, groups.shape[2]))
    value, _ = jax.lax.fori_loop(0, num_digits(encoding, bits), take, (jnp.zeros_like(q), left))
    if limit < top:  # 127 truncated to its first term is 128; the nearest storable term is 64
        value = jnp.where(jnp.abs(value) == top, jnp.sign(value) * (top // 2), value)
    return value


def _largest_terms(q: jax.Array, terms: int, encoding: Encoding, bits: int) -> jax.Array:
    plus, minus = digit_planes(q.astype(jnp.int32), encoding, bits)
    kept = plus | minus
    for _ in range(terms, max_terms(encoding, bits)):  # as many as any value may have too many
        over = jax.lax.population_count(kept) > terms
        kept = jnp.where(over, kept & (kept - 1), kept)  # without its lowest term
    return ((plus & kept) - (minus & kept)).astype(jnp.float32)


GREEDY = ProjectionMethod(
    groups=_project_groups,
    values=_largest_terms,
    takes=lambda rule: rule.truncates,
    remedy=(
        "greedy cuts digits off, and what is left of a {encoding} number can need more of them "
        "(in booth4, 7 = 8 - 1 leaves 8 = 16 - 8): use method='optimal', or encoding {others}"
    ),
    importance=False,
)
