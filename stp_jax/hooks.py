"""Flax hooks: the layers that hold a kernel, and replacements for the calls by which they compute.

Every Flax layer with a kernel passes its operands through its attribute ``promote_dtype`` and what
that returns to a product (``dot_general``, ``conv_general_dilated`` or ``einsum_op``). Replacing
these calls changes what a layer computes while its code, parameters and their paths stay the same.
This module is the only one that looks into Flax layers; everything else asks it, for NNX modules
and for Linen modules with their variables (`LinenModel`) alike.

* `KernelLayer` describes a layer, `kernel_layers` lists those of an NNX model.
* `Hooks` says what to replace; `attach` gives a copy of a model in which it is replaced.
* `intercept` runs Linen modules, with or without bound variables, with hooks in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import meta, unfreeze
from flax.core.scope import in_filter as in_filter
from flax.core.scope import union_filters as union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

Kind = Literal["conv", "conv_local", "conv_transpose", "dense", "general", "einsum", "embed"]
Operands = tuple[Any, ...]
Model = TypeVar("Model")

_NNX_KINDS: dict[type, Kind] = {
    nnx.Conv: "conv",
    nnx.ConvTranspose: "conv_transpose",
    nnx.Linear: "dense",
    nnx.LinearGeneral: "general",
    nnx.Einsum: "einsum",
    nnx.Embed: "embed",
}
_LINEN_KINDS: dict[type, Kind] = {
    nn.Conv: "conv",
    nn.ConvLocal: "conv_local",
    nn.ConvTranspose: "conv_transpose",
    nn.Dense: "dense",
    nn.DenseGeneral: "general",
    nn.Einsum: "einsum",
    nn.Embed: "embed",
}
_PRODUCTS = {
    "conv": "conv_general_dilated",
    "dense": "dot_general",
    "general": "dot_general",
    "einsum": "einsum_op",
}
_DEFAULT_PRODUCTS: dict[str, Callable] = {
    "conv_general_dilated": jax.lax.conv_general_dilated,
    "dot_general": jax.lax.dot_general,
    "einsum_op": jnp.einsum,
}
_KERNEL_NORMS = (nnx.WeightNorm, nnx.SpectralNorm, nn.WeightNorm, nn.SpectralNorm)
_LSTM_GATES = tuple(side + gate for side in "ih" for gate in "ifgo")

# `nn.jit` keeps traces by module, arguments and JAX's contexts, and knows nothing of interceptors:
# without a context of its own, a run could be given the trace of the module without hooks.
_trace_key = jax.make_user_context(None)


# --- Layers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelLayer:
    """A layer that holds a kernel (or an embedding table), whatever Flax API it comes from."""

    path: str  # of modules, joined by dots; "" for a model that is one layer
    kind: Kind
    type_name: str  # its class, for messages
    kernel_name: str = "kernel"  # of the kernel among the layer's parameters
    # Attribute that computes the product; None where the layer has none to replace.
    product: str | None = None
    feature_groups: int = 1  # of a convolution
    transposed: bool = False  # the kernel is [*window, out, in]
    batch_axes: int = 0  # leading axes of the kernel that are batched over
    contracting_axes: int = 1  # axes after these that are contracted
    out_features: tuple[int, ...] = (-1,)  # shape of the output's last axes; -1: the last axis
    kernel_rank: int | None = None  # axes that the layer reads; None where the call decides
    equation: str | None = None  # of an einsum
    kernel_norm: str | None = None  # class of a module around it that changes the kernel it reads
    # By which the layer multiplies its kernel, as convolutions may.
    mask: Any = dataclasses.field(default=None, compare=False, repr=False)
    # The Flax layer: an attribute of the model (NNX), or the copy that runs (Linen).
    module: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding, whose rows are read by index."""
        return self.kind == "embed"

    @property
    def has_plain_product(self) -> bool:
        """Whether one replaceable product contracts the input with the kernel, without batch axes.

        Its output ends in the axes of `out_features`. A masked kernel is not as it is stored.
        """
        custom = getattr(self.module, "dot_general_cls", None) is not None
        plain = self.kind in ("conv", "dense", "general") and not self.batch_axes
        return plain and not custom and self.mask is None

    def masked(self, kernel: jax.Array) -> jax.Array:
        """The kernel as the layer computes with it."""
        return kernel if self.mask is None else kernel * jnp.asarray(self.mask, kernel.dtype)


