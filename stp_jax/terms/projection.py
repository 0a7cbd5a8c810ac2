"""Group-budget projection: each group of weights keeps at most k power-of-two terms in all.

The budget is structured as in STP (Huang et al., IEEE TCAD 42(1), 2023): g weights that follow each
other along the reduction axis share k terms, so that a group takes k cycles of one processing
element whatever its values are.

``greedy`` is term revealing (Kung, McDanel and Zhang, SC20): it truncates the group's terms.
``optimal`` is the least squared error over every choice of values that fits the budget.

Why ``optimal`` needs no search for the NAF: let e(t) be the squared error of the best value with at
most t terms. For the NAF, e is convex in t at every real weight, so the best split of k terms over
a group takes the k largest of the marginal gains e(t-1) - e(t); and the best value with t terms is
reached from the one with t-1 by adding the power of two that is nearest to what is left. Matching
pursuit is therefore exact here: k times, the member that gains most takes its nearest power of two.
Both properties are checked exhaustively in the tests. They fail for the other encodings, which
take a dynamic programme over the members of the group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.codebook import few_term_values
from stp_jax.terms.encodings import (
    Encoding,
    as_wide_integers,
    check_encoding,
    digit_planes,
    max_terms,
    num_digits,
)

Method = Literal["optimal", "greedy"]
METHODS: tuple[str, ...] = get_args(Method)

# Above this, the member index would take too many of a gain's mantissa bits (see `_winner`).
_KEYED_GROUP_SIZE = 64
# Below this many trailing elements, a group is laid out across instead: lanes want long rows.
_MIN_LANES = 32


def check_group_size(group_size: object) -> None:
    """Raises ValueError unless a group's size is a positive integer."""
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, got {group_size!r}")


def max_budget(group_size: int, encoding: Encoding = "naf", bits: int = 8) -> int:
    """The budget at which a group of any values keeps all its terms.

    Raises:
      ValueError: group_size is no positive integer, or encoding or bits do not exist.
    """
    check_group_size(group_size)
    return group_size * max_terms(encoding, bits)


def check_budget(budget: object, group_size: int, encoding: Encoding, bits: int) -> None:
    """Raises unless a concrete budget is an integer in [0, max_budget]; traced ones pass."""
    if isinstance(budget, jax.core.Tracer):
        if not jnp.issubdtype(budget.dtype, jnp.integer) or budget.ndim:
            raise TypeError(
                f"a budget is one integer, got {budget.dtype}{budget.shape}; "
                "use vmap for several budgets"
            )
        return
    value = np.asarray(budget)
    if value.ndim or not np.issubdtype(value.dtype, np.integer):
        raise TypeError(f"a budget is one integer, got {budget!r}; use vmap for several budgets")
    top = max_budget(group_size, encoding, bits)
    if not 0 <= int(value) <= top:
        raise ValueError(
            f"budget {int(value)} is outside [0, {top}]: a group of {group_size} {encoding} values "
            f"of {bits} bits has at most {top} terms"
        )


