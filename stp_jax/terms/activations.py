"""Activation quantization, optionally limited to s power-of-two terms.

The data side of term revealing (Kung, McDanel and Zhang, SC20, sec. III): weights share a budget
per group, which is known before the run, while each activation is cut to s terms as it arrives, so
that a pair-serial PE spends at most k * s cycles on a group. ``greedy`` is their rule, the s
largest terms of the encoded integer; ``optimal`` is the nearest value of at most s terms.

Both start from the rounded integer, since that is what the hardware sees. Their values may reach
``2**(bits - 1)``, one beyond the integers: a term on its way to a PE is not stored as an integer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stp_jax.terms.encodings import Encoding, check_encoding, max_terms
from stp_jax.terms.projection import METHODS, Method
from stp_jax.terms.quantizers import TINY, check_scale, scale_cotangent


def check_activation_terms(terms: int | None) -> None:
    """Raises ValueError unless terms is None or a positive integer."""
    if terms is not None and (not isinstance(terms, int) or terms < 1):
        raise ValueError(f"terms of an activation must be None or a positive integer, got {terms}")


def limit_terms(
    q: jax.typing.ArrayLike,
    terms: int | None,
    *,
    method: Method = "optimal",
    encoding: Encoding = "naf",
    bits: int = 8,
) -> jax.Array:
    """Cuts every integer to at most ``terms`` terms, on its own.

    Args:
      q: integers of any shape, int or float, of magnitude up to ``2**(bits - 1)``.
      terms: s, 1 or more; None keeps all.
      method: ``optimal``, the nearest value of at most s terms, or ``greedy``, the s largest terms
        (term revealing, SC20).
      encoding: how terms are counted.
      bits: width of the integers.

    Returns:
      float32 of the shape of q, holding integers of magnitude up to ``2**(bits - 1)``.

    Raises:
      ValueError: an argument is out of range.

    >>> limit_terms([127, -11, 3], 2).tolist(), limit_terms([127, -11, 3], 1).tolist()
    ([127.0, -12.0, 3.0], [128.0, -8.0, 4.0])
    """
    check_encoding(encoding, bits)
    check_activation_terms(terms)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    q = jnp.asarray(q, jnp.float32)
    if terms is None or terms >= max_terms(encoding, bits):
        return q
    return METHODS[method].limit_values(q, terms, encoding, bits)


def activation_integers(
    x: jax.Array,
    scale: jax.Array,
    *,
    bits: int = 8,
    terms: int | None = None,
    method: Method = "optimal",
    encoding: Encoding = "naf",
) -> jax.Array:
    """The integers of quantized activations: x over scale, rounded, clipped, cut to its terms.

    Args:
      x: float activations of any shape; computed in float32.
      scale: positive float, broadcastable to x with the same number of axes.
      bits: width of the integers, 2 or more; rounding stops at ``±(2**(bits - 1) - 1)``.
      terms, method, encoding: as for `limit_terms`.

    Returns:
      float32 of the shape of x.
    """
    largest = (1 << (bits - 1)) - 1
    q = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -largest, largest)
    return limit_terms(q, terms, method=method, encoding=encoding, bits=bits)


def _known(scale: jax.Array) -> jax.Array:
    """A scale to divide by, also where there is none yet."""
    return jnp.maximum(scale, TINY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _quantize(x, scale, bits, terms, method, encoding):
    known = _known(scale)
    q = activation_integers(x, known, bits=bits, terms=terms, method=method, encoding=encoding)
    return jnp.where(scale > 0, known * q, x)


def _quantize_fwd(x, scale, *static):
    quantized = _quantize(x, scale, *static)
    return quantized, (x, scale, quantized)  # kept for the layer's own gradient anyway


def _quantize_bwd(bits, terms, method, encoding, residuals, g):
    x, scale, quantized = residuals
    largest, known, zero = (1 << (bits - 1)) - 1, _known(scale), jnp.float32(0)
    u, v = x / known, jnp.round(quantized / known)
    passes = (jnp.abs(u) <= largest) | (scale <= 0)
    to_scale = jnp.where(scale > 0, scale_cotangent(g, u, v, largest, known), zero)
    return jnp.where(passes, g, zero), to_scale


_quantize.defvjp(_quantize_fwd, _quantize_bwd)


def quantize_activations(
    x: jax.Array,
    scale: jax.Array,
    *,
    bits: int = 8,
    terms: int | None = None,
    method: Method = "optimal",
    encoding: Encoding = "naf",
) -> jax.Array:
    """Activations on a symmetric integer grid, ``scale * round(x / scale)``; differentiable.

    The gradient rule is that of `stp_jax.terms.quantizers`, with or without a limit of terms.

    Args:
      x: float activations of any shape; computed in float32.
      scale: float, as many axes as x, each 1 or equal; where it is 0, x stays as it is.
      bits: width of the integers, 2 or more; they reach ``±(2**(bits - 1) - 1)``.
      terms: the most terms of an integer (s of term revealing); None keeps all.
      method, encoding: how integers are cut to their terms; see `limit_terms`.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: scale does not fit x, or another argument is out of range.
    """
    check_scale(x, scale)
    if bits < 2:
        raise ValueError(f"bits must be 2 or more to hold a sign, got {bits}")
    scale = scale.astype(jnp.float32)
    return _quantize(x.astype(jnp.float32), scale, bits, terms, method, encoding).astype(x.dtype)