def _kind_of(module: object, kinds: Mapping[type, Kind]) -> Kind | None:
    return next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, Sequence) else (x,)


def _describe_nnx(path: str, module: Any) -> KernelLayer | None:
    kind = _kind_of(module, _NNX_KINDS)
    if kind is None:
        return None
    facts: dict[str, Any] = {"kernel_rank": 2}
    if kind in ("conv", "conv_transpose"):
        window = len(module.kernel_size)
        facts = {"kernel_rank": window + 2}
        facts["feature_groups"] = getattr(module, "feature_group_count", 1)
        facts["transposed"] = getattr(module, "transpose_kernel", False)
    elif kind == "general":
        features = tuple(module.out_features)
        facts = {
            "batch_axes": len(module.batch_axis),
            "contracting_axes": len(module.in_features),
            "out_features": features,
        }
        facts["kernel_rank"] = facts["batch_axes"] + facts["contracting_axes"] + len(features)
    elif kind == "einsum":
        facts = {"equation": module.einsum_str, "kernel_rank": len(module.kernel_shape)}
    return _describe(path, kind, module, **facts)


def _describe_linen(path: str, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]):
    kind = _kind_of(module, _LINEN_KINDS)
    if kind is None:
        return None
    facts: dict[str, Any] = {}
    if kind in ("conv", "conv_local", "conv_transpose"):
        facts["feature_groups"] = getattr(module, "feature_group_count", 1)
        facts["transposed"] = getattr(module, "transpose_kernel", False)
    elif kind == "general":
        facts["batch_axes"] = len(module.batch_dims)
        facts["contracting_axes"] = len(_as_tuple(module.axis))
        facts["out_features"] = _as_tuple(module.features)
    elif kind == "einsum":
        given = kwargs.get("einsum_str") or (args[1] if len(args) > 1 else None)
        facts["equation"] = module.einsum_str or given
    return _describe(path, kind, module, **facts)


def _describe(path: str, kind: Kind, module: Any, **facts: Any) -> KernelLayer:
    product = _PRODUCTS.get(kind)
    return KernelLayer(
        path=path,
        kind=kind,
        type_name=type(module).__name__,
        kernel_name="embedding" if kind == "embed" else "kernel",
        product=product if product and hasattr(module, product) else None,
        mask=getattr(module, "mask", None),
        module=module,
        **facts,
    )


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def kernel_layers(model: nnx.Module) -> dict[str, KernelLayer]:
    """The layers of an NNX model that hold a kernel, by path and in the order of the paths.

    Linen layers are known when they run: see `Hooks`.
    """
    modules = list(nnx.iter_modules(model))
    norms = {path: type(module).__name__ for path, module in modules if _is_kernel_norm(module)}
    layers = []
    for path, module in modules:
        layer = _describe_nnx(_dotted(path), module)
        if layer is not None:
            around = (norms[path[:n]] for n in range(len(path)) if path[:n] in norms)
            layers.append(dataclasses.replace(layer, kernel_norm=next(around, None)))
    return {layer.path: layer for layer in sorted(layers, key=lambda layer: layer.path)}


def _is_kernel_norm(module: object) -> bool:
    return isinstance(module, _KERNEL_NORMS)


# --- Hooks ----------------------------------------------------------------------------------------

