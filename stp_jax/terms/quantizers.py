"""Differentiable quantizers: integer grids and few-term values behind straight-through gradients.

Both quantizers return ``scale * v`` with v integers, and share one gradient rule. With
``u = x / scale`` and Q the largest integer (127 for 8 bits), v is a constant of u almost
everywhere, and the rule replaces its derivative (the straight-through estimator):

* to the input: the cotangent g where ``|u| <= Q``, zero outside;
* to the scale, as in LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020): g times
  ``v - u`` where ``|u| <= Q`` and times v outside, summed over the elements that share the scale
  and divided by ``sqrt(N Q)``, N being their number.

For activations v is u rounded, for weights the group-budget projection of u (`project`). Where the
budget has taken terms from a weight, its part in the second rule is ``g v / sum(v**2)``. LSQ's
``v - u`` assumes that v follows u when the scale changes; there it does not, since all weights of a
group change alike and the same ones win. With ``v - u`` for these too, pruned weights grow while
scales shrink, without end. Divided by ``sum(v**2)``, a step of gradient descent moves the scale to
the least-squares fit of ``scale * v`` less that step.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.encodings import ENCODINGS, Encoding, check_encoding
from stp_jax.terms.groups import GroupLayout, check_group_size
from stp_jax.terms.projection import (
    Method,
    align_budget,
    broadcasts_to,
    check_budget,
    check_importance,
    check_method,
    check_weights,
    max_budget,
    project,
)

TINY = 1e-12  # keeps a learned scale off zero
# Scales that a search for powers of two tries, over the one that just reaches the largest value.
POWER_RATIOS = np.exp2(-np.arange(4, dtype=np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The set of values of a quantized weight tensor; all fields are static.

    Raises:
      ValueError: an attribute is out of range.
    """

    group_size: int = 8  # weights that share a term budget
    encoding: Encoding = "naf"  # how terms are counted
    method: Method = "optimal"  # how a group is projected
    bits: int = 8  # width of the integers before the projection

    def __post_init__(self) -> None:  # noqa: D105
        check_encoding(self.encoding, self.bits)
        if self.bits < 2:
            raise ValueError(f"bits must be 2 or more to hold a sign, got {self.bits}")
        check_method(self.method, self.encoding)
        check_group_size(self.group_size)

    @property
    def largest(self) -> int:
        """Q, the largest magnitude: symmetric, so that weights fit a signed integer of `bits`."""
        return (1 << (self.bits - 1)) - 1

    @property
    def max_budget(self) -> int:
        """Terms per group at which nothing is pruned."""
        return max_budget(self.group_size, self.encoding, self.bits)

    @property
    def has_error_curve(self) -> bool:
        """Whether `stp_jax.terms.error_curve` gives the error at every budget."""
        return self.method == "optimal" and ENCODINGS[self.encoding].convex

    def layout(self, axes: tuple[int, ...]) -> GroupLayout:
        """Groups of this size along the adjacent axes."""
        return GroupLayout(self.group_size, axes)

    def check_budget(self, budget: object) -> None:
        """Raises unless budgets are integers and, where not traced, in [0, max_budget]."""
        check_budget(budget, self.group_size, self.encoding, self.bits)

    def aligned_budget(
        self, budget: jax.typing.ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...]
    ) -> jax.Array:
        """Checked terms per group, int32: a scalar, or with the axes of weights of this shape.

        Args:
          budget: an integer, or an array that broadcasts to the weights with size 1 along ``axes``.
          shape: of the weights.
          axes: the reduction.

        Raises:
          ValueError: a budget is outside [0, max_budget], or the shapes do not fit.
          TypeError: budgets are not integers.
        """
        self.check_budget(budget)
        return align_budget(budget, shape, axes).astype(jnp.int32)


