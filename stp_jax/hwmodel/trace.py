"""Reads a network's layer shapes off a Flax model by tracing it, without running it.

NNX modules are traced on a clone whose public hooks (``conv_general_dilated``, ``dot_general``,
``einsum_op``, and ``attention_fn`` of any module) are wrapped, around whatever they already hold;
Linen modules through ``nn.intercept_methods``. The user's model is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import opt_einsum
from flax import linen, nnx

from stp_jax.hwmodel.network import Layer, Network, dense, matmul


def trace(model: Any, *inputs: Any, name: str | None = None, **kwargs: Any) -> Network:
    """The layers that ``model(*inputs, **kwargs)`` executes, in order of execution.

    Args:
      model: an NNX module, a Linen module (traced through its ``init``) or a bound Linen module.
      *inputs: arrays or ``jax.ShapeDtypeStruct``; only shape and dtype are used.
      name: the network's name, by default the model's class.
      **kwargs: static keyword arguments of the call, such as ``train=False``.

    Returns:
      A network whose layer names are module paths joined by dots (``layer1.0.conv1``); the n-th
      use of a shared module ends in ``@n``, and attention contributes ``.scores`` and
      ``.context``. Elementwise work, pooling and embeddings are not layers.

    Raises:
      TypeError: not a Flax model.
      ValueError: the model has no such layer, or one that cannot be traced (a transposed
        convolution).
    """
    recorder = _Recorder()
    if isinstance(model, nnx.Module):
        _trace_nnx(model, recorder, inputs, kwargs)
    elif isinstance(model, linen.Module):
        _trace_linen(model, recorder, inputs, kwargs)
    else:
        raise TypeError(f"expected an nnx.Module or a linen.Module, got {type(model).__name__}")
    if not recorder.layers:
        raise ValueError(f"{type(model).__name__} has no convolution, dense layer or product")
    return Network(tuple(recorder.layers), name=name or type(model).__name__)


def record_activations(
    model: nnx.Module, *inputs: Any, bits: int = 8, **kwargs: Any
) -> dict[str, np.ndarray]:
    """Runs an NNX model once and returns what its layers see, as integers.

    For PEs whose cycles depend on the digits of real activations. Each layer's input is scaled so
    that its largest magnitude becomes 2**bits - 1, and rounded.

    Args:
      model: an NNX module; it is run on a clone, like `trace`.
      *inputs: arrays to run on.
      bits: width of the magnitudes.
      **kwargs: static keyword arguments of the call.

    Returns:
      int32 inputs by layer name, as `trace` names them; products of two activations (attention)
      are left out.
    """
    recorder = _Recorder(keep_inputs=True)
    _hooked(model, recorder)(*inputs, **kwargs)
    top = (1 << bits) - 1
    scales = {name: np.abs(x).max() or 1.0 for name, x in recorder.inputs.items()}
    return {
        name: np.rint(x * (top / scales[name])).astype(np.int32)
        for name, x in recorder.inputs.items()
    }


class _Recorder:
    """Collects layers, gives a repeated name its ``@n``, and keeps inputs if asked."""

    def __init__(self, *, keep_inputs: bool = False) -> None:
        self.layers: list[Layer] = []
        self.inputs: dict[str, np.ndarray] = {}
        self._uses: dict[str, int] = {}
        self._keep_inputs = keep_inputs

    def saw(self, lhs: Any) -> None:
        """Keeps the input of the layer that was recorded last."""
        if self._keep_inputs:
            self.inputs[self.layers[-1].name] = np.asarray(lhs)

    def unique(self, name: str) -> str:
        self._uses[name] = use = self._uses.get(name, 0) + 1
        return name if use == 1 else f"{name}@{use}"

    def conv(self, name, lhs, rhs, out, strides, feature_groups, dimension_numbers=None) -> None:
        numbers = jax.lax.conv_dimension_numbers(lhs, rhs, dimension_numbers)
        batch, channels, *in_size = (lhs[axis] for axis in numbers.lhs_spec)
        filters, _, *kernel = (rhs[axis] for axis in numbers.rhs_spec)
        self.layers.append(
            Layer(
                name=self.unique(name),
                batch=batch,
                in_size=tuple(in_size),
                out_size=tuple(out[axis] for axis in numbers.out_spec[2:]),
                kernel=tuple(kernel),
                stride=tuple(strides),
                channels=channels,
                filters=filters,
                groups=feature_groups,
            )
        )

    def product(self, name, lhs, rhs, contracting, batching=((), ())) -> None:
        """``lhs`` and ``rhs`` are shapes, axes are as in ``jax.lax.dot_general``."""
        products = math.prod(lhs[axis] for axis in batching[0])
        reduction = math.prod(lhs[axis] for axis in contracting[0])
        rows = math.prod(lhs) // (products * reduction)
        columns = math.prod(rhs) // (products * reduction)
        name = self.unique(name)
        if batching[0]:
            self.layers.append(matmul(name, rows, reduction, columns, products=products))
        else:
            self.layers.append(dense(name, reduction, columns, rows=rows))

    def einsum(self, name, equation, lhs, rhs) -> None:
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
        self.product(name, lhs, rhs, *axes)

    def attention(self, name, query, key, value) -> None:
        """Query, key and value of shapes (..., length, heads, depth)."""
        *batch, rows, heads, depth = query
        products, length = math.prod(batch) * heads, key[-3]
        scores, context = self.unique(f"{name}.scores"), self.unique(f"{name}.context")
        self.layers.append(matmul(scores, rows, depth, length, products=products))
        self.layers.append(matmul(context, rows, length, value[-1], products=products))


def _trace_nnx(model: nnx.Module, recorder: _Recorder, inputs, kwargs) -> None:
    graph, state = nnx.split(_hooked(model, recorder))
    jax.eval_shape(lambda state, *args: nnx.merge(graph, state)(*args, **kwargs), state, *inputs)


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


def _recorded_conv(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def conv_general_dilated(lhs, rhs, window_strides, padding, *args, **kwargs):
        out = held(lhs, rhs, window_strides, padding, *args, **kwargs)
        recorder.conv(
            name,
            lhs.shape,
            rhs.shape,
            out.shape,
            window_strides,
            kwargs.get("feature_group_count", 1),
            kwargs.get("dimension_numbers"),
        )
        recorder.saw(lhs)
        return out

    return conv_general_dilated


def _recorded_dot(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def dot_general(lhs, rhs, dimension_numbers, *args, **kwargs):
        recorder.product(name, lhs.shape, rhs.shape, *dimension_numbers)
        recorder.saw(lhs)
        return held(lhs, rhs, dimension_numbers, *args, **kwargs)

    return dot_general


def _recorded_einsum(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def einsum(equation, lhs, rhs, *args, **kwargs):
        recorder.einsum(name, equation, lhs.shape, rhs.shape)
        recorder.saw(lhs)
        return held(equation, lhs, rhs, *args, **kwargs)

    return einsum


def _recorded_attention(held: Callable, name: str, recorder: _Recorder) -> Callable:
    def attention(query, key, value, *args, **kwargs):
        recorder.attention(name, query.shape, key.shape, value.shape)
        return held(query, key, value, *args, **kwargs)

    return attention


def _trace_linen(model: linen.Module, recorder: _Recorder, inputs, kwargs) -> None:
    if model.scope is not None:
        module, variables = model.unbind()

        def call(*args):
            return module.apply(variables, *args, **kwargs, mutable=True)
    else:
        keys = {stream: jax.random.key(0) for stream in ("params", "dropout")}

        def call(*args):
            return model.init(keys, *args, **kwargs)

    def record(next_fun, args, call_kwargs, context):
        module, path = context.module, context.module.path
        before = len(recorder.layers)
        out = next_fun(*args, **call_kwargs)
        if context.method_name == "__call__" and args:
            _record_linen(recorder, ".".join(path) or "model", module, args, out, before)
        return out

    with linen.intercept_methods(record):
        jax.eval_shape(call, *inputs)


def _record_linen(recorder: _Recorder, name: str, module: linen.Module, args, out, before) -> None:
    shape = args[0].shape
    if isinstance(module, linen.ConvTranspose):
        raise ValueError(f"{name}: transposed convolutions are not modelled")
    if isinstance(module, linen.Conv):
        _record_linen_conv(recorder, name, module, shape, out.shape)
    elif isinstance(module, linen.Dense | linen.DenseGeneral):
        axes = getattr(module, "axis", -1)
        axes = axes if isinstance(axes, tuple) else (axes,)
        reduction = math.prod(shape[axis] for axis in axes)
        rows = math.prod(shape) // reduction
        columns = math.prod(out.shape) // rows
        recorder.product(name, (rows, reduction), (reduction, columns), ((1,), (0,)))
    elif isinstance(module, linen.Einsum):
        recorder.einsum(name, module.einsum_str, shape, tuple(module.shape))
    elif isinstance(module, linen.MultiHeadDotProductAttention):
        projections = recorder.layers[before:]  # query, key, value, output
        del recorder.layers[before:]
        features = module.qkv_features or shape[-1]
        heads = (module.num_heads, features // module.num_heads)
        key = args[1].shape if len(args) > 1 and args[1] is not None else shape
        recorder.layers.extend(projections[:-1])
        recorder.attention(name, (*shape[:-1], *heads), *[(*key[:-1], *heads)] * 2)
        recorder.layers.extend(projections[-1:])


def _record_linen_conv(recorder: _Recorder, name: str, module: linen.Conv, shape, out) -> None:
    kernel = module.kernel_size
    kernel = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    strides = module.strides if module.strides is not None else 1
    strides = (strides,) * len(kernel) if isinstance(strides, int) else tuple(strides)
    spatial = len(kernel)
    batch = math.prod(shape[: -spatial - 1])  # Linen flattens any leading axes into the batch
    groups = module.feature_group_count
    recorder.layers.append(
        Layer(
            name=recorder.unique(name),
            batch=batch,
            in_size=tuple(shape[-spatial - 1 : -1]),
            out_size=tuple(out[-spatial - 1 : -1]),
            kernel=kernel,
            stride=strides,
            channels=shape[-1],
            filters=out[-1],
            groups=groups,
        )
    )