# A layer and the present call → what takes its place; None leaves it.
Wrap = Callable[[KernelLayer, Callable], Callable | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Replacements in a model. Each is called once for every layer (in Linen, for every call)."""

    # promote_dtype: (operands, **options) → operands, a tuple of (input, kernel, …) or (table,).
    operands: Wrap | None = None
    # The product of the promoted operands: (input, kernel, *args, **kwargs) → output without bias.
    # An einsum's is called with its equation first.
    product: Wrap | None = None
    # The product of an embedding, `attend`, which has no attribute to replace: (layer, query,
    # table) → table, of the promoted operands, directly before they are multiplied.
    attend: Callable[[KernelLayer, jax.Array, jax.Array], jax.Array] | None = None
    # Of attention modules: (path, attention_fn) → attention_fn.
    attention: Callable[[str, Callable], Callable | None] | None = None
    # Called with the path and the input of every BatchNorm that runs.
    batch_norm_input: Callable[[str, jax.Array], None] | None = None
    # BatchNorms normalise by the statistics of the batch, and keep their running ones as they are.
    batch_statistics: bool = False


class _Attending(nnx.Module):
    """A `promote_dtype` of an embedding that shows the operands of `attend`.

    A module, as is a quantizer whose place it may take, so that this one's variables stay the
    model's.
    """

    promote: Callable
    attend: Callable

    def __init__(self, promote: Callable, attend: Callable):
        _set_nnx(self, "promote", promote)
        _set_nnx(self, "attend", attend)

    def __call__(self, operands: Operands, **options: Any) -> Operands:
        """Promotes (query, table), or the table alone, which is read by index."""
        promoted = self.promote(operands, **options)
        if len(promoted) == 1:
            return promoted
        query, table = promoted
        return query, self.attend(query, table)


def _operand_wraps(hooks: Hooks) -> Iterator[Wrap]:
    """What takes the place of `promote_dtype`, the first innermost."""
    if hooks.operands is not None:
        yield hooks.operands
    attend = hooks.attend
    if attend is not None:

        def attending(layer: KernelLayer, promote: Callable) -> Callable | None:
            show = functools.partial(attend, layer)
            return _Attending(promote, show) if layer.is_table else None

        yield attending


class _Replacement:
    """A callable in the place of another, which it remembers."""

    def __init__(self, function: Callable, original: Any):
        functools.update_wrapper(self, function)
        self.function = function
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def attach(model: Model, hooks: Hooks) -> Model:
    """A copy of the model that computes with the hooks in place, around those it has already.

    Args:
      model: an NNX module or a `LinenModel`; it may be traced. It is not changed.
      hooks: what to replace.
    """
    if isinstance(model, LinenModel):
        return dataclasses.replace(model, hooks=(*model.hooks, hooks))
    assert isinstance(model, nnx.Module)
    model = nnx.clone(model)
    for path, module in list(nnx.iter_modules(model)):
        _attach_nnx(_dotted(path), module, hooks)
    return model  # type: ignore[return-value]


def _attach_nnx(path: str, module: Any, hooks: Hooks) -> None:
    layer = _describe_nnx(path, module)
    if layer is not None:
        for wrap in _operand_wraps(hooks):
            _set_nnx(module, "promote_dtype", wrap(layer, module.promote_dtype))
    if layer is not None and hooks.product is not None and layer.product is not None:
        _set_nnx(module, *_wrapped_product(layer, [hooks.product]))
    attention = getattr(module, "attention_fn", None)
    if hooks.attention is not None and callable(attention):
        _set_nnx(module, "attention_fn", _wrapped_attention(path, attention, [hooks.attention]))
    if hooks.batch_norm_input is not None and isinstance(module, nnx.BatchNorm):
        promote, note = module.promote_dtype, hooks.batch_norm_input

        def noting(operands: Operands, **options: Any) -> Operands:
            note(path, operands[0])
            return promote(operands, **options)

        _set_nnx(module, "promote_dtype", noting)
    if hooks.batch_statistics and isinstance(module, nnx.BatchNorm):
        promote_all = module.promote_dtype

        def of_batch(operands: Operands, **options: Any) -> Operands:
            x, *running, scale, bias = promote_all(operands, **options)
            found = zip(_batch_statistics(x, module.axis), running, strict=True)
            return x, *(y.reshape(r.shape).astype(r.dtype) for y, r in found), scale, bias

        _set_nnx(module, "promote_dtype", of_batch)


def _batch_statistics(x: jax.Array, axis: int | Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of x by channel, float32, with the axes of x."""
    channels = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
    others = tuple(a for a in range(x.ndim) if a not in channels)
    return (
        jnp.mean(x, others, jnp.float32, keepdims=True),
        jnp.var(x, others, jnp.float32, keepdims=True),
    )


def _set_nnx(module: nnx.Module, name: str, value: Any) -> None:
    """Sets an attribute; functions are static, since they may hold modules with arrays."""
    if value is not None:
        setattr(
            module, name, nnx.data(value) if isinstance(value, nnx.Module) else nnx.static(value)
        )


def _wrapped_product(layer: KernelLayer, wraps: Sequence[Wrap]) -> tuple[str, Callable | None]:
    """The attribute that gives the layer its product, and what to set it to; None leaves it."""
    assert layer.product is not None
    factory = f"{layer.product}_cls"
    make = _original(layer.module, factory)
    if make is not None:  # makes the product where it is called, perhaps with state of its own
        return factory, lambda: _folded(layer, make(), wraps)
    present: Callable = _original(layer.module, layer.product) or _DEFAULT_PRODUCTS[layer.product]
    new = _folded(layer, present, wraps)
    return layer.product, None if new is present else new


def _wrapped_attention(
    path: str, attention: Callable, wraps: Sequence[Callable]
) -> Callable | None:
    new = _folded(path, attention, wraps)
    # Attention modules ask for the function's signature.
    return None if new is attention else functools.wraps(attention)(new)


def _folded(what: Any, present: Callable, wraps: Sequence[Callable]) -> Callable:
    for wrap in wraps:
        present = wrap(what, present) or present
    return present


def _original(module: Any, name: str) -> Any:
    """An attribute as the model has it; a lifted Linen layer's inner copy holds outer hooks."""
    value = getattr(module, name, None)
    return value.original if isinstance(value, _Replacement) else value


# --- Linen ----------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class LinenModel:
    """A Linen module with its variables, to be called as an NNX model is.

    >>> model = LinenModel(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2))))
    >>> model(jnp.ones((4, 2))).shape
    (4, 3)
    """

    module: nn.Module
    variables: dict[str, Any]  # plain nested dictionaries; verbs that work in place replace them
    hooks: tuple[Hooks, ...] = ()

    def __post_init__(self) -> None:  # noqa: D105
        self.variables = unfreeze(dict(self.variables))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; keyword arguments are those of `flax.linen.Module.apply`."""
        with intercept(self.hooks):
            return self.module.apply(self.variables, *args, **kwargs)


@contextlib.contextmanager
def intercept(hooks: Sequence[Hooks], key: Any = None) -> Iterator[None]:
    """Within, Linen modules run with the hooks in place, the first of them innermost.

    Args:
      hooks: what to replace.
      key: what the traced computation depends on, hashable, where hooks are made anew for every
        call; by default the hooks themselves. Equal keys share JAX's traces.
    """
    if not hooks:
        yield
        return
    with (
        _trace_key(tuple(hooks) if key is None else key),
        nn.intercept_methods(_Interceptor(tuple(hooks))),
    ):
        yield


def _normalised_by_batch(norm: nn.BatchNorm, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The call's arguments, x such that running statistics make of it what the batch's would.

    The module reads its running statistics itself, and may not be able to write them.
    """
    x, *rest = args if args else (kwargs["x"],)
    running: list[Any] = [norm.get_variable("batch_stats", name) for name in ("mean", "var")]
    if any(value is None for value in running):  # the call that makes the variables
        return args, kwargs
    mean, var = _batch_statistics(x, norm.axis)
    old_mean, old_var = (y.reshape(mean.shape) for y in running)
    factor = jnp.sqrt((old_var + norm.epsilon) / (var + norm.epsilon))
    moved = ((x - mean) * factor + old_mean).astype(x.dtype)
    return ((moved, *rest), kwargs) if args else ((), {**kwargs, "x": moved})


@dataclasses.dataclass(frozen=True, eq=False)
class _Interceptor:
    hooks: tuple[Hooks, ...]
    # Classes of the modules that run at present and change the kernels of those that they call.
    kernel_norms: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        if _is_kernel_norm(module) and context.method_name == "__call__":
            self.kernel_norms.append(type(module).__name__)
            try:
                return call(*args, **kwargs)
            finally:
                self.kernel_norms.pop()
        path = _dotted(module.path)
        if isinstance(module, nn.OptimizedLSTMCell) and context.method_name == "__call__":
            call = self._plain_lstm(path, module, call)
        if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
            for note in self._all("batch_norm_input"):
                note(path, args[0] if args else kwargs["x"])
            if any(hooks.batch_statistics for hooks in self.hooks):
                args, kwargs = _normalised_by_batch(module, args, kwargs)
        layer = _describe_linen(path, module, args, kwargs)
        if layer is not None and self.kernel_norms:
            layer = dataclasses.replace(layer, kernel_norm=self.kernel_norms[-1])
        with contextlib.ExitStack() as stack:
            for name, new in self._replacements(path, module, layer):
                stack.enter_context(_changed(module, name, new))
            return call(*args, **kwargs)

    def _all(self, name: str) -> list[Any]:
        return [f for f in (getattr(hooks, name) for hooks in self.hooks) if f is not None]

    def _replacements(
        self, path: str, module: Any, layer: KernelLayer | None
    ) -> Iterator[tuple[str, Callable]]:
        """The attributes to change while the module runs."""
        if layer is not None and (wraps := [w for h in self.hooks for w in _operand_wraps(h)]):
            yield from _wrapped_linen_operands(layer, wraps)
        if layer is not None and layer.product is not None and (wraps := self._all("product")):
            name, new = _wrapped_product(layer, wraps)
            yield from [] if new is None else [(name, new)]
        attention = _original(module, "attention_fn")
        if callable(attention) and (wraps := self._all("attention")):
            new = _wrapped_attention(path, attention, wraps)
            yield from [] if new is None else [("attention_fn", new)]

    def _plain_lstm(self, path: str, cell: nn.OptimizedLSTMCell, call: Callable) -> Callable:
        """The LSTMCell whose parameters the optimized cell shares, if a gate has hooks.

        The optimized cell joins the gates' kernels and multiplies them by itself.
        """
        gates = [
            KernelLayer(_dotted((*cell.path, gate)), "dense", "Dense", module=cell)
            for gate in _LSTM_GATES
        ]
        # Every gate is asked, so that the hooks learn of all layers.
        replaced = [
            wrap(gate, lambda operands, **_: operands)
            for gate in gates
            for wrap in self._all("operands")
        ]
        if all(new is None for new in replaced):
            return call
        if type(cell) is not nn.OptimizedLSTMCell:
            raise ValueError(
                f"layer {path!r}: {type(cell).__name__} computes without hooks for a quantizer; "
                "derive it from nn.LSTMCell or keep its gates float"
            )
        fields = {f.name: getattr(cell, f.name) for f in dataclasses.fields(nn.LSTMCell)}
        return nn.LSTMCell(**{**fields, "parent": cell.scope})


def _wrapped_linen_operands(
    layer: KernelLayer, wraps: Sequence[Wrap]
) -> Iterator[tuple[str, Callable]]:
    """Linen passes operands one by one where NNX passes a tuple, as hooks expect it."""
    promote = _original(layer.module, "promote_dtype")

    def of_tuple(operands: Operands, **options: Any) -> Operands:
        return promote(*operands, **options)

    new = _folded(layer, of_tuple, wraps)
    if new is not of_tuple:
        yield "promote_dtype", lambda *operands, **options: new(operands, **options)


@contextlib.contextmanager
def _changed(module: nn.Module, name: str, new: Callable) -> Iterator[None]:
    """Sets an attribute of a running module, which is frozen, but this call's own copy."""
    before = getattr(module, name)
    replacement = _Replacement(new, _original(module, name))
    object.__setattr__(module, name, replacement)
    try:
        yield
    finally:
        object.__setattr__(module, name, before)


# --- Variables ------------------------------------------------------------------------------------


def keys_of(path: str) -> tuple[str, ...]:
    """A dotted path as keys of nested dictionaries."""
    return tuple(path.split(".")) if path else ()


def flat_variables(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Linen variables by their keys, boxes (`nn.Partitioned`) and empty collections kept."""
    return flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)


def nested_variables(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flat_variables`."""
    return unflatten_dict(dict(flat))


def unboxed(value: Any) -> jax.Array:
    """The array of a variable that may lie in a box of metadata."""
    return meta.unbox(value)


def replace_variables(
    variables: Mapping[str, Any], changed: Mapping[tuple[str, ...], Any]
) -> dict[str, Any]:
    """Linen variables with other values, in the boxes of the present ones; None removes one."""
    flat = flat_variables(variables)
    for key, value in changed.items():
        if value is None:
            flat.pop(key, None)
        else:
            flat[key] = meta.replace_boxed(flat[key], value) if key in flat else value
    return nested_variables(flat)


def find_variable(variables: Mapping[str, Any], key: tuple[str, ...]) -> jax.Array | None:
    """The array at a key of Linen variables, out of its box; None if there is none."""
    value: Any = variables
    for name in key:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return unboxed(value)


def get_variable(model: Any, path: str, name: str) -> jax.Array | None:
    """A layer's parameter or statistic by name; None if it has none."""
    if isinstance(model, LinenModel):
        found = _linen_key(model, path, name)
        return None if found is None else find_variable(model.variables, found)
    variable = getattr(_nnx_module(model, path), name, None)
    return None if variable is None else variable[...]


def set_variable(model: Any, path: str, name: str, value: jax.Array) -> None:
    """Changes a layer's parameter or statistic, in place."""
    if isinstance(model, LinenModel):
        key = _linen_key(model, path, name)
        if key is None:
            raise KeyError(f"layer {path!r} has no variable {name!r}")
        model.variables = replace_variables(model.variables, {key: value})
    else:
        getattr(_nnx_module(model, path), name)[...] = value


def _linen_key(model: LinenModel, path: str, name: str) -> tuple[str, ...] | None:
    keys = ((collection, *keys_of(path), name) for collection in model.variables)
    return next((key for key in keys if find_variable(model.variables, key) is not None), None)


def _nnx_module(model: nnx.Module, path: str) -> Any:
    return next(m for p, m in nnx.iter_modules(model) if _dotted(p) == path)


def replace_kernel(model: Any, layer: KernelLayer, value: jax.Array) -> None:
    """Gives a layer a kernel of any dtype, in place."""
    if isinstance(model, LinenModel):
        set_variable(model, layer.path, layer.kernel_name, value)
    else:
        setattr(_nnx_module(model, layer.path), layer.kernel_name, nnx.Param(value))


def set_bias(model: nnx.Module, layer: KernelLayer, value: jax.Array | None) -> None:
    """Gives a convolution or dense layer of an NNX model a bias, or takes it away, in place."""
    module = _nnx_module(model, layer.path)
    module.use_bias = value is not None
    module.bias = nnx.data(None) if value is None else nnx.Param(value)


class Identity(nnx.Module):
    """Takes the place of a layer that has nothing left to do."""

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns x."""
        return x


def remove_batch_norm(model: nnx.Module, path: str) -> tuple[jax.Array, jax.Array]:
    """Takes a BatchNorm out of an NNX model, in place; an `Identity` is left.

    Returns:
      Factor and summand per channel that make its output from its input in evaluation.
    """
    norm = _nnx_module(model, path)
    factor = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        factor = factor * norm.scale[...]
    summand = -norm.mean[...] * factor
    if norm.bias is not None:
        summand = summand + norm.bias[...]
    parent, _, name = path.rpartition(".")
    owner = _nnx_module(model, parent)
    if isinstance(owner, nnx.List):
        owner[int(name)] = Identity()
    else:
        setattr(owner, name, Identity())
    return factor, summand


def model_name(model: Any) -> str:
    """The class of a model, of a Linen model its module's."""
    return type(model.module if isinstance(model, LinenModel) else model).__name__


def copy_model(model: Model) -> Model:
    """A model of its own variables, which may be changed in place."""
    if isinstance(model, LinenModel):
        return dataclasses.replace(model)
    return nnx.clone(model)  # type: ignore[type-var]


def functional(model: Model) -> tuple[Any, Callable[[Any], Model]]:
    """All state of a model as a pytree, and the function from such a tree to a model.

    The function may be called inside a traced one; models that it returns share nothing.
    """
    if isinstance(model, LinenModel):
        return model.variables, lambda state: dataclasses.replace(model, variables=state)
    graphdef, state = nnx.split(model)
    return state, lambda state: nnx.merge(graphdef, state, copy=True)


def trainable(model: Model) -> tuple[Any, Callable[[Any], Model]]:
    """The parameters (Linen's collection ``params``) of a model, and the way back to a model."""
    if isinstance(model, LinenModel):

        def rebuild(params: Any) -> Any:
            return dataclasses.replace(model, variables={**model.variables, "params": params})

        return model.variables["params"], rebuild
    graphdef, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)  # type: ignore[misc, type-var]
    return params, lambda params: nnx.merge(graphdef, params, rest, copy=True)


def training_batch_norms(model: Any) -> list[str]:
    """Paths of the BatchNorms of an NNX model that would not use their running statistics.

    In Linen this is an argument of the call.
    """
    if isinstance(model, LinenModel):
        return []
    return [
        _dotted(path)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm) and not module.use_running_average
    ]


