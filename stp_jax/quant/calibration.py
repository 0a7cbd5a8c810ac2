"""Scales of a model's inputs and weights, its projected parameters and integer weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax import hooks
from stp_jax.quant.budgets import budgets
from stp_jax.quant.layers import check_paths, find_layers, quantized_layers
from stp_jax.quant.nnx import calibrating
from stp_jax.terms import count


def call_model(model: Any, batch: Any) -> Any:
    """The model's output for a batch that is its only argument."""
    return model(batch)


def check_batches(batches: object) -> None:
    """Raises TypeError if batches is one array, whose examples would pass for batches."""
    if isinstance(batches, np.ndarray | jax.Array):
        raise TypeError(f"batches must be a list of batches; give [x] for one of {batches.shape}")


def sound_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches one by one; ValueError at the first that is empty or holds NaN or infinity."""
    for i, batch in enumerate(batches):
        for leaf in jax.tree.leaves(batch):
            if not np.size(leaf):
                raise ValueError(
                    f"batch {i} is empty: an array of it has the shape {np.shape(leaf)}"
                )
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                continue
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            if bad:
                raise ValueError(f"batch {i} has {bad} values that are NaN or infinite")
        yield batch


def sum_over_batches(function: Callable[[Any], Any], batches: Iterable[Any]) -> tuple[Any, int]:
    """The sum of a function's trees over batches, and their number; (None, 0) without any."""
    total, count = None, 0
    for batch in batches:
        value = function(batch)
        total = value if total is None else jax.tree.map(jnp.add, total, value)
        count += 1
    return total, count


@contextlib.contextmanager
def outside_of_loops(what: str) -> Iterator[None]:
    """Raises ValueError where a layer within a scan or vmap leaked ``what`` of it, a tracer."""
    try:
        yield
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            f"a quantized layer runs inside a scan, vmap or the like; its {what} cannot be seen"
        ) from None


@functools.singledispatch
def observe_inputs(model: Any, batches: Iterable[Any], call: Callable) -> int:
    """Sets the input scales of a model, in place; the number of batches."""
    find_layers(model)  # which says what a model is
    raise AssertionError


@observe_inputs.register(nnx.Module)
def _observe_nnx(model: nnx.Module, batches: Iterable[Any], call: Callable) -> int:
    @nnx.jit
    def observe(model: nnx.Module, batch: Any) -> None:
        call(model, batch)

    count = 0
    with calibrating(model):
        for batch in batches:
            observe(model, batch)
            count += 1
    return count


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = call_model,
) -> None:
    """Sets the scale of every layer's input from example batches, in place.

    Each scale is the one of least squared error on its batch, the largest over the batches (and
    over the steps of a scan), whatever it was before; where a layer's input is not seen or always
    zero, it stays. The model runs as it stands (call ``model.eval()`` of an NNX model
    first) with its kernels quantized and its inputs float. Layers whose inputs stay float or have
    dynamic scales are left alone.

    Args:
      model: an STP model; a Linen one with its variables.
      batches: inputs, each given to the model as its only argument.
      call: how to call the model on a batch otherwise, as ``lambda model, batch: model(*batch)``.
        What it returns has to depend on the layers of a Linen model.

    Raises:
      ValueError: there is no batch, or one is empty or holds NaN or infinity; ``call`` returns
        nothing.
      TypeError: batches is an array.
    """
    check_batches(batches)
    quantized_layers(model)
    if not observe_inputs(model, sound_batches(batches), call):
        raise ValueError("calibration needs at least one batch of inputs")


def search_weight_scales(
    model: Any, *, importance: Mapping[str, jax.Array] | None = None, slack: float = 0.0
) -> None:
    """Sets every stored kernel scale to the best one at the layer's present budget, in place.

    Args:
      model: an STP model; a Linen one with its variables.
      importance: weights of the squared errors by layer path, of the kernel's shape (see
        `stp_jax.squared_gradients`); ones where there are none.
      slack: the largest scale whose error exceeds the least by no more than this share is taken.
        With few terms of few bits that leaves the weights room to grow in training.

    Raises:
      ValueError: a path is not a quantized layer, or slack is negative.
    """
    layers, importance = quantized_layers(model), importance or {}
    check_paths(importance, layers)
    for path, layer in layers.items():
        layer.search_scale(importance.get(path), slack)


def project_params(
    model: Any,
    values: Mapping[str, jax.typing.ArrayLike] | None = None,
    *,
    importance: Mapping[str, jax.Array] | None = None,
) -> Any:
    """The model's parameters with every quantized kernel on its few-term values.

    Args:
      model: an STP model, a Linen one with its variables; it may be traced. It is not changed.
      values: terms per group by layer path, in place of the model's own budgets; may be traced.
      importance: weights of the squared errors by layer path, of the kernel's shape; ones where
        there are none. For rules whose method takes it.

    Returns:
      The `nnx.Param` state, or Linen's ``params``: targets for `stp_jax.terms.guide`, or new values
      for the model.

    Raises:
      ValueError: a path is not a quantized layer, or a budget is out of its range.
    """
    model = hooks.copy_model(model)
    layers, values, importance = quantized_layers(model), values or {}, importance or {}
    check_paths(values, layers)
    check_paths(importance, layers)
    for path, layer in layers.items():
        layer.kernel = layer.projected(values.get(path), importance.get(path))
    return hooks.trainable(model)[0]


def integer_weights(model: Any) -> dict[str, np.ndarray]:
    """The integers of every quantized kernel at the present budgets: int32 by layer path."""
    return {path: np.asarray(q.integers()) for path, q in quantized_layers(model).items()}


def weight_terms(model: Any) -> dict[str, np.ndarray]:
    """The terms of every weight's integer: int32 of the kernel's shape, by layer path."""
    layers = quantized_layers(model)
    return {
        path: np.asarray(count(integers, layers[path].rule.encoding))
        for path, integers in integer_weights(model).items()
    }


def mean_terms(terms: Mapping[str, np.ndarray], paths: Iterable[str]) -> float:
    """The mean over all weights of some layers, from `weight_terms`."""
    chosen = [terms[path] for path in paths]
    return sum(int(counts.sum()) for counts in chosen) / sum(counts.size for counts in chosen)


def terms_per_weight(model: Any, paths: Iterable[str] | None = None) -> float:
    """Mean number of terms that the integer weights really hold, at most what budgets allow.

    Args:
      model: an STP model; a Linen one with its variables.
      paths: of layers; by default those with a budget.

    Raises:
      ValueError: a path is not a quantized layer, or there is no layer to count.

    >>> import stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=4)]))
    >>> stp_jax.terms_per_weight(model) <= 0.5
    True
    """
    chosen = list(budgets(model) if paths is None else paths)
    check_paths(dict.fromkeys(chosen), quantized_layers(model))
    if not chosen:
        raise ValueError("no layer of the model has a budget; name the paths to count")
    return mean_terms(weight_terms(model), chosen)
