"""Few-term codebooks: the integers that an encoding writes with at most t terms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.terms.encodings import Encoding, check_encoding, count_table


def few_term_values(
    terms: int, encoding: Encoding = "naf", bits: int = 8, limit: int | None = None
) -> np.ndarray:
    """The integers of at most ``terms`` terms, sorted, as int32.

    Args:
      terms: the most terms of a value, 0 or more.
      encoding: how terms are counted.
      bits: width; values lie in ``[-2**(bits - 1), 2**(bits - 1)]``.
      limit: the largest magnitude, if less than ``2**(bits - 1)``.

    Raises:
      ValueError: terms is negative, limit out of range, or encoding or bits do not exist.

    >>> few_term_values(1, bits=4).tolist()
    [-8, -4, -2, -1, 0, 1, 2, 4, 8]
    """
    check_encoding(encoding, bits)
    if terms < 0:
        raise ValueError(f"terms must be 0 or more, got {terms}")
    top = 1 << (bits - 1)
    if limit is not None and not 0 <= limit <= top:
        raise ValueError(f"limit must be from 0 to {top} for bits={bits}, got {limit}")
    values = np.arange(-top, top + 1, dtype=np.int32)
    return values[
        (count_table(encoding, bits) <= terms)
        & (np.abs(values) <= (top if limit is None else limit))
    ]


def nearest_values(w: jax.Array, values: np.ndarray) -> jax.Array:
    """The nearest of the sorted values to each w, the lower one on ties."""
    if len(values) == 1:
        return jnp.full(w.shape, values[0], jnp.float32)
    table = jnp.asarray(values, jnp.float32)
    above = jnp.clip(jnp.searchsorted(table, w), 1, len(values) - 1)
    low, high = table[above - 1], table[above]
    return jnp.where(w - low <= high - w, low, high)
