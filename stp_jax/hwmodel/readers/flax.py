"""Networks of Flax models, by tracing them without running them.

The model's jaxpr tells which products are executed, and how often. Hooks on the model's layers
leave marks in the jaxpr, which tell a layer's name and the operand that holds its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from jax.extend.core import Jaxpr

from stp_jax.hooks import LinenModel, attach
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.readers import products
from stp_jax.hwmodel.readers.jaxpr import executed_layers
from stp_jax.hwmodel.readers.marks import Marks
from stp_jax.hwmodel.readers.observe import Describe, linen_einsums, observing


def trace(model: Any, *inputs: Any, name: str | None = None, **kwargs: Any) -> Network:
    """The layers that ``model(*inputs, **kwargs)`` executes, in order of execution.

    Every convolution and matrix product of the call's jaxpr is counted, as often as it runs: in
    ``scan`` (recurrent cells, stacked layers) once a step, under ``vmap`` once a row, or once a
    copy where the weights are mapped as well. Of a ``cond``'s branches the one with the most
    multiply-accumulates counts. Products that no layer makes, such as a bare ``x @ w``, are matrix
    products called ``product``.

    Args:
      model: an NNX module, a Linen module (its variables' shapes come from its ``init``), a bound
        Linen module, or what `stp_jax.quantize` makes of one.
      *inputs: arrays or ``jax.ShapeDtypeStruct``, of which only shape and dtype are used; what
        has no shape, such as a bool, stays as it is.
      name: the network's name, by default the model's class.
      **kwargs: keyword arguments of the call, such as ``train=False``, likewise.

    Returns:
      A network whose layer names are module paths joined by dots (``layer1.0.conv1``); the n-th
      use of a module ends in ``@n``, and attention contributes ``.scores`` and ``.context``. An
      embedding is a layer where its transpose is multiplied (``attend``), not where rows are looked
      up. A transposed convolution is the product of every input pixel with its kernel; the sums
      of what overlaps in its output are not the array's. Elementwise work and pooling are not
      layers; nor are products in a Pallas kernel. The network's ``links`` say which layer reads
      whose output.

    Raises:
      TypeError: not a Flax model.
      ValueError: the model has no such layer, or one in a ``while`` loop, whose steps are
        unknown.
    """
    if isinstance(getattr(model, "module", None), linen.Module) and not isinstance(
        model, linen.Module
    ):
        model = model.module  # an STP model has its module's layers
    marks, call = Marks(), _Call(inputs, kwargs)
    if isinstance(model, nnx.Module):
        jaxpr = _nnx_jaxpr(model, marks, call)
    elif isinstance(model, linen.Module):
        jaxpr = _linen_jaxpr(model, marks, call)
    else:
        raise TypeError(f"expected an nnx.Module or a linen.Module, got {type(model).__name__}")
    reader, results = executed_layers(jaxpr, marks)
    if not reader.layers:
        raise ValueError(f"{type(model).__name__} has no convolution, dense layer or product")
    return reader.network(results, name or type(model).__name__)


class _Marker:
    """An observer that marks layers in the jaxpr."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def product(
        self, name: str, describe: Describe, run: Callable, lhs: jax.Array, rhs: jax.Array
    ) -> jax.Array:
        with self._marks.scope() as mark:
            out = run(mark.on_input(lhs), mark.on_weights(rhs))
            mark.layers.append(describe(lhs.shape, rhs.shape, out.shape))
            return mark.on_result(out)

    def attention(
        self, name: str, run: Callable, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array:
        with self._marks.scope() as mark:
            mark.layers += products.attention(name, query.shape, key.shape, value.shape)
            return mark.on_result(run(mark.on_input(query), *mark.on_cached(key, value)))

    def weights(self, name: str, x: jax.Array, weights: jax.Array) -> jax.Array:
        return self._marks.on_operand(name, weights)


class _Call:
    """A call's arguments, of which only those with a shape are traced."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._tree = jax.tree.flatten((args, kwargs))
        self._traced = [hasattr(leaf, "shape") for leaf in self._leaves]

    @property
    def arrays(self) -> list[Any]:
        return [leaf for leaf, traced in zip(self._leaves, self._traced, strict=True) if traced]

    def run(self, function: Callable, arrays: Any) -> Any:
        given = iter(arrays)
        both = zip(self._leaves, self._traced, strict=True)
        leaves = [next(given) if traced else leaf for leaf, traced in both]
        args, kwargs = jax.tree.unflatten(self._tree, leaves)
        return function(*args, **kwargs)


def _nnx_jaxpr(model: nnx.Module, marks: Marks, call: _Call) -> Jaxpr:
    graph, state = nnx.split(attach(model, observing(_Marker(marks))))

    def run(state: nnx.State, arrays: list[jax.Array]) -> list[Any]:
        return jax.tree.leaves(call.run(nnx.merge(graph, state), arrays))

    return jax.make_jaxpr(run)(state, call.arrays).jaxpr


def _linen_jaxpr(model: linen.Module, marks: Marks, call: _Call) -> Jaxpr:
    keys = {stream: jax.random.key(0) for stream in ("params", "dropout")}
    if model.scope is not None:
        module, variables = model.unbind()
    else:
        module = model
        init = functools.partial(module.init, keys)
        variables = jax.eval_shape(functools.partial(call.run, init), call.arrays)
    marker = _Marker(marks)

    def run(variables: Any, arrays: list[jax.Array]) -> list[Any]:
        observed = attach(LinenModel(module, variables), observing(marker))
        apply = functools.partial(observed, rngs=keys, mutable=True)
        results, _ = call.run(apply, arrays)
        return jax.tree.leaves(results)

    with linen_einsums(marker):
        return jax.make_jaxpr(run)(variables, call.arrays).jaxpr