def _integers(
    u: jax.Array,
    budget: jax.Array,
    axes: tuple[int, ...],
    fmt: WeightFormat,
    importance: jax.Array | None = None,
):
    """The integers nearest to u that fit the budget, float32; importance has the shape of u."""
    layout = fmt.layout(axes)
    shape, axis = layout.merged(u.shape)
    v = project(
        u.reshape(shape),
        group_size=fmt.group_size,
        budget=layout.merge_shared(budget) if budget.ndim else budget,
        axis=axis,
        method=fmt.method,
        encoding=fmt.encoding,
        bits=fmt.bits,
        limit=fmt.largest,
        importance=None if importance is None else importance.reshape(shape),
    )
    return v.reshape(u.shape).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _project_scaled(w, scale, budget, importance, axes, fmt):
    v = _integers(w.astype(jnp.float32) / scale, budget, axes, fmt, importance)
    return v.astype(jnp.int32)


def project_scaled(
    w: jax.Array,
    scale: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    axes: tuple[int, ...],
    fmt: WeightFormat,
    importance: jax.Array | None = None,
) -> jax.Array:
    """The integers v of quantized weights: ``scale * v`` is nearest to w within the budget.

    Args:
      w: float weights, any shape.
      scale: positive, broadcastable to w with the same number of axes.
      budget: terms per group, an integer, or an array that broadcasts to w with size 1 along axes,
        such as one per output channel; may be traced.
      axes: the adjacent axes along which groups lie, flattened in order.
      fmt: the weight format.
      importance: non-negative weights of the squared errors, broadcastable to w; of the formats
        whose method takes it.

    Returns:
      int32 of the shape of w.

    Raises:
      ValueError: a budget outside [0, fmt.max_budget] or of a shape that does not fit, or axes
        that are not adjacent; weights are NaN (concrete ones are checked, traced ones cannot be).
    """
    budget = fmt.aligned_budget(budget, w.shape, axes)
    check_weights(w)
    if importance is not None:
        check_importance(importance)
        importance = jnp.broadcast_to(importance, w.shape)
    return _project_scaled(w, scale, budget, importance, axes, fmt)


def scale_cotangent(
    g: jax.Array, u: jax.Array, v: jax.Array, largest: int, scale: jax.Array
) -> jax.Array:
    """The cotangent of the scale for the cotangent g of ``scale * v``, as in LSQ."""
    shared = _shared_axes(u, scale)
    number = math.prod(u.shape[a] for a in shared)
    local = jnp.where(jnp.abs(u) <= largest, v - u, v) / math.sqrt(number * largest)
    return jnp.sum(g * local, axis=shared, keepdims=True)


def _weight_scale_cotangent(
    g: jax.Array, u: jax.Array, v: jax.Array, largest: int, scale: jax.Array
) -> jax.Array:
    """As `scale_cotangent`, but for values that the budget has changed; the module's rule."""
    shared = _shared_axes(u, scale)
    rounded = jnp.abs(v - jnp.clip(u, -largest, largest)) <= 0.5
    stepped = scale_cotangent(jnp.where(rounded, g, 0), u, v, largest, scale)
    fitted = jnp.sum(jnp.where(rounded, 0, g * v), axis=shared, keepdims=True)
    power = jnp.sum(v * v, axis=shared, keepdims=True)
    return stepped + fitted / jnp.maximum(power, 1)


