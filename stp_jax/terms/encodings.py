"""Encodings: how an integer is written as a sum of signed powers of two (terms).

Every encoding is expressed as digits in {-1, 0, +1}, one per power of two, so that
``sum(digits * 2**e)`` is the value and the number of non-zero digits is the number of terms.

* ``binary``: sign and magnitude.
* ``booth4``: radix-4 modified Booth (MacSorley, Proc. IRE 49(1), 1961) of the two's complement.
* ``naf``: the non-adjacent form, also canonical signed digit (Reitwiesner, Adv. Comput. 1, 1960);
  it has the fewest terms of any signed-digit form.
* ``hese``: the hybrid encoding as released with Kung, McDanel and Zhang, "Term Quantization"
  (SC20): a run of two or more ones becomes its two end points, a single one stays. The rule that
  the paper states is minimal and gives the digits of ``naf``; the released one is not minimal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

MAX_BITS = 24  # 3n, which the NAF needs, must fit an int32 with room for Booth's carry

Planes = tuple[jax.Array, jax.Array]  # bit masks of the positive and of the negative terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingRule:
    """An encoding: its rule, and what projections and hardware may rely on.

    Attributes:
      planes: int32 values → bit masks (plus, minus), int32 of the same shape: bit e is set where
        the value has the term ``+2**e``, ``-2**e``. Bits at `digits` and above are ignored.
      digits: bits → digits that hold every value of magnitude below ``2**bits``.
      most: bits → the most terms of an integer of magnitude up to ``2**(bits - 1)``, in closed
        form; None counts all integers.
      convex: whether the squared error of the best value with at most t terms is convex in t at
        every real weight, and that value follows from the one with t - 1 by its nearest power of
        two, so that matching pursuit is an optimal projection (see `stp_jax.terms.optimal`).
      truncates: whether a value without its smallest terms needs no more terms than are left, so
        that a projection may cut digits off.
      encoder: entry of the technology table for the parallel encoder at the array's edge; None if
        integers need no encoder.
    """

    planes: Callable[[jax.Array], Planes]
    digits: Callable[[int], int] = lambda bits: bits + 1
    most: Callable[[int], int] | None = None
    convex: bool = False
    truncates: bool = True
    encoder: str | None = None


def signed(planes: Callable[[jax.Array], Planes]) -> Callable[[jax.Array], Planes]:
    """Lifts a rule on magnitudes to signed values: a negative value swaps the planes."""

    def of_signed(q: jax.Array) -> Planes:
        plus, minus = planes(jnp.abs(q))
        negative = q < 0
        return jnp.where(negative, minus, plus), jnp.where(negative, plus, minus)

    return of_signed


def _binary_planes(q: jax.Array) -> Planes:
    return jnp.maximum(q, 0), jnp.maximum(-q, 0)


def _booth4_planes(q: jax.Array) -> Planes:
    # Digit i is -2*b[2i+1] + b[2i] + b[2i-1], so at even positions 2i:
    even = jnp.int32(0x55555555)
    high, mid, low = (q >> 1) & even, q & even, (q << 1) & even
    one, two = mid ^ low, ~(mid ^ low) & (mid ^ high)  # |digit| is 1, is 2
    plus = (one & ~high) | ((two & ~high) << 1)
    minus = (one & high) | ((two & high) << 1)
    return plus, minus


def _naf_planes(magnitude: jax.Array) -> Planes:
    # 3n - n = 2n, digit by digit: the digits of n are where 3n and n differ, one position up.
    half = magnitude >> 1
    x3 = magnitude + half  # 3n >> 1, without the overflow
    changed = half ^ x3
    return x3 & changed, half & changed


def _hese_planes(magnitude: jax.Array) -> Planes:
    above, below = magnitude >> 1, magnitude << 1
    single = magnitude & ~above & ~below
    top, bottom = magnitude & ~above & below, magnitude & above & ~below
    return single | (top << 1), bottom


# By name. ``ENCODINGS["mine"] = EncodingRule(planes=…)`` adds one. Compiled programs are kept by
# name, so a name stands for one rule as long as the process lives.
ENCODINGS: dict[str, EncodingRule] = {
    "binary": EncodingRule(
        planes=_binary_planes,
        digits=lambda bits: bits,
        most=lambda bits: max(bits - 1, 1),
    ),
    "booth4": EncodingRule(
        planes=_booth4_planes,
        digits=lambda bits: 2 * (bits // 2 + 1),
        truncates=False,  # 7 = 8 - 1 leaves 8, which is 16 - 8
        encoder="encode_booth4",
    ),
    "naf": EncodingRule(
        planes=signed(_naf_planes),
        most=lambda bits: (bits + 1) // 2,  # no two digits are adjacent
        convex=True,
        encoder="encode_naf",
    ),
    "hese": EncodingRule(planes=signed(_hese_planes), encoder="encode_hese"),
}
Encoding = Annotated[str, ENCODINGS]  # a key of `ENCODINGS`


def check_encoding(encoding: str, bits: int) -> None:
    """Raises ValueError unless ``encoding`` exists and ``bits`` is an int in [1, 24]."""
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}; choose one of {', '.join(ENCODINGS)}")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")


def num_digits(encoding: Encoding = "naf", bits: int = 8) -> int:
    """Digits that hold every value of magnitude below ``2**bits``: one more than bits if signed."""
    check_encoding(encoding, bits)
    return ENCODINGS[encoding].digits(bits)


@functools.cache
def count_table(encoding: Encoding = "naf", bits: int = 8) -> np.ndarray:
    """The terms of every integer from ``-2**(bits - 1)`` to ``2**(bits - 1)``, in this order.

    Returns:
      int32 of shape ``[2**bits + 1]``, read-only; entry ``q + 2**(bits - 1)`` belongs to q.

    >>> count_table("naf", bits=3).tolist()
    [1, 2, 1, 1, 0, 1, 1, 2, 1]
    """
    top = 1 << (bits - 1)
    with jax.ensure_compile_time_eval():  # a constant, also where it is asked for under a trace
        table = np.asarray(count(np.arange(-top, top + 1), encoding, bits))
    table.setflags(write=False)
    return table


@functools.cache
def max_terms(encoding: Encoding = "naf", bits: int = 8) -> int:
    """The most terms that an integer of magnitude up to ``2**(bits - 1)`` needs."""
    check_encoding(encoding, bits)
    most = ENCODINGS[encoding].most
    return int(count_table(encoding, bits).max()) if most is None else most(bits)


def _check_magnitude(q: np.ndarray | jax.Array, bits: int) -> None:
    if q.size:
        largest = max(int(q.max()), -int(q.min()))
        if largest >= 1 << bits:
            raise ValueError(f"value of magnitude {largest} does not fit bits={bits}")


def as_wide_integers(x: object) -> np.ndarray | None:
    """Integers that are no JAX arrays yet, which would lose what lies above 32 bits; else None.

    Raises:
      TypeError: x holds text or other objects.
    """
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        return None
    array = np.asarray(x)
    if array.dtype.kind in "SU":  # JAX would take it for the name of a type
        raise TypeError(f"expected numbers, got {x!r}")
    if array.dtype.kind == "O":
        raise TypeError(f"expected an array of numbers, got one of Python objects: {x!r}")
    return array if array.dtype.kind in "iu" else None


def _as_int32(q: jax.typing.ArrayLike) -> jax.Array:
    wide = as_wide_integers(q)
    if wide is not None:
        _check_magnitude(wide, 31)
    q = jnp.asarray(q)
    if not jnp.issubdtype(q.dtype, jnp.integer):
        raise TypeError(
            f"terms are defined on integers, got dtype {q.dtype}; "
            "divide by the scale, round and cast first"
        )
    return q.astype(jnp.int32)


def digit_planes(
    q: jax.typing.ArrayLike, encoding: Encoding = "naf", bits: int = 8
) -> tuple[jax.Array, jax.Array]:
    """The positive and the negative terms of each value as two bit masks (int32, shape of q).

    Bit ``e`` of the first mask is set where the value has the term ``+2**e``, of the second where
    it has ``-2**e``. Values of magnitude ``2**bits`` or more are outside the encoding's range;
    concrete ones raise ValueError, traced ones cannot be checked.
    """
    check_encoding(encoding, bits)
    q = _as_int32(q)
    if not isinstance(q, jax.core.Tracer):
        _check_magnitude(q, bits)
    plus, minus = ENCODINGS[encoding].planes(q)
    # Booth's sign digits repeat above the top; they cancel within the digits that are kept.
    mask = jnp.int32((1 << num_digits(encoding, bits)) - 1)
    return plus & mask, minus & mask


def encode(q: jax.typing.ArrayLike, encoding: Encoding = "naf", bits: int = 8) -> jax.Array:
    """Writes integers as signed digits.

    Args:
      q: integers of any shape, magnitude below ``2**bits``.
      encoding: a name in `ENCODINGS`: ``binary``, ``booth4``, ``naf``, ``hese`` or one of your own.
      bits: width of the magnitude.

    Returns:
      int32 digits in {-1, 0, 1}, shape ``q.shape + (num_digits(encoding, bits),)``, least
      significant first: ``q == sum(digits * 2**arange(num_digits))``.

    Raises:
      ValueError: unknown encoding, bits out of range, or a value that does not fit.
      TypeError: q is not of an integer dtype.

    >>> encode(7, "naf", bits=4).tolist()
    [-1, 0, 0, 1, 0]
    """
    plus, minus = digit_planes(q, encoding, bits)
    exponents = jnp.arange(num_digits(encoding, bits), dtype=jnp.int32)
    exponents = exponents.reshape((1,) * plus.ndim + (-1,))
    plus, minus = plus[..., None], minus[..., None]
    return ((plus >> exponents) & 1) - ((minus >> exponents) & 1)


def decode(digits: jax.typing.ArrayLike, encoding: Encoding = "naf") -> jax.Array:
    """The integers that the digits stand for; the inverse of `encode`.

    Args:
      digits: integers in {-1, 0, 1}, least significant first on the last axis.
      encoding: checked for existence only, since all encodings share the digit set.

    Returns:
      int32 of shape ``digits.shape[:-1]``.

    Raises:
      ValueError: a digit is not in {-1, 0, 1} (concrete ones are checked), or there is no axis.
      TypeError: digits are not of an integer dtype.

    >>> int(decode([-1, 0, 0, 1, 0]))
    7
    """
    digits = _as_int32(digits)
    if digits.ndim == 0:
        raise ValueError("digits need at least one axis, the last, to hold the powers of two")
    check_encoding(encoding, max(digits.shape[-1] - 2, 1))
    if not isinstance(digits, jax.core.Tracer) and bool((jnp.abs(digits) > 1).any()):
        raise ValueError("digits must be -1, 0 or 1")
    weights = jnp.left_shift(jnp.int32(1), jnp.arange(digits.shape[-1], dtype=jnp.int32))
    return jnp.sum(digits * weights.reshape((1,) * (digits.ndim - 1) + (-1,)), axis=-1)


def count(q: jax.typing.ArrayLike, encoding: Encoding = "naf", bits: int = 8) -> jax.Array:
    """The number of terms of each integer, int32 of the shape of q.

    Raises as `encode` does.

    >>> count([0, 1, 7, 11]).tolist()
    [0, 1, 2, 3]
    """
    plus, minus = digit_planes(q, encoding, bits)
    return jax.lax.population_count(plus) + jax.lax.population_count(minus)
