"""The nearest point of a lattice of few-term values under a group's term budget.

For a group of g weights u, in integer units, and a curvature A, the problem is

    minimise (u - v)' A (u - v)   over integers v with |v_i| <= Q and sum_i terms(v_i) <= k.

With a diagonal A it is the group-budget projection (`project`). In general it is a closest vector
problem with one constraint more; GPTQ answers the one without by Babai's nearest plane (Chen et
al., "The Geometry of LLM Quantization", arXiv 2507.18553). Here it is a K-best search (Guo &
Nilsson, "Algorithm and Implementation of the K-Best Sphere Decoding for MIMO Detection", IEEE JSAC
24(3), 2006): members are decided one after the other, and the K best partial decisions survive.

Partial decisions that spent unlike numbers of terms are ranked together by a lower bound on what
any completion costs. Take a diagonal D with A - D positive definite and e = u - v. Then

    e' A e  =  e' D e  +  e' (A - D) e  =  sum_i d_i e_i^2  +  sum_i (w_i . e)^2

with w_i the rows of the lower triangular W, W'W = A - D, so that (w_i . e) is known as soon as
member i is decided. What the undecided members still pay is at least their diagonal projection
under D onto the terms left, which one table per group holds for every number of terms. The bound
never exceeds the cost, never falls along a branch, and equals the cost at the end. So an answer no
worse than every bound that was ever cut off is a global optimum, and the search says where.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.codebook import few_term_values, nearest_values
from stp_jax.terms.encodings import Encoding, count, max_terms
from stp_jax.terms.projection import project
from stp_jax.terms.quantizers import WeightFormat

# The least eigenvalue, relative to the diagonal, that A - D keeps, so that it has a float32 factor.
_MARGIN = 1e-3


class LatticePoints(NamedTuple):
    """Result of the search, for every output."""

    values: jax.Array  # int32 [outputs, group_size]
    cost: jax.Array  # float32 [outputs], (u - v)' A (u - v)
    optimal: jax.Array  # bool [outputs]: no values within the budget cost less


class _Candidates(NamedTuple):
    """The values that a member may take, by the half-unit cell in which its centre lies."""

    values: np.ndarray  # float32 [cells, columns]
    terms: np.ndarray  # int32 [columns]
    omitted: np.ndarray  # bool [columns]: only stands for itself and all farther ones in a bound


@functools.cache
def _candidates(neighbours: int, encoding: Encoding, bits: int, limit: int) -> _Candidates:
    """For each number of terms, the nearest values that have it and, last, the next nearest."""
    values = np.arange(-limit, limit + 1)
    with jax.ensure_compile_time_eval():
        terms = np.asarray(count(values, encoding, bits))
    # Two integers are equally far from multiples of 1/2 only: the order is one within a cell.
    middle = (np.arange(-2 * limit - 2, 2 * limit + 2) + 0.5) / 2
    columns, column_terms, omitted = [], [], []
    for t in range(max_terms(encoding, bits) + 1):
        alike = values[terms == t]
        order = np.argsort(np.abs(alike - middle[:, None]), axis=1, kind="stable")
        nearest = alike[order][:, : neighbours + 1]
        columns.append(nearest)
        column_terms += [t] * nearest.shape[1]
        omitted += [j == neighbours for j in range(nearest.shape[1])]
    return _Candidates(
        np.concatenate(columns, axis=1).astype(np.float32),
        np.array(column_terms, np.int32),
        np.array(omitted),
    )


def _cell(center: jax.Array, limit: int) -> jax.Array:
    """The row of `_candidates` for a centre."""
    first, last = -2 * limit - 2, 2 * limit + 1
    return jnp.clip(jnp.floor(2 * center), first, last).astype(jnp.int32) - first


def _diagonal_part(curvature: jax.Array) -> jax.Array:
    """The diagonal d of a large D for which ``curvature - D`` is positive definite."""
    # One over the inverse's diagonal is the most that each entry alone could be.
    most = 1 / jnp.diagonal(jnp.linalg.inv(curvature))
    scaled = curvature / jnp.sqrt(most[:, None] * most[None])
    return jnp.maximum(jnp.linalg.eigvalsh(scaled)[0] - _MARGIN, 0.0) * most


def _lower_factor(matrix: jax.Array) -> jax.Array:
    """Lower W with W'W the matrix: row i of W sees the members up to i."""
    return jnp.linalg.cholesky(matrix[::-1, ::-1]).T[::-1, ::-1]


