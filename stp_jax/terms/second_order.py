"""Second-order projection of a layer: few-term values whose errors cancel in its outputs.

With inputs X, the squared error of a layer's outputs is tr(E'HE) for the error E of its weights and
H = X'X, each output (column of E) by itself. Three steps lower it, none of which ever raises it:

* **Sequence.** Groups are settled one after the other, the strongest inputs first, and those not
  settled yet make up for each group's error (optimal brain surgeon; GPTQ, Frantar et al., ICLR
  2023, which is Babai's nearest plane, Chen et al., arXiv 2507.18553). What an error e of group B
  costs is then e'Ae with A = [H⁻¹]_BB⁻¹ over the groups left, and `stp_jax.terms.lattice` searches
  the values of least cost within the budget.
* **Scale.** For given integers v the best scale of an output is v'Hw / v'Hv.
* **Sweep.** Groups are settled again, one after the other, with all the others as they are: block
  coordinate descent, where A = H_BB and a group keeps its values unless others cost less.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.compensation import (
    check_compensation,
    compensated_integers,
    damped_gram,
    inverse_factor,
)
from stp_jax.terms.lattice import (
    check_search,
    diagonal_projection,
    quadratic_cost,
    search_group,
)
from stp_jax.terms.quantizers import WeightFormat, max_scale


class SecondOrderFit(NamedTuple):
    """Few-term values of a layer, and what they cost its outputs."""

    integers: jax.Array  # int32 [groups, group_size, outputs]
    scale: jax.Array  # float32 [outputs]
    error: jax.Array  # float32 [outputs], e'He with the damped H


@jax.jit
def output_error(w: jax.Array, scale: jax.Array, integers: jax.Array, gram: jax.Array) -> jax.Array:
    """e'He of each output for weights ``[K, outputs]`` and integers of that shape."""
    error = w - scale[None] * integers.astype(w.dtype)
    return jnp.sum(error * jnp.matmul(gram, error, precision="highest"), axis=0)


@jax.jit
def best_scale(w: jax.Array, scale: jax.Array, integers: jax.Array, gram: jax.Array) -> jax.Array:
    """The scale of least error for given integers; the present one where that is not positive."""
    v = integers.astype(w.dtype)
    seen = jnp.matmul(gram, v, precision="highest")
    power, along = jnp.sum(v * seen, axis=0), jnp.sum(w * seen, axis=0)
    usable = (power > 0) & (along > 0)
    return jnp.where(usable, along / jnp.where(usable, power, 1.0), scale)


