"""The integer network: a program of additions and shifts on int32, step by step.

A value of the network is an integer times a power of two, whose exponent is known beforehand and
may differ by channel; only the integers are computed. `stp_jax.quant.integer_network` makes such
programs of STP models.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.quant.layers import LayerFormat
from stp_jax.terms.activations import activation_integers
from stp_jax.terms.encodings import digit_planes

Arithmetic = Literal["multiply", "shift_add"]
INT32 = (-(1 << 31), (1 << 31) - 1)
COMBINATIONS: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "max": jnp.maximum,
    "min": jnp.minimum,
}


def shift_right(x: jax.Array, amount: np.ndarray) -> jax.Array:
    """``x / 2**amount`` rounded to nearest, ties to even as ``jnp.round`` does; amounts 0 to 31."""
    below_half = np.where(amount > 0, (1 << np.maximum(amount - 1, 0)) - 1, 0).astype(np.int32)
    odd = (x >> amount) & np.minimum(amount, 1)  # 0 where nothing is shifted
    return (x + below_half + odd) >> amount


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One operation on the integers of earlier steps.

    Attributes:
      layer: path of the last layer before it, or its own.
      inputs: numbers of the steps whose results it takes; 0 is the network's input.
      shape: of its result, for one example, the batch axis included.
      exponent: int32, broadcastable to the shape: the result stands for integers times 2**exponent.
      bits: width of a two's complement register that holds every result.
      error: largest distance of a result, as a real number, from exact arithmetic.
    """

    layer: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    exponent: np.ndarray
    bits: int
    error: float = 0.0

    def run(self, *x: jax.Array) -> jax.Array:
        """The step's integers, int32, from those of its inputs."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, in a few words."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Product(Step):
    """A convolution or dense layer: integer inputs times integer weights, summed in int32."""

    weights: np.ndarray  # int32 [*window, in, out], or [in, out]
    format: LayerFormat  # of the weights
    budget: np.ndarray  # terms per group, one number or one for each filter
    # Of a convolution: window_strides, padding, rhs_dilation, feature_group_count, …
    options: Mapping[str, Any]
    arithmetic: Arithmetic
    operand: Any  # np.int8 where inputs and weights fit it, else np.int32

    def run(self, *x: jax.Array) -> jax.Array:
        """The sums, by products of integers or by shifts of sums for each exponent of a term."""
        if self.arithmetic == "multiply":
            return self._product(x[0], self.weights)
        rule = self.format.rule
        with jax.ensure_compile_time_eval():
            plus, minus = map(np.asarray, digit_planes(self.weights, rule.encoding, rule.bits))
        total = jnp.zeros(self.shape, jnp.int32)
        for e in range(int((plus | minus).max(initial=0)).bit_length()):
            signs = (plus >> e & 1) - (minus >> e & 1)
            total = total + (self._product(x[0], signs) << e)
        return total

    def _product(self, x: jax.Array, weights: np.ndarray) -> jax.Array:
        x, kernel = x.astype(self.operand), jnp.asarray(weights.astype(self.operand))
        if not self.options:
            numbers = (((x.ndim - 1,), (0,)), ((), ()))
            return jax.lax.dot_general(x, kernel, numbers, preferred_element_type=jnp.int32)
        return jax.lax.conv_general_dilated(
            x, kernel, **self.options, preferred_element_type=jnp.int32
        )

    def describe(self) -> str:  # noqa: D102
        size, terms = "x".join(map(str, self.weights.shape)), self.format.rule.format
        return f"{size} weights, groups of {terms.group_size}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shift(Step):
    """A shift to the left, which loses nothing, so that exponents agree."""

    amount: np.ndarray

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        return x[0] << self.amount

    def describe(self) -> str:  # noqa: D102
        return f"<< {_span(self.amount)}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Requantize(Step):
    """The quantizer of a layer's input: a rounding shift to its scale, and a clip.

    Rounds to nearest, ties to even, as the STP model does.
    """

    right: np.ndarray  # shift to the right where positive, to the left where negative
    largest: int

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        (y,) = x
        left = np.maximum(-self.right, 0)
        if left.any():  # what lies outside is clipped in any case
            y = jnp.clip(y, -self.largest - 1, self.largest + 1) << left
        y = shift_right(y, np.maximum(self.right, 0))
        return jnp.clip(y, -self.largest, self.largest)

    def describe(self) -> str:  # noqa: D102
        return f">> {_span(self.right)}, clip to +-{self.largest}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Combine(Step):
    """An operation on two integers of one exponent; a constant may be the second."""

    operation: Literal["add", "sub", "max", "min"]
    constant: np.ndarray | None = None

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        first, second = x if self.constant is None else (x[0], self.constant)
        return COMBINATIONS[self.operation](first, second)

    def describe(self) -> str:  # noqa: D102
        if self.constant is None:
            return self.operation
        return f"{self.operation} {_span(self.constant)}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window(Step):
    """The maximum or the sum over windows, as of pooling; or the sum over whole axes."""

    operation: Literal["max", "sum"]
    options: Mapping[str, Any]  # of jax.lax.reduce_window; of a sum over axes, ``axes``

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        if "axes" in self.options:
            return jnp.sum(x[0], self.options["axes"], dtype=jnp.int32)
        start, reduce = {"max": (INT32[0], jax.lax.max), "sum": (0, jax.lax.add)}[self.operation]
        return jax.lax.reduce_window(x[0], np.int32(start), reduce, **self.options)

    def describe(self) -> str:  # noqa: D102
        over = self.options.get("axes", self.options.get("window_dimensions"))
        return f"{self.operation} over {'axes' if 'axes' in self.options else 'windows'} {over}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Step):
    """A constant factor as a sum of few shifts, after a rounding shift that makes room for it."""

    factor: float  # the one that is meant
    right: int
    terms: tuple[tuple[int, int], ...]  # sign and shift to the left, largest first

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        y = shift_right(x[0], np.asarray(self.right, np.int32))
        parts = [y << np.int32(e) if sign > 0 else -(y << np.int32(e)) for sign, e in self.terms]
        return sum(parts[1:], start=parts[0])

    def describe(self) -> str:  # noqa: D102
        return f"times {self.factor:.6g} in {len(self.terms)} terms"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Arrange(Step):
    """A change of shape, order or extent; elements are moved, or zeros added."""

    primitive: Any  # of jax.lax
    options: Mapping[str, Any]

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        return self.primitive.bind(*x, **self.options)

    def describe(self) -> str:  # noqa: D102
        return self.primitive.name


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pad(Step):
    """Zeros around, before, or between the elements."""

    padding: tuple[tuple[int, int, int], ...]

    def run(self, *x: jax.Array) -> jax.Array:  # noqa: D102
        return jax.lax.pad(x[0], np.int32(0), self.padding)

    def describe(self) -> str:  # noqa: D102
        return "pad"


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}...{high}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntegerNetwork:
    """An STP model as a program on integers, from `stp_jax.integer_network`.

    Call it on integers, under ``jax.jit`` if it is to be fast; print it to read its steps.

    Attributes:
      steps: in order; step n (from 1 on) is ``steps[n - 1]``.
      input_shape: of one example.
      input_exponent: an input integer q stands for q * 2**input_exponent.
      input_bits: width of the input integers.
      exponent: of the outputs, the same for all of them.
      error: largest distance of an output, as a real number, from exact arithmetic; 0 where every
        step is exact.
    """

    steps: tuple[Step, ...]
    input_shape: tuple[int, ...]
    input_exponent: int
    input_bits: int
    exponent: int
    error: float

    def quantize(self, x: jax.typing.ArrayLike) -> jax.Array:
        """The input integers, int32 [N, *input_shape], of a float input of that shape."""
        scale = jnp.float32(2.0**self.input_exponent).reshape((1,) * np.ndim(x))
        return activation_integers(jnp.asarray(x), scale, bits=self.input_bits).astype(jnp.int32)

    def dequantize(self, y: jax.Array) -> jax.Array:
        """Outputs as real numbers, float32."""
        return y.astype(jnp.float32) * jnp.float32(2.0**self.exponent)

    def __call__(self, q: jax.Array) -> jax.Array:
        """Runs the program on each example.

        Args:
          q: integers [N, *input_shape], as from `quantize`.

        Returns:
          int32 outputs [N, …].

        Raises:
          ValueError: q is of another shape.
          TypeError: q are no integers.
        """
        if not jnp.issubdtype(q.dtype, jnp.integer):
            raise TypeError(f"the network takes integers (see its quantize), got {q.dtype}")
        if q.shape[1:] != self.input_shape:
            raise ValueError(f"expected shape (N, *{self.input_shape}), got {q.shape}")
        return jax.vmap(lambda example: self.run(example[None])[-1][0])(q.astype(jnp.int32))

    def run(
        self, q: jax.Array, product: Callable[[Product, jax.Array], jax.Array] | None = None
    ) -> list[jax.Array]:
        """Every step's integers for one example.

        Args:
          q: int32 [1, *input_shape].
          product: computes a layer's sums in place of `Product.run`, as hardware does.

        Returns:
          The input, and what each step gives.
        """
        values = [q]
        for step in self.steps:
            inputs = [values[n] for n in step.inputs]
            if product is not None and isinstance(step, Product):
                values.append(product(step, *inputs))
            else:
                values.append(step.run(*inputs))
        return values

    def __str__(self) -> str:
        """A line per step: number, kind, layer, inputs, shape, exponents, bits."""
        shape = "x".join(map(str, self.input_shape))
        lines = [f"{0:4} input  [{shape}]  2**{self.input_exponent}  {self.input_bits} bits"]
        for n, step in enumerate(self.steps, 1):
            shape = "x".join(map(str, step.shape[1:]))
            of = ", ".join(map(str, step.inputs))
            error = f"  error < {step.error:.2g}" if step.error else ""
            lines.append(
                f"{n:4} {type(step).__name__} {step.layer} ({of}): {step.describe()}  [{shape}]  "
                f"2**{_span(step.exponent)}  {step.bits} bits{error}"
            )
        return "\n".join(lines)


def naf_terms(n: int) -> tuple[tuple[int, int], ...]:
    """The non-adjacent form of a positive integer as (sign, exponent), largest exponent first."""
    terms, exponent = [], 0
    while n:
        if n & 1:
            sign = 2 - (n & 3)
            terms.append((sign, exponent))
            n -= sign
        n, exponent = n >> 1, exponent + 1
    return tuple(reversed(terms))


def few_terms(
    factor: float, tolerance: float = 2.0**-12
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """A positive factor as ``n * 2**-fraction``, n being a sum of as few powers of two as possible.

    Args:
      factor: positive.
      tolerance: relative error allowed.

    Returns:
      The fraction's bits, and the terms of n.

    >>> few_terms(0.75), few_terms(1 / 49)
    ((2, ((1, 2), (-1, 0))), (17, ((1, 11), (1, 9), (1, 7), (-1, 4), (1, 2), (-1, 0))))
    """
    start = -math.frexp(factor)[1]
    tried = []
    for fraction in range(start, start + 26):
        n = round(math.ldexp(factor, fraction))
        if abs(math.ldexp(n, -fraction) - factor) <= tolerance * factor:
            tried.append((len(naf_terms(n)), n, fraction))
    _, n, fraction = min(tried)
    return fraction, naf_terms(n)
