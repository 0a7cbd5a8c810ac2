"""Group-budget projection: each group of weights keeps at most k power-of-two terms in all.

The budget is structured as in STP (Huang et al., IEEE TCAD 42(1), 2023): g weights that follow each
other along the reduction axis share k terms, so that a group takes k cycles of one processing
element whatever its values are. k may differ from output channel to output channel.

``greedy`` is term revealing (Kung, McDanel and Zhang, SC20): it truncates the group's terms.
``optimal`` is the least squared error over every choice of values that fits the budget.
"""

from __future__ import annotations

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.encodings import (
    ENCODINGS,
    Encoding,
    as_wide_integers,
    check_encoding,
    max_terms,
)
from stp_jax.terms.greedy import GREEDY
from stp_jax.terms.groups import GroupLayout, check_group_size
from stp_jax.terms.method import ProjectionMethod
from stp_jax.terms.optimal import OPTIMAL, pursue

# By name. ``METHODS["mine"] = ProjectionMethod(groups=…)`` adds one. Compiled programs are kept by
# name, so a name stands for one method as long as the process lives.
METHODS: dict[str, ProjectionMethod] = {"optimal": OPTIMAL, "greedy": GREEDY}
Method = Annotated[str, METHODS]  # a key of `METHODS`


def max_budget(group_size: int, encoding: Encoding = "naf", bits: int = 8) -> int:
    """The budget at which a group of any values keeps all its terms.

    Raises:
      ValueError: group_size is no positive integer, or encoding or bits do not exist.
    """
    check_group_size(group_size)
    return group_size * max_terms(encoding, bits)


def check_budget(budget: object, group_size: int, encoding: Encoding, bits: int) -> None:
    """Raises unless budgets are integers and, if concrete, all of them in [0, max_budget]."""
    if isinstance(budget, jax.core.Tracer):
        if not jnp.issubdtype(budget.dtype, jnp.integer):
            raise TypeError(f"budgets are integers, got {budget.dtype}")
        return
    value = np.asarray(budget)
    if not np.issubdtype(value.dtype, np.integer):
        raise TypeError(f"budgets are integers, got {budget!r}")
    top = max_budget(group_size, encoding, bits)
    outside = value[(value < 0) | (value > top)]
    if outside.size:
        raise ValueError(
            f"budget {int(outside[0])} is outside [0, {top}]: a group of {group_size} {encoding} "
            f"values of {bits} bits has at most {top} terms"
        )


def align_budget(
    budget: jax.typing.ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...]
) -> jax.Array:
    """One budget as a scalar; several with the axes of the weights, of size 1 along the reduction.

    Args:
      budget: an array that broadcasts to the weights.
      shape: of the weights.
      axes: the reduction.

    Raises:
      ValueError: the budgets do not broadcast to the weights, or differ along the reduction.
    """
    budget = jnp.asarray(budget)
    if not budget.ndim:
        return budget
    apart = tuple(1 if a in axes or a - len(shape) in axes else n for a, n in enumerate(shape))
    if not broadcasts_to(budget.shape, apart):
        raise ValueError(
            f"budgets of shape {budget.shape} do not broadcast to {apart}, weights of shape "
            f"{shape} with one budget along the reduction; use vmap for several sets of budgets"
        )
    return budget.reshape((1,) * (len(shape) - budget.ndim) + budget.shape)