def search_output_scale(
    w: jax.Array,
    gram: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    fmt: WeightFormat,
    damping: float = 0.01,
    candidates: int = 14,
    lowest: float = 0.85,
    highest: float = 2.4,
) -> jax.Array:
    """The scale of each output at which its compensated projection moves it least.

    Powers of two repeat at twice the scale, so that with few terms it matters where between two of
    them the weights fall, and the largest weight is better placed at 2**(bits - 2), which takes one
    term, than at the largest integer.

    Args:
      w, gram, budget, fmt, damping: as for `project_second_order`.
      candidates: how many multiples of `max_scale` to try, 1 or more.
      lowest, highest: the smallest and the largest of them.

    Returns:
      float32 ``[outputs]``.

    Raises:
      ValueError: as by `project_compensated`, or there is no candidate.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates}")
    peak = max_scale(w, axes=(0, 1), bits=fmt.bits)[0, 0]
    check_compensation(w, peak, gram, budget, fmt, damping)
    f32, budget = jnp.float32, jnp.asarray(budget, jnp.int32)
    w, gram = jnp.asarray(w, f32), jnp.asarray(gram, f32)
    flat, damped = w.reshape(len(gram), -1), damped_gram(gram, f32(damping))

    def error_at(scale: jax.Array) -> jax.Array:
        integers = compensated_integers(w, scale, gram, budget, f32(damping), fmt)
        return output_error(flat, scale, integers.reshape(flat.shape), damped)

    scale, error = peak, jnp.full(peak.shape, jnp.inf, f32)
    for ratio in np.geomspace(lowest, highest, candidates):
        tried = peak * f32(ratio)
        found = error_at(tried)
        scale = jnp.where(found < error, tried, scale)
        error = jnp.minimum(found, error)
    return scale


class _Steps(NamedTuple):
    """What settling a group costs and does, for every group in its turn."""

    curvature: jax.Array  # [groups, size, size]: the group's error e costs e'Ae
    spread: jax.Array  # [groups, K, size]: how it moves the weights that are still to come


@functools.partial(jax.jit, static_argnums=1)
def _sequence_steps(gram: jax.Array, size: int) -> _Steps:
    """Steps in which the later weights are free to answer."""
    count = len(gram) // size
    factor = inverse_factor(gram)  # with U'U = H⁻¹: an error e costs |U_jj^-T e|²
    eye = jnp.eye(size, dtype=gram.dtype)

    def step(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        across = jax.lax.dynamic_slice_in_dim(factor, j * size, size)
        own = jax.lax.dynamic_slice_in_dim(across, j * size, size, axis=1)
        whitened = jax.scipy.linalg.solve_triangular(own, eye, trans="T")
        later = jnp.arange(len(gram)) >= (j + 1) * size
        spread = jnp.where(later[:, None], -jnp.matmul(across.T, whitened, precision="highest"), 0)
        return jnp.matmul(whitened.T, whitened, precision="highest"), spread

    return _Steps(*jax.lax.map(step, jnp.arange(count)))


@functools.partial(jax.jit, static_argnums=1)
def _sweep_steps(gram: jax.Array, size: int) -> _Steps:
    """Steps in which all other weights stay as they are."""
    count = len(gram) // size
    blocks = jnp.einsum("isit->ist", gram.reshape(count, size, count, size))
    return _Steps(blocks, jnp.zeros((count, len(gram), size), gram.dtype))


@functools.partial(jax.jit, static_argnames=("fmt", "beam", "neighbours"))
def _settle(
    w, x, integers, scale, gram, steps, count, budget, *, fmt: WeightFormat, beam, neighbours
):
    """Settles the first groups in turn: new integers for present weights x, all ``[K, outputs]``.

    The target of a group is where its rows of H would feel no error; in a sequence, whose later
    weights answer at once, that is where its weights already are.
    """
    size = fmt.group_size

    def step(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, integers = state
        start, curvature, spread = j * size, steps.curvature[j], steps.spread[j]
        rows = jax.lax.dynamic_slice_in_dim(gram, start, size)
        block = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        felt = jnp.matmul(rows, w - x, precision="highest")
        group = jax.lax.dynamic_slice_in_dim(x, start, size)
        goal = group + jax.scipy.linalg.solve(block, felt, assume_a="pos")
        target = (goal / scale[None]).T
        present = jax.lax.dynamic_slice_in_dim(integers, start, size).T
        first = diagonal_projection(target, curvature, budget, fmt)
        costs = [quadratic_cost(target - v.astype(w.dtype), curvature) for v in (present, first)]
        known = jnp.where((costs[0] <= costs[1])[:, None], present, first)
        found = search_group(
            target, curvature, budget, known, fmt=fmt, beam=beam, neighbours=neighbours
        ).values.T
        settled = scale[None] * found.astype(w.dtype)
        x = x + jnp.matmul(spread, goal - settled, precision="highest")
        x = jax.lax.dynamic_update_slice_in_dim(x, settled, start, axis=0)
        return x, jax.lax.dynamic_update_slice_in_dim(integers, found, start, axis=0)

    return jax.lax.fori_loop(0, count, step, (x, integers))[1]


@functools.partial(jax.jit, static_argnums=2)
def _order(gram: jax.Array, w: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The rows of all groups, the strongest inputs first, and how many groups are not empty."""
    strength = jnp.sum(jnp.diagonal(gram).reshape(-1, size), axis=1)
    used = (strength > 0) | jnp.any(w != 0, axis=(1, 2))
    order = jnp.argsort(jnp.where(used, -strength, 1.0))
    rows = (order[:, None] * size + jnp.arange(size)[None]).reshape(-1)
    return rows, jnp.sum(used, dtype=jnp.int32)


