"""Reads a network's layer shapes off a Flax model by tracing it, without running it.

What is executed, and how often, is read off the model's jaxpr; what a layer is called and which
operand holds its weights, off hooks. NNX modules are traced on a clone whose public hooks
(``conv_general_dilated``, ``dot_general``, ``einsum_op``, and ``attention_fn`` of any module) are
wrapped, around whatever they already hold; Linen modules through ``nn.intercept_methods``. The
hooks leave marks in the jaxpr (a name scope, and a name on the result). The user's model is not
touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from stp_jax.hwmodel.network import Layer, Network, dense, matmul


def trace(model: Any, *inputs: Any, name: str | None = None, **kwargs: Any) -> Network:
    """The layers that ``model(*inputs, **kwargs)`` executes, in order of execution.

    Every convolution and matrix product of the call's jaxpr is counted, as often as it runs: in
    ``scan`` (recurrent cells, stacked layers) once a step, under ``vmap`` once a row, or once a
    copy where the weights are mapped as well. Of a ``cond``'s branches the one with the most
    multiply-accumulates counts. Products that no layer makes, such as ``x @ w`` written in the
    open, are matrix products called ``product``.

    Args:
      model: an NNX module, a Linen module (its variables' shapes come from its ``init``), a bound
        Linen module, or what `stp_jax.quantize` makes of one.
      *inputs: arrays or ``jax.ShapeDtypeStruct``, of which only shape and dtype are used; what
        has no shape, such as a bool, stays as it is.
      name: the network's name, by default the model's class.
      **kwargs: keyword arguments of the call, such as ``train=False``, likewise.

    Returns:
      A network whose layer names are module paths joined by dots (``layer1.0.conv1``); the n-th
      use of a module ends in ``@n``, and attention contributes ``.scores`` and ``.context``.
      Elementwise work, pooling and embeddings are not layers; nor are products in a Pallas kernel.

    Raises:
      TypeError: not a Flax model.
      ValueError: the model has no such layer, or one that cannot be traced: a transposed
        convolution, or a layer in a ``while`` loop, whose steps are unknown.
    """
    if isinstance(getattr(model, "module", None), linen.Module) and not isinstance(
        model, linen.Module
    ):
        model = model.module  # an STP model has its module's layers
    recorder = _Recorder()
    if isinstance(model, nnx.Module):
        jaxpr = _nnx_jaxpr(model, recorder, _Call(inputs, kwargs))
    elif isinstance(model, linen.Module):
        jaxpr = _linen_jaxpr(model, recorder, _Call(inputs, kwargs))
    else:
        raise TypeError(f"expected an nnx.Module or a linen.Module, got {type(model).__name__}")
    layers = _Walk(recorder.marks).layers(jaxpr, held=False)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution, dense layer or product")
    uses = _Uses()
    named = (dataclasses.replace(layer, name=uses.unique(layer.name)) for layer in layers)
    return Network(tuple(named), name=name or type(model).__name__)


def record_activations(
    model: nnx.Module, *inputs: Any, bits: int = 8, **kwargs: Any
) -> dict[str, np.ndarray]:
    """Runs an NNX model once and returns what its layers see, as integers.

    The first of what `record_operands` returns.
    """
    return record_operands(model, *inputs, bits=bits, **kwargs)[0]


def record_operands(
    model: nnx.Module, *inputs: Any, bits: int = 8, **kwargs: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Runs an NNX model once and returns what its layers multiply, as integers.

    For PEs whose cycles depend on the digits of real operands. Each operand is scaled by its
    largest magnitude and rounded: without negative values to 0 ... 2**bits - 1, else to
    +-(2**(bits - 1) - 1).

    Args:
      model: an NNX module; it is run on a clone, like `trace`. Loops (`jax.lax.scan`) run step by
        step.
      *inputs: arrays to run on.
      bits: width of an operand, with its sign where it has one.
      **kwargs: static keyword arguments of the call.

    Returns:
      int32 inputs by layer name, as `trace` names them, and the second operands of attention's
      products, to be merged into ``weights``. An attention's first operands are its queries and
      the probabilities, its second its keys and values. Products written in the open are left out.

    Raises:
      ValueError: a layer runs under ``jax.vmap`` or ``jax.checkpoint``.
    """

    def run() -> _Recorder:
        recorder = _Recorder(keep=True)
        _hooked(model, recorder)(*inputs, **kwargs)
        return recorder

    try:
        recorder = run()
    except jax.errors.TracerArrayConversionError:  # a layer inside a scan or a jit
        try:
            with jax.disable_jit():
                recorder = run()
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "a layer runs under jax.vmap or jax.checkpoint, where no values can be seen; "
                "record a model without them"
            ) from error
    return tuple(
        {name: _integers(x, bits) for name, x in kept.items()}
        for kept in (recorder.inputs, recorder.seconds)
    )  # type: ignore[return-value]


