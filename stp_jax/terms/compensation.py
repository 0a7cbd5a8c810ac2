"""Error-compensated projection, GPTQ-style.

It minimises the error of a layer's outputs instead of its weights. With inputs X, that squared
error is E'HE for the error E of the weights and H = X'X. Groups are projected one after the other,
and after each one the weights of the following groups change so that they cancel its error best.
This is the optimal brain surgeon's update (Hassibi & Stork, NIPS 1992), with one Cholesky factor
for all steps as in GPTQ (Frantar et al., ICLR 2023), here for whole groups and their term budget.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stp_jax.terms.projection import METHODS, project
from stp_jax.terms.quantizers import WeightFormat


def damped_gram(gram: jax.Array, damping: jax.Array) -> jax.Array:
    """The gram matrix with ``damping`` times the mean of its positive diagonal added there."""
    diagonal = jnp.diagonal(gram)
    fires = diagonal > 0
    number = jnp.maximum(jnp.sum(fires, dtype=gram.dtype), 1)
    mean = jnp.sum(diagonal) / number + jnp.float32(1e-12)
    # Inputs that never fire leave a row of zeros: nothing is known of it but its own weight.
    return gram + jnp.diag(jnp.where(fires, 0.0, mean) + damping * mean)


def inverse_factor(gram: jax.Array) -> jax.Array:
    """Upper U with U'U the inverse of a positive definite matrix."""
    lower = jnp.linalg.cholesky(gram)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(gram), dtype=gram.dtype))
    return jnp.linalg.cholesky(inverse, upper=True)


@functools.partial(jax.jit, static_argnums=(5,))
def compensated_integers(w, scale, gram, budget, damping, fmt: WeightFormat) -> jax.Array:
    """`project_compensated` of checked float32 arguments."""
    count, size, _ = w.shape
    scale = scale[None]
    # Groups with the strongest inputs first, while most others are left to make up for them.
    strength = jnp.sum(jnp.diagonal(gram).reshape(count, size), axis=1)
    order = jnp.argsort(-strength)
    rows = (order[:, None] * size + jnp.arange(size)[None]).reshape(-1)
    factor = inverse_factor(damped_gram(gram[rows][:, rows], damping))
    factor = factor.reshape(count, size, count, size)

    # A group is projected where its error counts: with all later weights free to answer, an error E
    # of group j costs |U_jj^-T E|², and the later groups answer best by -U_j,later' U_jj^-T E.
    def settle(w: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        group, across = w[j], factor[j]
        own = across[:, j]
        identity = jnp.eye(size, dtype=w.dtype)
        whitened = jax.scipy.linalg.solve_triangular(own, identity, trans="T")
        curvature = None
        if METHODS[fmt.method].importance:
            curvature = jnp.sum(whitened**2, axis=0)[:, None]
        integers = project(
            group / scale,
            group_size=size,
            budget=budget[None] if budget.ndim else budget,
            axis=0,
            method=fmt.method,
            encoding=fmt.encoding,
            bits=fmt.bits,
            limit=fmt.largest,
            importance=curvature,
        )
        error = whitened @ (group - scale * integers.astype(w.dtype))
        later = (jnp.arange(count) > j)[:, None, None]
        moved = jnp.einsum("gns,gm->nsm", across, error)
        return jnp.where(later, w - moved, w), integers

    _, integers = jax.lax.scan(settle, w[order], jnp.arange(count))
    return jnp.zeros_like(integers).at[order].set(integers)


def project_compensated(
    w: jax.Array,
    scale: jax.Array,
    gram: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    fmt: WeightFormat,
    damping: float = 0.01,
) -> jax.Array:
    """Projects weights so that the layer's outputs, rather than its weights, move least.

    Args:
      w: float weights ``[groups, fmt.group_size, outputs]``; pad ragged groups with zeros.
      scale: positive, ``[outputs]``; output o computes with ``scale[o]`` times integers.
      gram: X'X of the layer's inputs, ``[groups * group_size] * 2``, rows in the order of w; zeros
        for padding.
      budget: terms per group, an integer in [0, fmt.max_budget] or ``[outputs]`` of them; may be
        traced.
      fmt: the weight format; its groups are those of w.
      damping: added to the gram's diagonal, as a fraction of its mean; more of it compensates less.

    Returns:
      int32 integers of the shape of w, each group within the budget.

    Raises:
      ValueError: shapes do not fit together, damping is not positive, or the budget is out of
        range.
    """
    check_compensation(w, scale, gram, budget, fmt, damping)
    budget = jnp.asarray(budget, jnp.int32)
    f32 = jnp.float32
    return compensated_integers(
        w.astype(f32), scale.astype(f32), gram.astype(f32), budget, f32(damping), fmt
    )


def check_compensation(w, scale, gram, budget, fmt: WeightFormat, damping: float) -> None:
    """Raises ValueError unless the arguments of `project_compensated` fit together."""
    if w.ndim != 3 or w.shape[1] != fmt.group_size:
        raise ValueError(f"w must be [groups, {fmt.group_size}, outputs], got {w.shape}")
    count, size, outputs = w.shape
    if gram.shape != (count * size, count * size):
        raise ValueError(f"gram must be {(count * size,) * 2} for w {w.shape}, got {gram.shape}")
    if scale.shape != (outputs,):
        raise ValueError(f"scale must be {(outputs,)}, got {scale.shape}")
    check_damping(damping)
    fmt.check_budget(budget)
    if jnp.shape(budget) not in ((), (outputs,)):
        raise ValueError(f"budget must be one or {(outputs,)}, got {jnp.shape(budget)}")


def check_damping(damping: float) -> None:
    """Raises ValueError unless it is positive."""
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
