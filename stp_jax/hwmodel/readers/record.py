"""Integer operands of a Flax model's layers, recorded in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from stp_jax.hooks import LinenModel, attach
from stp_jax.hwmodel.readers.observe import Describe, Uses, linen_einsums, observing


def record_activations(
    model: nnx.Module | linen.Module | LinenModel, *inputs: Any, bits: int = 8, **kwargs: Any
) -> dict[str, np.ndarray]:
    """Integer inputs of a model's layers: the first of what `record_operands` returns."""
    return record_operands(model, *inputs, bits=bits, **kwargs)[0]


def record_operands(
    model: nnx.Module | linen.Module | LinenModel, *inputs: Any, bits: int = 8, **kwargs: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Runs a model once and returns what its layers multiply, as integers.

    For PEs whose cycles depend on the digits of real operands. Each operand is scaled by its
    largest magnitude and rounded: without negative values to 0 ... 2**bits - 1, else to
    +-(2**(bits - 1) - 1).

    Args:
      model: an NNX module, a Linen module bound to its variables (``module.bind(variables)``), or
        a `LinenModel`; it is left as it is. Loops (`jax.lax.scan`) run step by step.
      *inputs: arrays to run on.
      bits: width of an operand, with its sign where it has one.
      **kwargs: static keyword arguments of the call.

    Returns:
      int32 inputs by layer name, as `trace` names them, and the second operands of attention's
      products, to be merged into ``weights``. An attention's first operands are its queries and
      the probabilities, its second its keys and values. Products outside layers are left out.

    Raises:
      TypeError: not a Flax model with its parameters.
      ValueError: a layer runs under ``jax.vmap`` or ``jax.checkpoint``.
    """
    try:
        recorder = _run(model, inputs, kwargs)
    except jax.errors.TracerArrayConversionError:  # a layer inside a scan or a jit
        try:
            with jax.disable_jit():
                recorder = _run(model, inputs, kwargs)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "a layer runs under jax.vmap or jax.checkpoint, where no values can be seen; "
                "record a model without them"
            ) from error
    return (
        {name: _integers(x, bits) for name, x in recorder.inputs.items()},
        {name: _integers(x, bits) for name, x in recorder.seconds.items()},
    )


def _run(model: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recorder:
    recorder = _Recorder()
    if isinstance(model, linen.Module):
        if model.scope is None:
            raise TypeError(
                f"{type(model).__name__} has no parameters; bind the module to its variables: "
                "model.bind(variables)"
            )
        module, variables = model.unbind()
        model = LinenModel(module, dict(variables))
    elif not isinstance(model, nnx.Module | LinenModel):
        raise TypeError(
            "expected an nnx.Module or a linen.Module with its variables, got "
            f"{type(model).__name__}"
        )
    with linen_einsums(recorder):
        attach(model, observing(recorder))(*inputs, **kwargs)
    return recorder


def _integers(x: np.ndarray, bits: int) -> np.ndarray:
    x = x.astype(np.float64)
    top = (1 << bits) - 1 if x.min() >= 0 else (1 << (bits - 1)) - 1
    return np.rint(x * (top / (np.abs(x).max() or 1.0))).astype(np.int32)


class _Recorder:
    """An observer that keeps operands, by layer."""

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.seconds: dict[str, np.ndarray] = {}
        self._uses = Uses()

    def product(
        self, name: str, describe: Describe, run: Callable, lhs: jax.Array, rhs: jax.Array
    ) -> jax.Array:
        self.inputs[self._uses.unique(name)] = np.asarray(lhs)
        return run(lhs, rhs)

    def attention(
        self, name: str, run: Callable, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array:
        heads = query.shape[-2]
        scores, context = (self._uses.unique(f"{name}.{part}") for part in ("scores", "context"))
        self.inputs[scores] = _rows_first(np.asarray(query))
        self.inputs[context] = _rows_first(_probabilities(run, query, key, value))
        # Heads of queries that share one of keys and values each multiply it.
        keys, values = (
            np.repeat(np.asarray(x), heads // x.shape[-2], axis=-2) for x in (key, value)
        )
        # (..., length, heads, depth) to (reduction, products * columns).
        self.seconds[scores] = _rows_first(np.swapaxes(keys, -1, -3))
        self.seconds[context] = _rows_first(values)
        return run(query, key, value)

    def weights(self, name: str, x: jax.Array, weights: jax.Array) -> jax.Array:
        self.inputs[self._uses.unique(name)] = np.asarray(x)
        return weights


def _probabilities(run: Callable, query: jax.Array, key: jax.Array, value: jax.Array) -> np.ndarray:
    """Attention weights, by which the values are multiplied: (..., rows, heads, length).

    Attention is linear in its values, so columns of the identity in their place give the
    probabilities, as many columns a run as a value is deep.
    """
    length, depth = key.shape[-3], value.shape[-1]
    identity = np.eye(length, -(-length // depth) * depth, dtype=value.dtype)
    columns = [
        run(query, key, jnp.broadcast_to(part[:, None], value.shape))
        for part in np.split(identity, identity.shape[1] // depth, axis=1)
    ]
    return np.concatenate(columns, axis=-1)[..., :length]


def _rows_first(x: np.ndarray) -> np.ndarray:
    """(..., rows, heads, columns) to (rows, products * columns)."""
    x = np.moveaxis(x, -3, 0)
    return x.reshape(len(x), -1)