def _integers(x: np.ndarray, bits: int) -> np.ndarray:
    x = x.astype(np.float64)
    top = (1 << bits) - 1 if x.min() >= 0 else (1 << (bits - 1)) - 1
    return np.rint(x * (top / (np.abs(x).max() or 1.0))).astype(np.int32)


class _Uses:
    """Gives a repeated name its ``@n``."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}

    def unique(self, name: str) -> str:
        self._uses[name] = use = self._uses.get(name, 0) + 1
        return name if use == 1 else f"{name}@{use}"


_calls = itertools.count()  # marks differ between traces: a jitted part may come from a cache


@dataclasses.dataclass
class _Mark:
    """The layers of one call of a hook, and the sizes of its result and weights then."""

    layers: list[Layer]
    size: int = 0
    weights: int = 0


class _Recorder:
    """Describes layers by their call, and keeps real operands if asked."""

    def __init__(self, *, keep: bool = False) -> None:
        self.marks: dict[str, _Mark] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.seconds: dict[str, np.ndarray] = {}
        self.keep = keep
        self._uses = _Uses()

    def call(
        self, name: str, describe: Callable, held: Callable, lhs: Any, rhs: Any, *args, **kwargs
    ) -> Any:
        """``held(lhs, rhs, ...)``, marked in the jaxpr; when running for real, kept.

        ``describe`` makes the layer from the shapes of both operands and of the result.
        """
        if self.keep:
            self.inputs[self._uses.unique(name)] = np.asarray(lhs)
            return held(lhs, rhs, *args, **kwargs)
        with self.marked([], rhs) as (mark, rhs):
            out = held(lhs, rhs, *args, **kwargs)
            self.marks[mark].layers.append(describe(lhs.shape, rhs.shape, out.shape))
            return self.result(mark, out)

    @contextlib.contextmanager
    def marked(self, layers: list[Layer], rhs: Any = None):
        """Within, products belong to the layers; gives the mark and the marked weights."""
        mark = f"stp#{next(_calls)}#"
        self.marks[mark] = _Mark(layers, weights=0 if rhs is None else np.size(rhs))
        with jax.named_scope(mark):
            yield mark, None if rhs is None else checkpoint_name(rhs, mark + "weights")

    def result(self, mark: str, out: Any) -> Any:
        self.marks[mark].size = np.size(out)
        return checkpoint_name(out, mark)

    def attention(self, name: str, held: Callable, query, key, value, *args, **kwargs) -> Any:
        layers = _attention(name, query.shape, key.shape, value.shape)
        if self.keep:
            self._keep_attention(name, held, query, key, value, *args, **kwargs)
            return held(query, key, value, *args, **kwargs)
        with self.marked(layers) as (mark, _):
            return self.result(mark, held(query, key, value, *args, **kwargs))

    def _keep_attention(self, name, held, query, key, value, *args, **kwargs) -> None:
        length, depth = key.shape[-3], value.shape[-1]
        # Attention is linear in its values: with columns of the identity it gives probabilities.
        identity = np.eye(length, -(-length // depth) * depth, dtype=value.dtype)
        columns = [
            held(query, key, jnp.broadcast_to(part[:, None], value.shape), *args, **kwargs)
            for part in np.split(identity, identity.shape[1] // depth, axis=1)
        ]
        probabilities = np.concatenate(columns, axis=-1)[..., :length]
        heads = query.shape[-2]
        names = [self._uses.unique(f"{name}.{which}") for which in ("scores", "context")]
        for product, first in zip(names, (query, probabilities), strict=True):
            self.inputs[product] = _rows_first(np.asarray(first))
        keys, values = (
            np.repeat(np.asarray(x), heads // x.shape[-2], axis=-2) for x in (key, value)
        )
        # (..., length, heads, depth) to (reduction, products * columns).
        self.seconds[names[0]] = _rows_first(np.swapaxes(keys, -1, -3))
        self.seconds[names[1]] = _rows_first(values)


def _rows_first(x: np.ndarray) -> np.ndarray:
    """(..., rows, heads, columns) to (rows, products * columns)."""
    x = np.moveaxis(x, -3, 0)
    return x.reshape(len(x), -1)


def _conv(
    name: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    out: tuple[int, ...],
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **others: Any,
) -> Layer:
    """A layer from the shapes and the arguments of ``jax.lax.conv_general_dilated``."""
    if {*(lhs_dilation or ())} - {1}:
        raise ValueError(f"{name}: transposed convolutions are not modelled")
    if batch_group_count != 1:
        raise ValueError(f"{name}: convolutions grouped over the batch are not modelled")
    numbers = jax.lax.conv_dimension_numbers(lhs, rhs, dimension_numbers)
    batch, channels, *in_size = (lhs[axis] for axis in numbers.lhs_spec)
    filters, _, *kernel = (rhs[axis] for axis in numbers.rhs_spec)
    dilation = tuple(rhs_dilation or (1,) * len(kernel))
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(in_size, reach, window_strides, padding)
    return Layer(
        name=name,
        batch=batch,
        in_size=tuple(in_size),
        out_size=tuple(out[axis] for axis in numbers.out_spec[2:]),
        kernel=tuple(kernel),
        stride=tuple(window_strides),
        channels=channels,
        filters=filters,
        groups=feature_group_count,
        dilation=dilation,
        padding=tuple((int(low), int(high)) for low, high in padding),
    )


def _product(name, lhs, rhs, contracting, batching=((), ())) -> Layer:
    """``lhs`` and ``rhs`` are shapes, axes are as in ``jax.lax.dot_general``."""
    products = math.prod(lhs[axis] for axis in batching[0])
    reduction = math.prod(lhs[axis] for axis in contracting[0])
    rows = math.prod(lhs) // (products * reduction)
    columns = math.prod(rhs) // (products * reduction)
    if batching[0]:
        return matmul(name, rows, reduction, columns, products=products)
    return dense(name, reduction, columns, rows=rows)


def _einsum(name, equation, lhs, rhs) -> Layer:
    equation = equation.replace(" ", "")
    if "..." in equation:
        parsed = opt_einsum.parser.parse_einsum_input((equation, lhs, rhs), shapes=True)
        equation = f"{parsed[0]}->{parsed[1]}"
    operands, result = equation.split("->")
    left, right = operands.split(",")
    shared = [label for label in left if label in right]
    contracted = [label for label in shared if label not in result]
    batched = [label for label in shared if label in result]
    axes = [
        tuple(tuple(term.index(label) for label in labels) for term in (left, right))
        for labels in (contracted, batched)
    ]
    return _product(name, lhs, rhs, *axes)


def _attention(name, query, key, value) -> list[Layer]:
    """Query, key and value of shapes (..., length, heads, depth)."""
    *batch, rows, heads, depth = query
    products, length = math.prod(batch) * heads, key[-3]
    return [
        matmul(f"{name}.scores", rows, depth, length, products=products),
        matmul(f"{name}.context", rows, length, value[-1], products=products),
    ]


class _Walk:
    """The layers that a jaxpr executes, one after the other."""

    def __init__(self, marks: dict[str, _Mark]) -> None:
        self._marks = marks
        self._weights: dict[str, int] = {}

    def layers(self, jaxpr: Jaxpr, *, held: bool) -> list[Layer]:
        """Layers in order; ``held``: the jaxpr's own products belong to a marked layer."""
        found: list[Layer] = []
        for eqn in jaxpr.eqns:
            scopes = re.findall(r"stp#\d+#", str(eqn.source_info.name_stack))
            found += self._equation(eqn, held or any(scope in self._marks for scope in scopes))
        return found

    def _equation(self, eqn: Any, held: bool) -> list[Layer]:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive == "name":
            return self._marked(params["name"], math.prod(eqn.outvars[0].aval.shape))
        if primitive == "scan":
            return params["length"] * self.layers(params["jaxpr"].jaxpr, held=held)
        if primitive == "cond":
            branches = [self.layers(branch.jaxpr, held=held) for branch in params["branches"]]
            return max(branches, key=lambda layers: sum(layer.macs for layer in layers))
        if primitive == "pallas_call":
            return []
        inner = [layer for jaxpr in _jaxprs(params) for layer in self.layers(jaxpr, held=held)]
        if primitive == "while" and inner:
            names = ", ".join(layer.name for layer in inner)
            raise ValueError(f"{names}: runs in a while loop, whose number of steps is not known")
        return inner if held else inner + self._unmarked(eqn)

    def _marked(self, name: str, size: int) -> list[Layer]:
        if name.endswith("weights"):
            self._weights[name.removesuffix("weights")] = size
            return []
        if name not in self._marks:
            return []
        mark = self._marks[name]
        mapped = size // mark.size  # by vmap
        copies = self._weights.get(name, mark.weights) // mark.weights if mark.weights else 1
        rows = mapped // copies
        return copies * [_mapped(layer, rows) for layer in mark.layers]

    def _unmarked(self, eqn: Any) -> list[Layer]:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            return []
        lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
        if primitive == "dot_general":
            contracting, batching = params["dimension_numbers"]
            product = _product("product", lhs, rhs, contracting, batching)
            return [dataclasses.replace(product, kind="matmul")]
        if primitive == "conv_general_dilated":
            return [_conv("convolution", lhs, rhs, eqn.outvars[0].aval.shape, **params)]
        raise ValueError("products with ragged groups (jax.lax.ragged_dot) are not modelled")