# --- Convolutions ---------------------------------------------------------------------------------


def conv_patches(
    x: jax.Array,
    kernel: jax.Array | np.ndarray,
    window_strides: Any,
    padding: Any,
    pixels: np.ndarray | None = None,
    **kwargs: Any,
) -> jax.Array:
    """The window of each output pixel (im2col), from the arguments of ``conv_general_dilated``.

    Args:
      x: inputs, channels last.
      kernel: ``[*window, in, out]``; only its shape is used.
      window_strides, padding: as for ``jax.lax.conv_general_dilated``, as are the others.
      pixels: indices of the output pixels wanted, all examples' in one order; None takes all.

    Returns:
      ``[pixels, window positions, in]`` in the dtype of x.
    """
    window = kernel.shape[:-2]
    ones = (1,) * len(window)
    inner, outer = (tuple(kwargs.get(f"{side}_dilation") or ones) for side in ("lhs", "rhs"))
    size = [(n - 1) * step + 1 for n, step in zip(x.shape[1:-1], inner, strict=True)]
    span = [(n - 1) * step + 1 for n, step in zip(window, outer, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, span, window_strides, padding)
    widths = [(low, high, step - 1) for (low, high), step in zip(padding, inner, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
    ends = [n - extent + 1 for n, extent in zip(x.shape[1:-1], span, strict=True)]
    counts = [-(-end // step) for end, step in zip(ends, window_strides, strict=True)]
    views = []
    for position in np.ndindex(*window):
        starts = [p * step for p, step in zip(position, outer, strict=True)]
        places = list(zip(starts, ends, window_strides, strict=True))
        if pixels is None:
            view = tuple(slice(start, start + end, step) for start, end, step in places)
            views.append(x[(slice(None), *view)].reshape(-1, x.shape[-1]))
        else:
            example, *at = np.unravel_index(pixels, (len(x), *counts))
            at = [start + a * step for a, (start, _, step) in zip(at, places, strict=True)]
            views.append(x[(example, *at)])
    return jnp.stack(views, axis=1)
