"""Optimal projection: the least squared error over all values that fit a group's budget.

Why it needs no search for the NAF: let e(t) be the squared error of the best value with at most t
terms. For the NAF, e is convex in t at every real weight, so the best split of k terms over a group
takes the k largest of the marginal gains e(t-1) - e(t); and the best value with t terms is reached
from the one with t-1 by adding the power of two that is nearest to what is left. Matching pursuit
is therefore exact here: k times, the member that gains most takes its nearest power of two. Both
properties are checked exhaustively in the tests, and an encoding says that it has them by
``convex``. They fail for the others, which take a dynamic programme over the members of the group.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.codebook import few_term_values, nearest_values
from stp_jax.terms.encodings import ENCODINGS, Encoding, max_terms
from stp_jax.terms.method import ProjectionMethod, few_terms

# Above this, the member index would take too many of a gain's mantissa bits (see `_winner`).
_KEYED_GROUP_SIZE = 64


def nearest_power(r: jax.Array, top: float) -> jax.Array:
    """The nearest of 0, 1, 2, 4, …, top to each r >= 0 (float32; ties go up)."""
    # A value in [0.75, 1.5) * 2**e is nearest to 2**e: scale by 4/3 and keep the exponent bits.
    exponent = jax.lax.bitcast_convert_type(r * jnp.float32(4 / 3), jnp.int32) & 0x7F800000
    power = jnp.clip(jax.lax.bitcast_convert_type(exponent, jnp.float32), 1.0, top)
    return jnp.where(r < 0.5, jnp.float32(0), power)


def _next_term(r: jax.Array, w: jax.Array, bits: int, storable: bool) -> jax.Array:
    """The magnitude of the term that the residual r of the weight w takes next."""
    top = 2.0 ** (bits - 1)
    a = jnp.abs(r)
    if not storable or bits < 2:
        return nearest_power(a, top)
    # Values stop at top - 1, so ``top`` is no value of one term. Weights of 0.75 top and more,
    # whose nearest power it would be, step to top/2 first and from there to top minus a power of
    # two (64, then 112 = 128 - 16): the second step, here 48, is no power of two itself.
    half = 0.5 * top
    to_half = jnp.abs(a - half)
    second = (jnp.abs(w) >= 0.75 * top) & (to_half < 0.25 * top)
    power = nearest_power(jnp.where(second, to_half, a), half)
    return jnp.where(second, half - power, power)


def _winner(gain: jax.Array) -> jax.Array:
    """A mask over axis 1 of gain [n, g, m]: the first of the largest non-negative gains."""
    size = gain.shape[1]
    index = np.arange(size, dtype=np.int32)[None, :, None]
    if size <= _KEYED_GROUP_SIZE:
        # Floats >= 0 order as their bits do. The lowest bits hold the index, so that one maximum
        # finds gain and index; gains closer than 2**-17 (group size 64) of each other tie.
        low = (1 << (size - 1).bit_length()) - 1
        bits = jax.lax.bitcast_convert_type(gain, jnp.int32)
        key = (bits & ~low) | (low - index)
        return key == jnp.max(key, axis=1, keepdims=True)
    # Exact gains; of equal ones the lowest index wins, found as a minimum over the winners.
    best = jnp.max(gain, axis=1, keepdims=True)
    first = jnp.min(jnp.where(gain == best, index, size), axis=1, keepdims=True)
    return index == first


def pursue(
    w: jax.Array, importance: jax.Array | None, bits: int, storable: bool
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The step that spends one term in every group: from residual to (residual, gain).

    Args:
      w: groups of weights, float32 ``[n, g, m]``; the first residual.
      importance: of the squared errors, of the same shape, or None.
      bits: width of the integers.
      storable: whether values stop below ``2**(bits - 1)``, to fit a signed integer.
    """

    def step(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jnp.abs(r)
        term = _next_term(r, w, bits, storable)
        gain = term * (a + (a - term))  # a² - (a - term)², without the squares' cancellation
        if importance is not None:
            gain = gain * importance
        chosen = _winner(gain)
        nearer = jnp.where(r < 0, r + term, r - term)
        return jnp.where(chosen, nearer, r), jnp.where(chosen, gain, 0.0)

    return step


def _pursuit(w, budget, importance, encoding: Encoding, bits: int, storable: bool) -> jax.Array:
    """Matching pursuit: the group's best term, ``budget`` times."""
    step = pursue(w, importance, bits, storable)
    # At the largest budget rounding is all there is to do. The loop's condition says so, not a
    # branch around it: within one, XLA's loop took nearly twice as long on CPUs.
    enough = budget >= w.shape[1] * max_terms(encoding, bits)
    largest = jnp.max(jnp.where(enough, 0, budget))

    def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[0] < largest

    def spend(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        spent, residual = state
        nearer, _ = step(residual)
        if budget.ndim:  # groups whose budget is spent wait for the others
            nearer = jnp.where(spent < budget, nearer, residual)
        return spent + 1, nearer

    _, residual = jax.lax.while_loop(more, spend, (jnp.int32(0), w))
    # What is not left over is the sum of the terms, a whole number but for float32's rounding.
    return jnp.round(w - jnp.where(enough, 0.0, residual)).astype(jnp.int32)


def _dynamic_programme(
    w, budget, importance, encoding: Encoding, bits: int, limit: int
) -> jax.Array:
    """Least error by dynamic programming over the members of one row of groups, w [g, m].

    The budget is a scalar or ``[1, m]``.
    """
    most = max_terms(encoding, bits)
    size, lanes = w.shape
    states = size * most + 1  # terms that members so far may have spent
    choices = jnp.stack(
        [nearest_values(w, few_term_values(t, encoding, bits, limit)) for t in range(most + 1)], 1
    )  # [g, most + 1, m]
    errors = (choices - w[:, None]) ** 2
    if importance is not None:
        errors = errors * importance[:, None]

    def add_member(best, error):
        # best[j]: least error of the members so far with at most j terms. A member that takes t of
        # them leaves j - t to the others: row t of the options is best, moved by t. What would
        # leave fewer than none is out of the question, hence the infinite padding.
        padded = jnp.pad(best, ((most, 0), (0, 0)), constant_values=jnp.inf)
        options = jnp.stack(
            [padded[most - t : most - t + states] + error[t][None] for t in range(most + 1)]
        )
        return jnp.min(options, axis=0), jnp.argmin(options, axis=0).astype(jnp.int8)

    start = jnp.zeros((states, lanes), jnp.float32)
    _, taken = jax.lax.scan(add_member, start, errors)

    # Backwards: the last member's choice at the whole budget says what the others had left.
    def read_member(left, member):
        taken_here, choice = member
        terms = jnp.take_along_axis(taken_here, left[None], axis=0).astype(jnp.int32)
        value = jnp.take_along_axis(choice, terms, axis=0)
        return left - terms[0], value[0]

    left = jnp.broadcast_to(jnp.minimum(budget, states - 1).reshape(-1), (lanes,))
    _, values = jax.lax.scan(read_member, left, (taken, choices), reverse=True)
    return values.astype(jnp.int32)


def _project_groups(groups, budget, importance, encoding: Encoding, bits: int, limit: int):
    if ENCODINGS[encoding].convex:
        return _pursuit(groups, budget, importance, encoding, bits, limit < 1 << (bits - 1))

    def by_row(groups: jax.Array) -> jax.Array:
        # Row by row, since the programme's tables are much larger than the weights.
        own = budget if budget.ndim else None
        return jax.lax.map(
            lambda row: _dynamic_programme(
                row[0], budget if row[2] is None else row[2], row[1], encoding, bits, limit
            ),
            (groups, importance, own),
        )

    return few_terms(groups, budget, encoding, bits, by_row)


def _nearest_few_terms(q: jax.Array, terms: int, encoding: Encoding, bits: int) -> jax.Array:
    if not ENCODINGS[encoding].convex:
        return nearest_values(q, few_term_values(terms, encoding, bits))
    residual = q
    for _ in range(terms):  # pursuit with no one to compete for the terms
        term = nearest_power(jnp.abs(residual), 2.0 ** (bits - 1))
        residual = jnp.where(residual < 0, residual + term, residual - term)
    return q - residual


OPTIMAL = ProjectionMethod(groups=_project_groups, values=_nearest_few_terms)