def _mapped(layer: Layer, rows: int) -> Layer:
    """The layer, of which vmap executes so many with the same weights."""
    more = ("channels", "filters", "groups") if layer.kind == "matmul" else ("batch",)
    extents: dict[str, Any] = {name: rows * getattr(layer, name) for name in more}
    return dataclasses.replace(layer, **extents)


def _jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr))
    closed = (leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves)
    return [jaxpr for jaxpr in closed if isinstance(jaxpr, Jaxpr)]


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


def _nnx_jaxpr(model: nnx.Module, recorder: _Recorder, call: _Call) -> Jaxpr:
    graph, state = nnx.split(_hooked(model, recorder))

    def run(state, arrays):
        return jax.tree.leaves(call.run(nnx.merge(graph, state), arrays))

    return jax.make_jaxpr(run)(state, call.arrays).jaxpr


def _hooked(model: nnx.Module, recorder: _Recorder) -> nnx.Module:
    clone = nnx.clone(model)
    for path, module in nnx.iter_graph(clone):
        if isinstance(module, nnx.Module):
            _hook(module, ".".join(map(str, path)) or "model", recorder)
    return clone


def _hook(module: nnx.Module, name: str, recorder: _Recorder) -> None:
    if isinstance(module, nnx.ConvTranspose):
        raise ValueError(f"{name}: transposed convolutions are not modelled")
    if isinstance(module, nnx.Conv):
        _wrap(module, "conv_general_dilated", _recorded_conv, name, recorder)
    elif isinstance(module, nnx.LinearGeneral):
        if module.dot_general_cls is not None:
            held = module.dot_general_cls
            module.dot_general_cls = lambda: _recorded_dot(held(), name, recorder)
        else:
            module.dot_general = module.dot_general or jax.lax.dot_general
            _wrap(module, "dot_general", _recorded_dot, name, recorder)
    elif isinstance(module, nnx.Linear):
        _wrap(module, "dot_general", _recorded_dot, name, recorder)
    elif isinstance(module, nnx.Einsum):
        _wrap(module, "einsum_op", _recorded_einsum, name, recorder)
    elif callable(getattr(module, "attention_fn", None)):
        _wrap(module, "attention_fn", _recorded_attention, name, recorder)