def _shared_axes(u: jax.Array, scale: jax.Array) -> tuple[int, ...]:
    return tuple(a for a in range(u.ndim) if scale.shape[a] == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _quantize_weights(w, scale, budget, axes, fmt):
    # The projection would make 0 of NaN, and hide that training has failed.
    v = jnp.where(jnp.isnan(w), w, _integers(w / scale, budget, axes, fmt))
    return scale * v


def _quantize_weights_fwd(w, scale, budget, axes, fmt):
    q = _quantize_weights(w, scale, budget, axes, fmt)
    return q, (w, scale, q)  # q is kept for the layer's own gradient anyway


def _quantize_weights_bwd(axes, fmt, residuals, g):
    w, scale, q = residuals
    u, v = w / scale, jnp.round(q / scale)
    inside = jnp.abs(u) <= fmt.largest
    to_scale = _weight_scale_cotangent(g, u, v, fmt.largest, scale)
    return jnp.where(inside, g, jnp.float32(0)), to_scale, None


_quantize_weights.defvjp(_quantize_weights_fwd, _quantize_weights_bwd)


def check_scale(x: jax.Array, scale: jax.Array) -> None:
    """Raises ValueError unless scale has the axes of x, each 1 or equal."""
    if scale.ndim != x.ndim or not broadcasts_to(scale.shape, x.shape):
        raise ValueError(
            f"scale of shape {scale.shape} must have the axes of {x.shape}, each 1 or equal"
        )


def quantize_weights(
    w: jax.Array,
    scale: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    axes: tuple[int, ...],
    fmt: WeightFormat = WeightFormat(),
) -> jax.Array:
    """Weights as ``scale * v``, each group of v within its term budget; differentiable.

    The gradient rule stands in the module's docstring. At ``budget == fmt.max_budget`` this is
    plain uniform quantization, and with ``group_size=1`` the budget is a per-weight term cap.

    Args:
      w: float weights of any shape; computed in float32.
      scale: positive float, as many axes as w, each 1 or equal.
      budget: terms per group, an integer in [0, fmt.max_budget], or an array of them that
        broadcasts to w with size 1 along axes, such as one per output channel; may be traced.
      axes: the adjacent axes along which groups lie (the reduction axis), flattened in order.
      fmt: group size, encoding, method and width.

    Returns:
      The shape and dtype of w.

    Raises:
      ValueError: scale, axes or budget do not fit w, or the budget is out of range.
    """
    check_scale(w, scale)
    budget = fmt.aligned_budget(budget, w.shape, axes)
    q = _quantize_weights(w.astype(jnp.float32), scale.astype(jnp.float32), budget, axes, fmt)
    return q.astype(w.dtype)


def quantize_weights_relaxed(
    w: jax.Array,
    scale: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    axes: tuple[int, ...],
    fmt: WeightFormat = WeightFormat(),
) -> jax.Array:
    """Weights between their projections onto the two whole budgets around a relaxed one.

    ``(1 - f) q(k) + f q(k + 1)`` with ``k + f = budget``, so that a budget can be trained: its
    gradient is the cotangent's product with ``q(k + 1) - q(k)``, what one more term changes. At
    whole budgets this is `quantize_weights`. It projects twice.

    Args:
      w: as for `quantize_weights`, as are the others.
      scale: positive float.
      budget: terms per group, a real number or an array of them that broadcasts to w with size 1
        along axes; below 0 and above fmt.max_budget the nearest of them counts, with a gradient
        of 0.
      axes: the adjacent axes along which groups lie.
      fmt: the weight format.

    Returns:
      The shape and dtype of w; differentiable in w, scale and budget.

    Raises:
      ValueError: scale, axes or budget do not fit w.
    """
    budget = align_budget(jnp.asarray(budget, jnp.float32), w.shape, axes)
    budget = jnp.clip(budget, 0, fmt.max_budget)
    whole = jnp.minimum(jnp.floor(jax.lax.stop_gradient(budget)), fmt.max_budget - 1)
    fewer, more = (
        quantize_weights(w, scale, whole.astype(jnp.int32) + extra, axes=axes, fmt=fmt)
        for extra in (0, 1)
    )
    return fewer + (budget - whole).astype(w.dtype) * (more - fewer)


@functools.partial(jax.jit, static_argnames=("axes", "bits"))
def max_scale(w: jax.Array, *, axes: tuple[int, ...], bits: int = 8) -> jax.Array:
    """The scale at which the largest magnitude over axes becomes the largest integer.

    Args:
      w: weights or activations.
      axes: the axes that share a scale.
      bits: width of the integers.

    Returns:
      float32 with the axes of w, those in ``axes`` of size 1; 1 where all of w is 0.
    """
    largest = (1 << (bits - 1)) - 1
    peak = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axes, keepdims=True)
    return jnp.where(peak > 0, peak / largest, jnp.float32(1))