def check_method(method: object, encoding: Encoding) -> None:
    """Raises ValueError unless there is such a method, and for this encoding."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "greedy" and encoding == "booth4":
        raise ValueError(
            "greedy cuts digits off, and what is left of a booth4 number can need more of them "
            "(7 = 8 - 1 leaves 8 = 16 - 8): use method='optimal', or encoding hese, naf or binary"
        )


def _check_limit(limit: int | None, bits: int) -> None:
    top = 1 << (bits - 1)
    if limit not in (None, top - 1, top):
        raise ValueError(f"limit must be {top - 1} (fits a signed int{bits}) or {top}, got {limit}")


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
    # Without the value ``top``, weights of 0.75 top and more step to top/2 first and from there to
    # top minus a power of two, so the second step is no power of two itself.
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
    best = jnp.max(gain, axis=1, keepdims=True)
    first = jnp.min(jnp.where(gain == best, index, size), axis=1, keepdims=True)
    return index == first


def _pursue(
    w: jax.Array, importance: jax.Array | None, bits: int, storable: bool
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The step that spends one term in every group: from residual to (residual, gain)."""

    def step(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jnp.abs(r)
        term = _next_term(r, w, bits, storable)
        gain = term * (a + (a - term))
        if importance is not None:
            gain = gain * importance
        chosen = _winner(gain)
        nearer = jnp.where(r < 0, r + term, r - term)
        return jnp.where(chosen, nearer, r), jnp.where(chosen, gain, 0.0)

    return step


def _optimal_naf(w, budget, importance, bits: int, storable: bool) -> jax.Array:
    step = _pursue(w, importance, bits, storable)
    every = max_budget(w.shape[1], "naf", bits)  # at this budget, rounding is all there is to do

    def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < budget) & (budget < every)

    def spend(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, step(state[1])[0]

    _, residual = jax.lax.while_loop(more, spend, (jnp.int32(0), w))
    return jnp.round(w - jnp.where(budget < every, residual, 0.0)).astype(jnp.int32)


def nearest_values(w: jax.Array, values: np.ndarray) -> jax.Array:
    """The nearest of the sorted values to each w, the lower one on ties."""
    if len(values) == 1:
        return jnp.full(w.shape, values[0], jnp.float32)
    table = jnp.asarray(values, jnp.float32)
    above = jnp.clip(jnp.searchsorted(table, w), 1, len(values) - 1)
    low, high = table[above - 1], table[above]
    return jnp.where(w - low <= high - w, low, high)


def _optimal_dynamic(w, budget, importance, encoding: Encoding, bits: int, limit: int) -> jax.Array:
    """Least error by dynamic programming over the members of one row of groups, w [g, m]."""
    most = max_terms(encoding, bits)
    size, lanes = w.shape
    states = size * most + 1
    choices = jnp.stack(
        [nearest_values(w, few_term_values(t, encoding, bits, limit)) for t in range(most + 1)], 1
    )  # [g, most + 1, m]
    errors = (choices - w[:, None]) ** 2
    if importance is not None:
        errors = errors * importance[:, None]

    def add_member(best, error):
        # best[j]: least error of the members so far with at most j terms.
        padded = jnp.pad(best, ((most, 0), (0, 0)), constant_values=jnp.inf)
        options = jnp.stack(
            [padded[most - t : most - t + states] + error[t][None] for t in range(most + 1)]
        )
        return jnp.min(options, axis=0), jnp.argmin(options, axis=0).astype(jnp.int8)

    start = jnp.zeros((states, lanes), jnp.float32)
    _, taken = jax.lax.scan(add_member, start, errors)

    def read_member(left, member):
        taken_here, choice = member
        terms = jnp.take_along_axis(taken_here, left[None], axis=0).astype(jnp.int32)
        value = jnp.take_along_axis(choice, terms, axis=0)
        return left - terms[0], value[0]

    left = jnp.full((lanes,), 1, jnp.int32) * jnp.minimum(budget, states - 1)
    _, values = jax.lax.scan(read_member, left, (taken, choices), reverse=True)
    return values.astype(jnp.int32)


def _greedy(w, budget, encoding: Encoding, bits: int, limit: int) -> jax.Array:
    """Term revealing on groups [n, g, m]: the largest terms first, ties to the lower index."""
    top = 1 << (bits - 1)
    q = jnp.round(jnp.clip(w, -limit, limit)).astype(jnp.int32)
    planes = digit_planes(q, encoding, bits)

    def take(position, state):
        value, left = state
        e = num_digits(encoding, bits) - 1 - position
        plus, minus = ((plane >> e) & 1 for plane in planes)
        present = plus | minus
        before = jnp.cumsum(present, axis=1) - present
        kept = jnp.where(before < left, plus - minus, 0)
        left = left - jnp.sum(jnp.abs(kept), axis=1, keepdims=True)
        return value + (kept << e), left

    left = jnp.full((w.shape[0], 1, w.shape[2]), 1, jnp.int32) * budget
    value, _ = jax.lax.fori_loop(0, num_digits(encoding, bits), take, (jnp.zeros_like(q), left))
    if limit < top:  # 127 truncated to its first term is 128; the nearest storable term is 64
        value = jnp.where(jnp.abs(value) == top, jnp.sign(value) * (top // 2), value)
    return value


def _to_groups(x: jax.Array, group_size: int, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Cuts x into groups [n, group_size, m], zero-padded; returns the shape before the cut."""
    x = x.reshape(int(np.prod(x.shape[:axis])), x.shape[axis], int(np.prod(x.shape[axis + 1 :])))
    if x.shape[2] < _MIN_LANES:
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(1, x.shape[0], -1)
    shape = x.shape
    pad = -shape[1] % group_size
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    return x.reshape(-1, group_size, shape[2]), shape


def _from_groups(groups: jax.Array, cut: tuple[int, ...], shape: tuple[int, ...], axis: int):
    """Undoes `_to_groups`."""
    x = groups.reshape(cut[0], -1, cut[2])[:, : cut[1]]
    before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    if after < _MIN_LANES:
        x = jnp.moveaxis(x.reshape(cut[1], after, before), 2, 0)
    return x.reshape(shape)


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the target without changing it."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def check_axis(axis: object, shape: tuple[int, ...]) -> None:
    """Raises unless an array of this shape has the axis."""
    if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in weights of shape {shape}")


def _as_weights(w: jax.typing.ArrayLike) -> jax.Array:
    wide = as_wide_integers(w)
    return jnp.asarray(w if wide is None or wide.itemsize < 8 else wide.astype(np.float32))


def _check_importance(importance: jax.Array) -> None:
    if jnp.issubdtype(importance.dtype, jnp.complexfloating):
        raise TypeError(f"importance must be real numbers, got {importance.dtype}")
    if isinstance(importance, jax.core.Tracer):
        return
    if not bool(((importance >= 0) & (importance < jnp.inf)).all()):
        raise ValueError("importance must be finite and 0 or more everywhere")


def _check_arguments(w, group_size, axis, method, encoding, bits, limit, importance) -> int:
    check_encoding(encoding, bits)
    _check_limit(limit, bits)
    check_method(method, encoding)
    check_group_size(group_size)
    check_axis(axis, w.shape)
    if jnp.issubdtype(w.dtype, jnp.complexfloating) or w.dtype == jnp.bool_:
        raise TypeError(f"weights must be real numbers, got {w.dtype}")
    if not isinstance(w, jax.core.Tracer) and bool(jnp.isnan(w).any()):
        raise ValueError(f"{int(jnp.isnan(w).sum())} of the {w.size} weights are NaN")
    if importance is not None:
        if method == "greedy":
            raise ValueError("greedy ranks terms by exponent only; use method='optimal'")
        if not broadcasts_to(jnp.shape(importance), w.shape):
            raise ValueError(
                f"importance of shape {jnp.shape(importance)} does not broadcast to {w.shape}"
            )
        _check_importance(jnp.asarray(importance))
    return axis % w.ndim


@functools.partial(
    jax.jit, static_argnames=("group_size", "axis", "method", "encoding", "bits", "limit")
)
def _project(w, budget, importance, *, group_size, axis, method, encoding, bits, limit):
    top = 1 << (bits - 1)
    bound = top if limit is None else limit
    shape = w.shape
    w = jnp.clip(w.astype(jnp.float32), -bound, bound)
    groups, cut = _to_groups(w, group_size, axis)
    if importance is not None:
        importance = jnp.broadcast_to(importance, shape).astype(jnp.float32)
        importance, _ = _to_groups(importance, group_size, axis)
    if encoding == "naf" and method == "optimal":
        values = _optimal_naf(groups, budget, importance, bits, bound < top)
        return _from_groups(values, cut, shape, axis)

    def few(groups: jax.Array) -> jax.Array:
        if method == "greedy":
            return _greedy(groups, budget, encoding, bits, bound)
        # Row by row, since the programme's tables are much larger than the weights.
        return jax.lax.map(
            lambda row: _optimal_dynamic(row[0], budget, row[1], encoding, bits, bound),
            (groups, importance),
        )

    def all_terms(groups: jax.Array) -> jax.Array:
        return jnp.round(groups).astype(jnp.int32)

    enough = budget >= max_budget(group_size, encoding, bits)
    values = jax.lax.cond(enough, all_terms, few, groups)
    return _from_groups(values, cut, shape, axis)


def project(
    w: jax.typing.ArrayLike,
    *,
    group_size: int,
    budget: jax.typing.ArrayLike,
    axis: int,
    method: Method = "optimal",
    encoding: Encoding = "naf",
    bits: int = 8,
    limit: int | None = None,
    importance: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Keeps at most ``budget`` power-of-two terms in each group of ``group_size`` weights.

    Args:
      w: weights in integer units (already divided by their scale), float or int, any shape.
        float64 is computed in float32. ``greedy`` rounds to integers first, ``optimal`` does not.
      group_size: weights that share a budget; they follow each other along ``axis``. A ragged
        last group keeps the same budget.
      budget: terms per group, an integer from 0 to `max_budget`, which is plain rounding; may be
        traced.
      axis: the reduction axis, along which groups lie.
      method: ``optimal`` (least squared error) or ``greedy`` (term revealing, SC20), which keeps
        the largest terms of each value and is not for ``booth4``.
      encoding: how terms are counted.
      bits: width of the integers; terms have exponents 0 to ``bits - 1`` and values reach
        ``±2**(bits - 1)``. Weights outside are clipped.
      limit: the largest magnitude, ``2**(bits - 1)`` by default; ``2**(bits - 1) - 1`` gives values
        that fit a signed integer of that width.
      importance: non-negative weights of the squared errors, broadcastable to ``w`` (for example
        a diagonal curvature). Only for ``optimal``.

    Returns:
      int32 of the shape of ``w``.

    Raises:
      ValueError: an argument is out of range or weights are NaN; concrete values are checked,
        traced ones cannot be.
      TypeError: complex or boolean weights, an axis or a budget that is not one integer.

    >>> project([11, 5, 3, 1], group_size=4, budget=4, axis=0, method="greedy").tolist()
    [12, 4, 4, 0]
    """
    w = _as_weights(w)
    axis = _check_arguments(w, group_size, axis, method, encoding, bits, limit, importance)
    check_budget(budget, group_size, encoding, bits)
    if w.size == 0:
        return jnp.zeros(w.shape, jnp.int32)
    budget = jnp.asarray(budget, jnp.int32)
    return _project(
        w,
        budget,
        None if importance is None else jnp.asarray(importance),
        group_size=group_size,
        axis=axis,
        method=method,
        encoding=encoding,
        bits=bits,
        limit=limit,
    )


@functools.partial(jax.jit, static_argnames=("group_size", "axis", "bits", "limit"))
def _error_curve(w, importance, *, group_size, axis, bits, limit):
    top = 1 << (bits - 1)
    bound = top if limit is None else limit
    clipped = jnp.clip(w.astype(jnp.float32), -bound, bound)
    groups, _ = _to_groups(clipped, group_size, axis)
    if importance is not None:
        importance = jnp.broadcast_to(importance, w.shape).astype(jnp.float32)
        importance, _ = _to_groups(importance, group_size, axis)
    step = _pursue(groups, importance, bits, bound < top)

    def spend(residual, _):
        residual, gain = step(residual)
        return residual, jnp.sum(gain)

    residual, gains = jax.lax.scan(spend, groups, length=max_budget(group_size, "naf", bits))
    left = residual**2 if importance is None else importance * residual**2
    # Summed from the far end, so that the small errors at large budgets keep their digits.
    steps = jnp.concatenate([gains, jnp.sum(left)[None]])
    return jnp.cumsum(steps[::-1])[::-1]


def error_curve(
    w: jax.typing.ArrayLike,
    *,
    group_size: int,
    axis: int,
    bits: int = 8,
    limit: int | None = None,
    importance: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The summed squared error of `project` (optimal, NAF) at every budget, in one pass.

    The curve is convex and falls: every group's gains are sorted, and so are their sums.

    Args:
      w, group_size, axis, bits, limit, importance: as for `project`.

    Returns:
      float32 of shape ``[max_budget(group_size, "naf", bits) + 1]`` in squared integer units;
      entry k is the error at budget k, measured from the weights clipped to the range.
    """
    w = _as_weights(w)
    axis = _check_arguments(w, group_size, axis, "optimal", "naf", bits, limit, importance)
    importance = None if importance is None else jnp.asarray(importance)
    return _error_curve(w, importance, group_size=group_size, axis=axis, bits=bits, limit=limit)