def check_method(method: str, encoding: Encoding) -> None:
    """Raises ValueError unless there is such a method, and for this encoding."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    takes = METHODS[method].takes
    if not takes(ENCODINGS[encoding]):
        others = ", ".join(name for name, rule in ENCODINGS.items() if takes(rule))
        remedy = METHODS[method].remedy.format(encoding=encoding, others=others)
        raise ValueError(remedy or f"{method} takes the encodings {others}, not {encoding}")


def _check_limit(limit: int | None, bits: int) -> None:
    top = 1 << (bits - 1)
    if limit not in (None, top - 1, top):
        raise ValueError(f"limit must be {top - 1} (fits a signed int{bits}) or {top}, got {limit}")


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


def check_importance(importance: jax.Array) -> None:
    """Raises unless weights of errors are real and, if concrete, finite and 0 or more."""
    if jnp.issubdtype(importance.dtype, jnp.complexfloating):
        raise TypeError(f"importance must be real numbers, got {importance.dtype}")
    if isinstance(importance, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        sound = bool(((importance >= 0) & (importance < jnp.inf)).all())
    if not sound:
        raise ValueError("importance must be finite and 0 or more everywhere")


def check_weights(w: jax.Array) -> None:
    """Raises ValueError if concrete weights are NaN."""
    if isinstance(w, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # constants of a program that is traced now, too
        bad = int(jnp.isnan(w).sum())
    if bad:
        raise ValueError(f"{bad} of the {w.size} weights are NaN")


def _check_arguments(w, group_size, axis, method, encoding, bits, limit, importance) -> int:
    check_encoding(encoding, bits)
    _check_limit(limit, bits)
    check_method(method, encoding)
    check_group_size(group_size)
    check_axis(axis, w.shape)
    if jnp.issubdtype(w.dtype, jnp.complexfloating) or w.dtype == jnp.bool_:
        raise TypeError(f"weights must be real numbers, got {w.dtype}")
    check_weights(w)
    if importance is not None:
        if not METHODS[method].importance:
            able = [name for name, known in METHODS.items() if known.importance]
            raise ValueError(
                f"{method} takes no importance; use method={' or '.join(map(repr, able))}"
            )
        if not broadcasts_to(jnp.shape(importance), w.shape):
            raise ValueError(
                f"importance of shape {jnp.shape(importance)} does not broadcast to {w.shape}"
            )
        check_importance(jnp.asarray(importance))
    return axis % w.ndim


@functools.partial(
    jax.jit, static_argnames=("group_size", "axis", "method", "encoding", "bits", "limit")
)
def _project(w, budget, importance, *, group_size, axis, method, encoding, bits, limit):
    top = 1 << (bits - 1)
    bound = top if limit is None else limit
    layout = GroupLayout(group_size, (axis,))
    groups = layout.cut(jnp.clip(w.astype(jnp.float32), -bound, bound))
    if importance is not None:
        importance = layout.cut(jnp.broadcast_to(importance, w.shape).astype(jnp.float32))
    if budget.ndim:
        budget = layout.cut_shared(budget, w.shape)
    values = METHODS[method].groups(groups, budget, importance, encoding, bits, bound)
    return layout.uncut(values, w.shape)


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
      budget: terms per group, an integer from 0 to `max_budget`, which is plain rounding; or an
        array of them that broadcasts to ``w`` with size 1 along ``axis``, such as one per output
        channel. May be traced.
      axis: the reduction axis, along which groups lie.
      method: ``optimal`` (least squared error) or ``greedy`` (term revealing, SC20), which keeps
        the largest terms of each value and is not for ``booth4``; or a name added to `METHODS`.
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
      ValueError: an argument is out of range or weights are NaN (concrete values are checked,
        traced ones cannot be), or the shape of importance or budget does not fit.
      TypeError: complex or boolean weights, an axis that is no integer, or budgets that are none.

    >>> project([11, 5, 3, 1], group_size=4, budget=4, axis=0, method="greedy").tolist()
    [12, 4, 4, 0]
    >>> project([[11, 11], [5, 5]], group_size=2, budget=[1, 3], axis=0).tolist()
    [[8, 12], [0, 4]]
    """
    w = _as_weights(w)
    axis = _check_arguments(w, group_size, axis, method, encoding, bits, limit, importance)
    check_budget(budget, group_size, encoding, bits)
    budget = align_budget(budget, w.shape, (axis,)).astype(jnp.int32)
    if w.size == 0:
        return jnp.zeros(w.shape, jnp.int32)
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


@functools.partial(jax.jit, static_argnames=("group_size", "axis", "bits", "limit", "apart"))
def _error_curve(w, importance, *, group_size, axis, bits, limit, apart):
    top = 1 << (bits - 1)
    bound = top if limit is None else limit
    clipped = jnp.clip(w.astype(jnp.float32), -bound, bound)
    layout = GroupLayout(group_size, (axis,))
    groups = layout.cut(clipped)
    if importance is not None:
        importance = layout.cut(jnp.broadcast_to(importance, w.shape).astype(jnp.float32))
    step = pursue(groups, importance, bits, bound < top)

    def total(x: jax.Array) -> jax.Array:
        if not apart:
            return jnp.sum(x)
        along = (*w.shape[:axis], layout.along(w.shape), *w.shape[axis + 1 :])
        by_group = GroupLayout(1, (axis,)).uncut(jnp.sum(x, axis=1, keepdims=True), along)
        others = tuple(a for a in range(w.ndim) if a not in apart)
        return jnp.sum(by_group, axis=others)

    def spend(residual, _):
        residual, gain = step(residual)
        return residual, total(gain)

    residual, gains = jax.lax.scan(spend, groups, length=max_budget(group_size, "naf", bits))
    left = residual**2 if importance is None else importance * residual**2
    # Summed from the far end, so that the small errors at large budgets keep their digits.
    steps = jnp.concatenate([gains, total(left)[None]])
    curves = jnp.cumsum(steps[::-1], axis=0)[::-1]
    return jnp.moveaxis(curves, 0, -1)


def error_curve(
    w: jax.typing.ArrayLike,
    *,
    group_size: int,
    axis: int,
    bits: int = 8,
    limit: int | None = None,
    importance: jax.typing.ArrayLike | None = None,
    apart: tuple[int, ...] = (),
) -> jax.Array:
    """The summed squared error of `project` (optimal, NAF) at every budget, in one pass.

    The curve is convex and falls: every group's gains are sorted, and so are their sums.

    Args:
      w, group_size, axis, bits, limit, importance: as for `project`.
      apart: axes whose entries have a curve each, such as that of the output channels; never the
        reduction.

    Returns:
      float32 of shape ``[*extents of apart, max_budget(group_size, "naf", bits) + 1]`` in squared
      integer units; entry k is the error at budget k, measured from the weights clipped to the
      range.

    Raises:
      ValueError: as by `project`, or apart has the reduction.
    """
    w = _as_weights(w)
    axis = _check_arguments(w, group_size, axis, "optimal", "naf", bits, limit, importance)
    for each in apart:
        check_axis(each, w.shape)
    apart = tuple(sorted({a % w.ndim for a in apart}))
    if axis in apart:
        raise ValueError(f"a curve sums over the reduction, axis {axis}; it cannot be kept apart")
    importance = None if importance is None else jnp.asarray(importance)
    return _error_curve(
        w, importance, group_size=group_size, axis=axis, bits=bits, limit=limit, apart=apart
    )