@functools.partial(jax.jit, static_argnames="up")
def power_of_two(scale: jax.Array, *, up: bool = False) -> jax.Array:
    """The power of two nearest to each scale in the logarithm, or the next one not below it.

    Its gradient is passed straight through, so that learned scales keep their float values, as in
    Jain et al., "Trained Quantization Thresholds", MLSys 2020, sec. 3.

    Args:
      scale: float32, positive; 0 stays 0.
      up: round up, so that nothing within the scale's range leaves it.

    Returns:
      float32 of the shape of scale.

    >>> power_of_two(jnp.array([0.7, 0.75, 1.0])).tolist()
    [0.5, 1.0, 1.0]
    """
    mantissa, exponent = jnp.frexp(jax.lax.stop_gradient(scale))  # mantissa in [1/2, 1)
    is_lower = mantissa <= 0.5 if up else mantissa < math.sqrt(0.5)
    power = jnp.ldexp(jnp.float32(1), exponent - is_lower.astype(jnp.int32))
    # Exact: the difference of two numbers within a factor of two has no rounding error.
    return scale + jnp.where(scale > 0, power - jax.lax.stop_gradient(scale), jnp.float32(0))


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _search_scale(w, budget, importance, ratios, slack, axes, scale_axes, fmt, powers):
    w = w.astype(jnp.float32)
    largest = max_scale(w, axes=scale_axes, bits=fmt.bits)
    if powers:
        largest = power_of_two(largest, up=True)

    def try_ratio(ratio: jax.Array) -> jax.Array:
        scale = largest * ratio
        error = (scale * _integers(w / scale, budget, axes, fmt) - w) ** 2
        if importance is not None:
            error = error * jnp.broadcast_to(importance, w.shape)
        return jnp.sum(error, axis=scale_axes, keepdims=True)

    errors = jax.lax.map(try_ratio, ratios)
    near = errors <= (1.0 + slack) * jnp.min(errors, axis=0, keepdims=True)
    tried = ratios.reshape(-1, *(1,) * w.ndim)
    roomy = jnp.max(jnp.where(near, tried, 0.0), axis=0)
    return largest * jnp.where(slack > 0.0, roomy, ratios[jnp.argmin(errors, axis=0)])


def search_scale(
    w: jax.Array,
    budget: jax.typing.ArrayLike,
    *,
    axes: tuple[int, ...],
    scale_axes: tuple[int, ...],
    fmt: WeightFormat = WeightFormat(),
    importance: jax.Array | None = None,
    candidates: int = 24,
    lowest: float = 0.4,
    slack: float = 0.0,
    powers_of_two: bool = False,
) -> jax.Array:
    """The scale per channel at which the projected weights lie nearest to w.

    Tries ``candidates`` multiples from ``lowest`` to 1.15 of `max_scale` and keeps, per channel,
    the one of least squared error at the budget. With few terms the best grid is not the one that
    just reaches the largest weight, since few values near the top of the range are left.

    Values of one term repeat at twice the scale, so that with few of them the error is nearly the
    same over a wide range of scales. Weights that are left grow in training, and with few bits a
    larger scale leaves them room: ``slack`` is the share of the least error that may be given for
    it.

    Args:
      w: float weights.
      budget: terms per group, as for `quantize_weights`; may be traced.
      axes: the adjacent axes along which groups lie.
      scale_axes: the axes that share a scale (all but the output channels).
      fmt: the weight format.
      importance: non-negative weights of the squared errors, broadcastable to w.
      candidates: how many scales to try, 1 or more.
      lowest: the smallest multiple.
      slack: keep the largest scale whose error exceeds the least by no more than this share, and
        try as many more multiples, up to 2.3; 0 keeps the best one.
      powers_of_two: try the power of two at or above `max_scale` and the three below it instead.

    Returns:
      float32, shaped as by `max_scale`.

    Raises:
      ValueError: no candidates, slack is negative, or concrete weights are NaN or importance is not
        finite and 0 or more.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates}")
    if not slack >= 0.0:
        raise ValueError(f"slack must be 0 or more, got {slack}")
    check_weights(w)
    if importance is not None:
        check_importance(importance)
    budget = fmt.aligned_budget(budget, w.shape, axes)
    ratios = jnp.linspace(lowest, 1.15, candidates, dtype=jnp.float32)
    if slack > 0.0:
        further = jnp.linspace(1.15, 2.3, candidates + 1, dtype=jnp.float32)[1:]
        ratios = jnp.concatenate([ratios, further])
    if powers_of_two:
        ratios = jnp.asarray(POWER_RATIOS)
    return _search_scale(w, budget, importance, ratios, slack, axes, scale_axes, fmt, powers_of_two)
