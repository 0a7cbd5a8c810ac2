"""Numbers of the model: exact NumPy where they are concrete, JAX where they are traced.

`evaluate` converts its arguments once; from then on each function takes its arrays' own namespace.
Concrete numbers are float64 and int64, exact for integers up to 2**53; under ``jit``, ``vmap`` or
``grad`` they are float32 and int32, exact up to 2**24 (float32) and within a few 1e-7 above.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Vector = np.ndarray | jax.Array  # one number a layer
Real = np.ndarray | jax.Array | np.number | float  # one number, or one a layer
Operands = Mapping[str, ArrayLike]  # integers by layer name
# Terms a group: of all layers, one a layer, or by layer name; None for full precision.
Budgets = Mapping[str, Real | None] | Sequence[Real | None] | ArrayLike | None

INT32_END = 1 << 31
EXACT_END = 1 << 53  # from here on float64 skips integers
INTEGER = {"integer": True}  # metadata of a dataclass's field that the model counts with

_Owner = TypeVar("_Owner")
_NUMBERS = (int, float, np.number, np.ndarray, jax.Array)


def namespace_for(*trees: Any) -> ModuleType:
    """``jax.numpy`` if any leaf is traced, else ``numpy``: where a model of them is computed."""
    leaves = jax.tree.leaves(trees)
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np


def namespace_of(*numbers: Any) -> ModuleType:
    """The numbers' own namespace: ``jax.numpy`` if one of them is JAX's, else ``numpy``."""
    return jnp if any(isinstance(number, jax.Array) for number in numbers) else np


def as_real(x: Any, xp: ModuleType) -> Any:
    """float64 in NumPy, float32 in JAX; a NumPy scalar rather than an array without axes."""
    if xp is np:
        return np.asarray(x).astype(np.float64)[()]
    if not isinstance(x, jax.Array):
        x = np.asarray(x).astype(np.float32)  # JAX would first make it an int32, which wraps
    return jnp.asarray(x).astype(np.float32)


def as_integer(x: Any, xp: ModuleType, name: str) -> Any:
    """int64 where the model is computed in NumPy, int32 where in JAX.

    Concrete integers are NumPy's in either case, so that weights can be cut into groups of them.

    Raises:
      ValueError: an integer does not fit int32; the message has its ``name``.
    """
    if isinstance(x, jax.core.Tracer):
        return x.astype(np.int32)
    x = np.asarray(x)
    if xp is np:
        return x.astype(np.int64)[()]
    if x.size and x.max() >= INT32_END:
        raise ValueError(f"{name} is {x.max()}; traced evaluations count in 32 bits")
    return x.astype(np.int32)[()]


def as_arrays(owner: _Owner, xp: ModuleType) -> _Owner:
    """A design with its numbers as arrays of ``xp``.

    Integers in fields whose metadata are `INTEGER`, else reals; dataclasses in fields likewise.
    Static fields, and what is no number, stay.

    Raises:
      ValueError: ``xp`` is JAX's and an integer is 2**31 or more.
    """
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return owner
    converted = copy.copy(owner)  # not `replace`, which would check the numbers once more
    for field in dataclasses.fields(owner):
        if not field.metadata.get("static"):
            value = _field_array(field, getattr(owner, field.name), xp)
            object.__setattr__(converted, field.name, value)
    return converted


def _field_array(field: dataclasses.Field, value: Any, xp: ModuleType) -> Any:
    if not isinstance(value, _NUMBERS):
        return as_arrays(value, xp)
    return as_integer(value, xp, field.name) if "integer" in field.metadata else as_real(value, xp)


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Integer division that rounds up."""
    return -(-numerator // denominator)


def check_numbers(
    owner: str,
    *,
    integers: bool = True,
    continuous: bool = False,
    zero: bool = False,
    **values: Any,
) -> None:
    """Raises ValueError unless every number is positive (and a whole one below 2**53).

    With ``zero`` it may be 0 as well.

    Of traced numbers only the dtype is known: it must be an integer's where the model counts with
    the number, since its gradient would be zero, and may be real where the model is
    ``continuous`` in it.
    """
    what = "a positive integer" if integers else "positive"
    if zero:
        what = "an integer, 0 or more"
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            if not integers or continuous or jnp.issubdtype(value.dtype, jnp.integer):
                continue
            raise ValueError(
                f"{owner}: {name} is counted with and must be traced as an integer, got "
                f"{value.dtype}; gradients are taken over budgets, bandwidths, buffer sizes and "
                "table entries"
            )
        if isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            number = np.asarray(value)
            if _is_positive(number, zero) and (not integers or _is_whole(number)):
                continue
        elif not isinstance(value, str | bytes | complex | list | tuple | dict | type | None):
            continue  # what JAX puts in place of leaves while it handles trees
        raise ValueError(f"{owner}: {name} must be {what}, got {value!r}")


def _is_positive(number: np.ndarray, zero: bool) -> bool:
    """Whether all are positive, or 0 where that is allowed."""
    if number.dtype == bool or number.size == 0:
        return False
    return bool((number >= 0 if zero else number > 0).all())


def _is_whole(number: np.ndarray) -> bool:
    """Whether a positive number is a whole one that float64 holds exactly; infinity is not."""
    return bool((number < EXACT_END).all()) and bool((number == np.floor(number)).all())