def _completions(target: jax.Array, weight: jax.Array, fmt: WeightFormat) -> jax.Array:
    """The least sum_{j >= i} weight_j (u_j - v_j)^2 with at most T terms, [g + 1, outputs, T]."""
    most = max_terms(fmt.encoding, fmt.bits)
    errors = jnp.stack(
        [
            nearest_values(target, few_term_values(t, fmt.encoding, fmt.bits, fmt.largest))
            for t in range(most + 1)
        ],
        axis=-1,
    )
    errors = weight[None, :, None] * (errors - target[..., None]) ** 2  # [outputs, g, most + 1]
    states = fmt.max_budget + 1

    def add_member(best: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
        padded = jnp.pad(best, ((0, 0), (most, 0)), constant_values=jnp.inf)
        options = [padded[:, most - t :][:, :states] + error[:, t, None] for t in range(most + 1)]
        best = functools.reduce(jnp.minimum, options)
        return best, best

    nothing = jnp.zeros((len(target), states), jnp.float32)
    _, tables = jax.lax.scan(add_member, nothing, jnp.moveaxis(errors, 1, 0), reverse=True)
    return jnp.concatenate([tables, nothing[None]])


class _Beam(NamedTuple):
    """The surviving partial decisions of each output."""

    error: jax.Array  # [outputs, beam, g]: u - v of the members decided so far, else 0
    paid: jax.Array  # [outputs, beam]: the bound without the completion; inf where there is none
    used: jax.Array  # int32 [outputs, beam]: terms
    cut: jax.Array  # [outputs]: the least bound that was ever cut off


def _search(target, curvature, budget, fmt: WeightFormat, beam: int, neighbours: int):
    """The search in the given order of members: errors u - v and the least bound cut off."""
    outputs, size = target.shape
    diagonal = _diagonal_part(curvature)
    factor = _lower_factor(curvature - jnp.diag(diagonal))
    completions = _completions(target, diagonal, fmt)
    budget = jnp.broadcast_to(budget, (outputs,))[:, None, None]
    table = _candidates(neighbours, fmt.encoding, fmt.bits, fmt.largest)
    columns = len(table.terms)

    def decide(i: jax.Array, state: _Beam) -> _Beam:
        own, u = factor[i, i], target[:, i, None]
        before = jnp.matmul(state.error, factor[i], precision="highest")
        # d_i (u - v)^2 + (before + own (u - v))^2 is least at this centre over the real v.
        center = u + before * own / (diagonal[i] + own**2)
        values = jnp.asarray(table.values)[_cell(center, fmt.largest)]
        error = u[..., None] - values  # [outputs, beam, columns]
        paid = (
            state.paid[..., None] + diagonal[i] * error**2 + (before[..., None] + own * error) ** 2
        )
        used = state.used[..., None] + table.terms[None, None]
        left = jnp.clip(budget - used, 0, fmt.max_budget).reshape(outputs, -1)
        rest = jnp.take_along_axis(completions[i + 1], left, axis=1).reshape(paid.shape)
        bound = jnp.where(used <= budget, paid + rest, jnp.inf)

        cut = jnp.min(jnp.where(table.omitted[None, None], bound, jnp.inf), axis=(1, 2))
        ranked = jnp.where(table.omitted[None, None], jnp.inf, bound).reshape(outputs, -1)
        # One more than survive: the first that does not has the least bound of those cut off.
        best, index = jax.lax.top_k(-ranked, beam + 1)
        cut = jnp.minimum(jnp.minimum(cut, -best[:, beam]), state.cut)
        best, index = best[:, :beam], index[:, :beam]

        def chosen(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x.reshape(outputs, -1), index, axis=1)

        parents = jnp.take_along_axis(state.error, (index // columns)[..., None], axis=1)
        return _Beam(
            parents.at[:, :, i].set(chosen(error)),
            jnp.where(jnp.isfinite(best), chosen(paid), jnp.inf),
            chosen(used),
            cut,
        )

    start = _Beam(
        jnp.zeros((outputs, beam, size), jnp.float32),
        jnp.full((outputs, beam), jnp.inf).at[:, 0].set(0.0),
        jnp.zeros((outputs, beam), jnp.int32),
        jnp.full((outputs,), jnp.inf),
    )
    state = jax.lax.fori_loop(0, size, decide, start)
    first = jnp.argmin(state.paid, axis=1)[:, None]
    return jnp.take_along_axis(state.error, first[..., None], axis=1)[:, 0], state.cut


def quadratic_cost(error: jax.Array, curvature: jax.Array) -> jax.Array:
    """e' A e for each row e of ``error [outputs, g]``; float32 ``[outputs]``."""
    return jnp.sum(error * jnp.matmul(error, curvature, precision="highest"), axis=-1)


def search_group(
    target: jax.Array,
    curvature: jax.Array,
    budget: jax.Array,
    start: jax.Array,
    *,
    fmt: WeightFormat,
    beam: int,
    neighbours: int,
) -> LatticePoints:
    """`nearest_points` of checked float32 arguments, for use under jit; never worse than start.

    Args:
      target, curvature, budget, fmt, beam, neighbours: as for `nearest_points`.
      start: int32 ``[outputs, group_size]`` within the budget; the answer unless one costs less.
    """
    # The members that weigh most first: their bounds tell good decisions from bad ones early.
    order = jnp.argsort(-jnp.diagonal(curvature))
    within = curvature[order][:, order]
    error, cut = _search(target[:, order], within, budget, fmt, beam, neighbours)
    found = target - error[:, jnp.argsort(order)]
    found = jnp.round(found).astype(jnp.int32)
    cost = quadratic_cost(target - found.astype(target.dtype), curvature)
    known = quadratic_cost(target - start.astype(target.dtype), curvature)
    values = jnp.where((cost < known)[:, None], found, start)
    cost = jnp.minimum(cost, known)
    return LatticePoints(values, cost, cost <= cut)


@functools.partial(jax.jit, static_argnames=("fmt", "beam", "neighbours"))
def _nearest_points(target, curvature, budget, *, fmt, beam, neighbours):
    start = diagonal_projection(target, curvature, budget, fmt)
    return search_group(target, curvature, budget, start, fmt=fmt, beam=beam, neighbours=neighbours)


def diagonal_projection(
    target: jax.Array, curvature: jax.Array, budget: jax.Array, fmt: WeightFormat
) -> jax.Array:
    """The projection of ``target [outputs, g]`` as if the curvature were its diagonal."""
    return project(
        target,
        group_size=fmt.group_size,
        budget=budget[:, None] if budget.ndim else budget,
        axis=1,
        encoding=fmt.encoding,
        bits=fmt.bits,
        limit=fmt.largest,
        importance=jnp.diagonal(curvature)[None],
    )


def check_search(fmt: WeightFormat, beam: object, neighbours: object) -> None:
    """Raises ValueError unless the search exists for the format and its widths are positive."""
    if fmt.method != "optimal":
        raise ValueError(
            f"the lattice search finds least errors: the format's method must be 'optimal', "
            f"not {fmt.method!r}"
        )
    for name, value in (("beam", beam), ("neighbours", neighbours)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def nearest_points(
    target: jax.typing.ArrayLike,
    curvature: jax.typing.ArrayLike,
    budget: jax.typing.ArrayLike,
    *,
    fmt: WeightFormat,
    beam: int = 16,
    neighbours: int = 2,
) -> LatticePoints:
    """Minimises (u - v)'A(u - v) over groups of integers v within a term budget.

    Args:
      target: u, float ``[outputs, fmt.group_size]`` in integer units; one group for each output.
      curvature: A, symmetric positive definite ``[fmt.group_size] * 2``, common to all outputs.
      budget: terms per group, an integer in [0, fmt.max_budget] or ``[outputs]`` of them; may be
        traced.
      fmt: the weight format; its method must be ``optimal``.
      beam: K, the partial decisions that survive each member.
      neighbours: how many values of each number of terms a member tries, nearest first. With
        ``2**fmt.bits`` and an unbounded beam the search is exact.

    Returns:
      `LatticePoints`, never worse than `project` with A's diagonal as importance; ``optimal`` is a
      certificate (to float32 rounding), and where it is False the values may still be optimal.

    Raises:
      ValueError: shapes do not fit together, the budget is out of range, beam or neighbours is not
        positive, or the format is greedy.

    >>> fmt = WeightFormat(group_size=2)
    >>> nearest_points([[5.0, 5.0]], [[1.0, 0.9], [0.9, 1.0]], 2, fmt=fmt).values.tolist()
    [[8, 2]]
    """
    check_search(fmt, beam, neighbours)
    target, curvature = jnp.asarray(target, jnp.float32), jnp.asarray(curvature, jnp.float32)
    size = fmt.group_size
    if target.ndim != 2 or target.shape[1] != size:
        raise ValueError(f"target must be [outputs, {size}], got {target.shape}")
    if curvature.shape != (size, size):
        raise ValueError(f"curvature must be {(size, size)}, got {curvature.shape}")
    fmt.check_budget(budget)
    budget = jnp.asarray(budget, jnp.int32)
    if budget.shape not in ((), target.shape[:1]):
        raise ValueError(f"budget must be one or {target.shape[:1]}, got {budget.shape}")
    return _nearest_points(target, curvature, budget, fmt=fmt, beam=beam, neighbours=neighbours)