def _wrap(module: nnx.Module, hook: str, wrapper: Callable, name: str, recorder) -> None:
    # Static, since the hook may have held an object with arrays, which Flax keeps as data.
    setattr(module, hook, nnx.static(wrapper(getattr(module, hook), name, recorder)))


# Positional arguments of jax.lax.conv_general_dilated after the padding.
_CONV_OPTIONS = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")


def _recorded_conv(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def conv_general_dilated(lhs, rhs, window_strides, padding, *args, **kwargs):
        options = dict(zip(_CONV_OPTIONS, args, strict=False)) | kwargs
        options |= {"window_strides": window_strides, "padding": padding}
        describe = functools.partial(_conv, name, **options)
        return recorder.call(
            name, describe, held, lhs, rhs, window_strides, padding, *args, **kwargs
        )

    return conv_general_dilated


def _recorded_dot(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def dot_general(lhs, rhs, dimension_numbers, *args, **kwargs):
        def describe(lhs, rhs, _):
            return _product(name, lhs, rhs, *dimension_numbers)

        return recorder.call(name, describe, held, lhs, rhs, dimension_numbers, *args, **kwargs)

    return dot_general


def _recorded_einsum(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def einsum(equation, lhs, rhs, *args, **kwargs):
        def describe(lhs, rhs, _):
            return _einsum(name, equation, lhs, rhs)

        def product(lhs, rhs):
            return held(equation, lhs, rhs, *args, **kwargs)

        return recorder.call(name, describe, product, lhs, rhs)

    return einsum


def _recorded_attention(held: Callable, name: str, recorder: _Recorder) -> Callable:
    @functools.wraps(held)  # modules look at its signature
    def attention(query, key, value, *args, **kwargs):
        return recorder.attention(name, held, query, key, value, *args, **kwargs)

    return attention


def _linen_jaxpr(model: linen.Module, recorder: _Recorder, call: _Call) -> Jaxpr:
    keys = {stream: jax.random.key(0) for stream in ("params", "dropout")}
    if model.scope is not None:
        module, variables = model.unbind()
    else:
        module = model
        init = functools.partial(module.init, keys)
        variables = jax.eval_shape(functools.partial(call.run, init), call.arrays)

    def record(next_fun, args, kwargs, context):
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        name = ".".join(context.module.path) or "model"
        return _record_linen(recorder, name, context.module, next_fun, args, kwargs)

    def run(variables, arrays):
        apply = functools.partial(module.apply, variables, rngs=keys, mutable=True)
        return jax.tree.leaves(call.run(apply, arrays))

    with linen.intercept_methods(record):
        return jax.make_jaxpr(run)(variables, call.arrays).jaxpr


def _record_linen(recorder: _Recorder, name: str, module: Any, next_fun, args, kwargs) -> Any:
    if isinstance(module, linen.ConvTranspose):
        raise ValueError(f"{name}: transposed convolutions are not modelled")
    if callable(getattr(module, "attention_fn", None)):
        held = module.attention_fn
        # Modules are frozen; this one is the call's own clone, and gets its function back.
        object.__setattr__(module, "attention_fn", _recorded_attention(held, name, recorder))
        try:
            return next_fun(*args, **kwargs)
        finally:
            object.__setattr__(module, "attention_fn", held)
    if not isinstance(module, linen.Conv | linen.Dense | linen.DenseGeneral | linen.Einsum):
        return next_fun(*args, **kwargs)
    x = args[0] if args else kwargs["inputs"]
    with recorder.marked([]) as (mark, _):
        out = next_fun(*args, **kwargs)
        kernel: Any = module.get_variable("params", "kernel")
        kernel = checkpoint_name(getattr(kernel, "value", kernel), mark + "weights")
        recorder.marks[mark].weights = np.size(kernel)
        recorder.marks[mark].layers.append(_linen_layer(name, module, x.shape, out.shape))
        return recorder.result(mark, out)


def _linen_layer(name: str, module: Any, shape: tuple[int, ...], out: tuple[int, ...]) -> Layer:
    if isinstance(module, linen.Conv):
        return _linen_conv(name, module, shape, out)
    if isinstance(module, linen.Einsum):
        return _einsum(name, module.einsum_str, shape, tuple(module.shape))
    axes = getattr(module, "axis", -1)
    axes = axes if isinstance(axes, tuple) else (axes,)
    reduction = math.prod(shape[axis] for axis in axes)
    rows = math.prod(shape) // reduction
    return dense(name, reduction, math.prod(out) // rows, rows=rows)


def _linen_conv(name: str, module: linen.Conv, shape: tuple[int, ...], out) -> Layer:
    kernel = module.kernel_size
    kernel = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    spatial = len(kernel)

    def every_axis(extent: Any) -> tuple[int, ...]:
        return (extent or 1,) * spatial if isinstance(extent, int | None) else tuple(extent)

    strides, dilation = every_axis(module.strides), every_axis(module.kernel_dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    in_size, padding = shape[-spatial - 1 : -1], module.padding
    if padding in ("CIRCULAR", "REFLECT"):  # pads with pixels, then convolves without padding
        in_size, padding = tuple(n + r - 1 for n, r in zip(in_size, reach, strict=True)), "VALID"
    elif padding == "CAUSAL":
        padding = [(reach[0] - 1, 0)]
    elif isinstance(padding, int):
        padding = [(padding, padding)] * spatial
    elif not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else p for p in padding]
    # Linen flattens any leading axes into the batch.
    lhs = (math.prod(shape[: -spatial - 1]), *in_size, shape[-1])
    layout = (0, spatial + 1, *range(1, spatial + 1))
    numbers = jax.lax.ConvDimensionNumbers(layout, (spatial + 1, spatial, *range(spatial)), layout)
    return _conv(
        name,
        lhs,
        (*kernel, shape[-1] // module.feature_group_count, out[-1]),
        (lhs[0], *out[-spatial - 1 :]),
        window_strides=strides,
        padding=padding,
        lhs_dilation=every_axis(module.input_dilation),
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=module.feature_group_count,
    )
