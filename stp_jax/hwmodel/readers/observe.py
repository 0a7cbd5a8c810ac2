"""Observation of what the layers of a Flax model multiply.

The functions by which layers multiply (`stp_jax.hooks`) show their operands, and the layer that
they make, to an `Observer`, which runs them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import linen

from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.hwmodel.network import Layer
from stp_jax.hwmodel.readers import products
from stp_jax.hwmodel.readers.products import Shape

ROOT = "(model)"  # the name of a layer that is the whole model; no attribute is called so
Describe = Callable[[Shape, Shape, Shape], Layer]  # from the shapes of operands and result


class Observer(Protocol):
    """A function of the operands of a layer."""

    def product(
        self, name: str, describe: Describe, run: Callable, lhs: jax.Array, rhs: jax.Array
    ) -> jax.Array:
        """Returns ``run(lhs, rhs)``, the product of layer ``name``."""

    def attention(
        self, name: str, run: Callable, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array:
        """Returns ``run(query, key, value)``, the attention of layer ``name``."""

    def weights(self, name: str, x: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the weights of layer ``name``, which has no product to replace; x is its input.

        An embedding whose table is multiplied, or a transposed convolution.
        """


class Uses:
    """Numbers the uses of a name: its n-th ends in ``@n``."""

    def __init__(self) -> None:
        """None yet."""
        self._uses: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name of this use."""
        self._uses[name] = use = self._uses.get(name, 0) + 1
        return name if use == 1 else f"{name}@{use}"


def observing(observer: Observer) -> Hooks:
    """Hooks that show an observer every product and attention of a model's layers."""

    def operands(layer: KernelLayer, promote: Callable) -> Callable | None:
        if layer.kind != "conv_transpose":
            return None

        def promoted(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
            x, kernel, *rest = promote(operands, **kwargs)
            return (x, observer.weights(_name(layer.path), x, kernel), *rest)

        return promoted

    def attend(layer: KernelLayer, query: jax.Array, table: jax.Array) -> jax.Array:
        return observer.weights(_name(layer.path), query, table)

    def product(layer: KernelLayer, function: Callable) -> Callable | None:
        assert layer.product is not None
        return _PRODUCTS[layer.product](function, _name(layer.path), observer)

    def attention(path: str, function: Callable) -> Callable | None:
        # A method that calls its parent's, as SelfAttention's does, is asked twice.
        if getattr(function, "observer", None) is observer:
            return None
        return _attention(function, _name(path), observer)

    return Hooks(operands=operands, product=product, attention=attention, attend=attend)


def linen_einsums(observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Within, an observer is shown the products of ``flax.linen.Einsum``, which has no hook."""

    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: linen.module.InterceptorContext
    ) -> Any:
        module: Any = context.module
        if not isinstance(module, linen.Einsum) or context.method_name != "__call__":
            return call(*args, **kwargs)
        name = _name(".".join(module.path))
        equation: Any = module.einsum_str or kwargs.get("einsum_str") or args[1]

        def describe(lhs: Shape, rhs: Shape, _: Shape) -> Layer:
            return products.einsum(name, equation, lhs, rhs)

        kernel = linen.meta.unbox(module.get_variable("params", "kernel"))
        x = args[0] if args else kwargs["inputs"]
        return observer.product(name, describe, lambda *_: call(*args, **kwargs), x, kernel)

    return linen.intercept_methods(intercept)


def _name(path: str) -> str:
    return path or ROOT


# Positional arguments of jax.lax.conv_general_dilated after the padding.
_CONV_OPTIONS = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")


def _conv(function: Callable, name: str, observer: Observer) -> Callable:
    def conv_general_dilated(
        lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        options = dict(zip(_CONV_OPTIONS, args, strict=False)) | kwargs
        options |= {"window_strides": window_strides, "padding": padding}
        describe = functools.partial(products.convolution, name, **options)

        def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return function(lhs, rhs, window_strides, padding, *args, **kwargs)

        return observer.product(name, describe, run, lhs, rhs)

    return conv_general_dilated


def _dot(function: Callable, name: str, observer: Observer) -> Callable:
    def dot_general(
        lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        def describe(lhs: Shape, rhs: Shape, _: Shape) -> Layer:
            return products.product(name, lhs, rhs, *dimension_numbers)

        def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return function(lhs, rhs, dimension_numbers, *args, **kwargs)

        return observer.product(name, describe, run, lhs, rhs)

    return dot_general


def _einsum(function: Callable, name: str, observer: Observer) -> Callable:
    def einsum(
        equation: str, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        def describe(lhs: Shape, rhs: Shape, _: Shape) -> Layer:
            return products.einsum(name, equation, lhs, rhs)

        def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return function(equation, lhs, rhs, *args, **kwargs)

        return observer.product(name, describe, run, lhs, rhs)

    return einsum


def _attention(function: Callable, name: str, observer: Observer) -> Callable:
    @functools.wraps(function)  # modules look at its signature
    def attention(
        query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return function(query, key, value, *args, **kwargs)

        return observer.attention(name, run, query, key, value)

    attention.observer = observer  # type: ignore[attr-defined]
    return attention


_PRODUCTS = {"conv_general_dilated": _conv, "dot_general": _dot, "einsum_op": _einsum}