def project_second_order(
    w: jax.Array,
    scale: jax.Array,
    gram: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    fmt: WeightFormat,
    damping: float = 0.01,
    beam: int = 8,
    neighbours: int = 2,
    sweeps: int = 3,
    fit_scale: bool = True,
) -> SecondOrderFit:
    """Projects weights so that the layer's outputs move least, groups searched as lattices.

    Args:
      w: float weights ``[groups, fmt.group_size, outputs]``; pad ragged groups with zeros.
      scale: positive, ``[outputs]``; where the search for scales starts.
      gram: H = X'X of the layer's inputs, ``[groups * group_size] * 2``, rows in the order of w;
        zeros for padding.
      budget: terms per group, an integer in [0, fmt.max_budget] or ``[outputs]`` of them; may be
        traced.
      fmt: the weight format; its groups are those of w, its method is ``optimal``.
      damping: added to the gram's diagonal, as a fraction of its mean; more of it compensates less.
      beam, neighbours: as for `nearest_points`.
      sweeps: times that every group is settled again, with the others as they are.
      fit_scale: whether scales are fitted before and after each sweep.

    Returns:
      `SecondOrderFit`; its error is that of the damped gram, and no output's is larger than by
      `project_compensated`.

    Raises:
      ValueError: shapes do not fit together, an argument is out of range, or the format is greedy.
    """
    check_search(fmt, beam, neighbours)
    check_sweeps(sweeps)
    check_compensation(w, scale, gram, budget, fmt, damping)
    f32 = jnp.float32
    return _project(
        jnp.asarray(w, f32),
        jnp.asarray(scale, f32),
        jnp.asarray(gram, f32),
        jnp.asarray(budget, jnp.int32),
        f32(damping),
        sweeps,
        fit_scale,
        functools.partial(_settle, fmt=fmt, beam=beam, neighbours=neighbours),
        fmt,
    )


def check_sweeps(sweeps: object) -> None:
    """Raises ValueError unless it is a whole number, 0 or more."""
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 0:
        raise ValueError(f"sweeps must be 0 or a positive integer, got {sweeps!r}")


def _project(w, scale, gram, budget, damping, sweeps, fit_scale, settle, fmt) -> SecondOrderFit:
    size = fmt.group_size
    compensated = compensated_integers(w, scale, gram, budget, damping, fmt)
    order, count = _order(gram, w, size)
    gram = damped_gram(gram, damping)
    gram, flat = gram[order][:, order], w.reshape(len(order), -1)[order]
    known = compensated.reshape(flat.shape)[order]
    found = settle(flat, flat, known, scale, gram, _sequence_steps(gram, size), count, budget)
    # Each group is no worse by search; but where that leads, later ones may be.
    better = output_error(flat, scale, found, gram) < output_error(flat, scale, known, gram)
    integers = jnp.where(better[None], found, known)
    steps = _sweep_steps(gram, size)
    for _ in range(sweeps):
        if fit_scale:
            scale = best_scale(flat, scale, integers, gram)
        x = scale[None] * integers.astype(flat.dtype)
        integers = settle(flat, x, integers, scale, gram, steps, count, budget)
    if fit_scale:
        scale = best_scale(flat, scale, integers, gram)
    error = output_error(flat, scale, integers, gram)
    back = jnp.zeros_like(integers).at[order].set(integers)
    return SecondOrderFit(back.reshape(w.shape), scale, error)
