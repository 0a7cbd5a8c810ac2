"""Packed checkpoints: an STP model as term streams in one safetensors file.

`docs/format.md` defines the format. In short: every quantized kernel is written as the stream of
`stp_jax.terms.pack` (or as plain integers where these are shorter) with its scale; everything else,
biases, normalisation, layers that stayed float, as it is; and the quantizers' rules stand as JSON
in the file's metadata. So the file and the float model's code give the STP model back, integer for
integer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from stp_jax import hooks
from stp_jax.export.variables import LISTED, check_fit, listing, read, variables, write
from stp_jax.hooks import LinenModel, keys_of, model_name, unboxed
from stp_jax.quant.calibration import integer_weights
from stp_jax.quant.layers import (
    QuantizedLayer,
    check_not_stacked,
    check_own_kernels,
    quantized_layers,
    spread_scale,
    without_quantizers,
)
from stp_jax.quant.linen import LEARNED, STATE, BoundModel, quantize_linen
from stp_jax.quant.nnx import kernel_paths, quantize_nnx
from stp_jax.quant.policy import Policy, Rule
from stp_jax.quant.sensitivity import group_counts
from stp_jax.terms import PackedTerms, pack, unpack
from stp_jax.terms.packing import slot_format

FORMAT = "stp_jax.packed_terms"
VERSION = 4  # the latest that is read; a file is written as the first that has what it needs:
_BY_FILTER, _BY_GROUP = 2, 3  # budgets by filter, scales by group
_POWERS = 4  # power-of-two scales, with biases on the grid of the sums; all others are version 1
Model = TypeVar("Model", bound=nnx.Module)
_BUDGET = "promote_dtype.budget"
# What a header that does not say what it must leads to.
_DAMAGE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


# --- Layers as tensors ----------------------------------------------------------------------------


def _in_layer(path: str, name: str) -> str:
    """The name of what a layer has; a model that is one layer itself has the path ""."""
    return f"{path}.{name}" if path else name


def _kernel_name(path: str, quantized: QuantizedLayer) -> str:
    return _in_layer(path, quantized.layer.kernel_name)


def _slot_bits(rule: Rule, budgets: np.ndarray) -> np.ndarray:
    """Bits of the slots of a group at each of the budgets."""
    found = [k * slot_format(rule.group_size, k, rule.bits).stored_bits for k in budgets.tolist()]
    return np.array(found, np.int64)


def _is_stream(rule: Rule, budgets: np.ndarray) -> bool:
    """Whether a group's slots take fewer bits than its integers, in the mean over filters."""
    mean = _slot_bits(rule, budgets).mean()
    return bool(mean < rule.group_size * _integer_type(rule).itemsize * 8)


def _integer_type(rule: Rule) -> np.dtype:
    return np.dtype(np.int8 if rule.bits <= 8 else np.int32)


def _pack(integers: np.ndarray, quantized: QuantizedLayer) -> PackedTerms:
    """The kernel's stream; group axes of the kernel are merged into one, the stream's axis."""
    rule, budget = quantized.rule, np.asarray(quantized.budget)
    layout = rule.format.layout(quantized.format.axes.groups)
    shape, axis = layout.merged(integers.shape)
    if budget.ndim:
        budget = budget.reshape(layout.merged(budget.shape)[0])
    return pack(
        integers.reshape(shape),
        group_size=rule.group_size,
        budget=budget,
        axis=axis,
        encoding=rule.encoding,
        bits=rule.bits,
    )


def _layer_tensors(
    path: str, quantized: QuantizedLayer, integers: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of one quantized layer and its entry in the metadata."""
    name = _kernel_name(path, quantized)
    rule, budgets = quantized.rule, np.asarray(quantized.flat_budget)
    tensors: dict[str, Any] = {f"{name}.scale": quantized.shared_scale}
    entry: dict[str, Any] = {
        "kernel": name,
        "shape": integers.shape,
        "budget": budgets.tolist(),  # one number, or a list by filter
    }
    if _is_stream(rule, budgets.reshape(-1)):
        packed = _pack(integers, quantized)
        tensors[f"{name}.terms"] = jnp.asarray(packed.data)
        entry["stream"] = {"shape": packed.shape, "axis": packed.axis}
        if budgets.ndim:
            extents = np.shape(packed.budget)
            entry["stream"]["filters"] = [a for a, n in enumerate(extents) if n > 1]
    else:
        tensors[f"{name}.integers"] = jnp.asarray(integers.astype(_integer_type(rule)))
    if quantized.stored_input_scale is not None:
        tensors[_in_layer(path, "input.scale")] = quantized.input_scale
    if rule.weight_scale == "max":
        # The largest weight that set the scale is gone: from now on the scale is a stored one.
        rule = dataclasses.replace(rule, weight_scale="search")
    entry["rule"] = {k: v for k, v in dataclasses.asdict(rule).items() if k != "path"}
    if rule.scale_group is None:
        del entry["rule"]["scale_group"]  # unknown before version 3
    else:
        entry["scale_axis"] = quantized.format.axes.groups[0]
    if not rule.power_of_two_scales:
        del entry["rule"]["power_of_two_scales"]  # unknown before version 4
    return tensors, entry


def _float_values(model: Any) -> dict[str, jax.Array]:
    """The variables that no quantizer has part in, random streams aside, by dotted path.

    Of a Linen model the collection is left out, so that a file does not depend on the API.
    """
    layers = quantized_layers(model)
    kernels = {_kernel_name(path, layer) for path, layer in layers.items()}
    if isinstance(model, LinenModel):
        names = _linen_names(without_quantizers(model).variables)
        flat = hooks.flat_variables(model.variables)
        return {name: unboxed(flat[key]) for name, key in names.items() if name not in kernels}
    quantizers = tuple(_in_layer(path, "promote_dtype.") for path in layers)
    return {
        name: variable[...]
        for name, variable in variables(model)
        if name not in kernels
        and not name.startswith(quantizers)
        and not isinstance(variable, nnx.RngState)
    }


def _linen_names(tree: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The keys of Linen variables by dotted path, without the collection."""
    names: dict[str, tuple[str, ...]] = {}
    for key, value in hooks.flat_variables(tree).items():
        name = ".".join(key[1:])
        if hasattr(unboxed(value), "shape"):  # not an empty collection
            if name in names:
                raise ValueError(f"{key[0]} and {names[name][0]} both have a variable {name!r}")
            names[name] = key
    return names


# --- Saving ---------------------------------------------------------------------------------------


def save_packed(model: Any, path: str | Path) -> None:
    """Writes an STP model as packed terms; a file that exists is replaced when all is written.

    Args:
      model: an STP model, a Linen one with its variables, in any stage of training. Its float
        kernels are not kept, only the integers that they are projected to at the present budgets.
      path: the file, conventionally ``*.safetensors``.

    Raises:
      ValueError: the model has no quantized layer, or a stack of them, or two layers share a
        kernel.
    """
    layers = quantized_layers(model)
    check_own_kernels(layers, "save_packed")
    check_not_stacked(layers, "save_packed")
    integers = integer_weights(model)
    tensors, entries = _float_values(model), {}
    for layer_path, quantized in layers.items():
        of_layer, entries[layer_path] = _layer_tensors(layer_path, quantized, integers[layer_path])
        tensors |= of_layer
    by_filter = any(isinstance(entry["budget"], list) for entry in entries.values())
    by_group = any("scale_axis" in entry for entry in entries.values())
    powers = any("power_of_two_scales" in entry["rule"] for entry in entries.values())
    version = _POWERS if powers else _BY_GROUP if by_group else _BY_FILTER if by_filter else 1
    header = {"version": version, "model": model_name(model), "layers": entries}
    write(Path(path), tensors, {FORMAT: json.dumps(header)})


# --- Loading --------------------------------------------------------------------------------------


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} holds no packed terms (its metadata lack {FORMAT}); PyTorch weights are read "
            "by stp_jax.models.load_torch"
        )
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its metadata {FORMAT} cannot be read") from error
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"{path} is of version {version} of the format, this stp_jax reads versions 1 to "
            f"{VERSION}"
        )
    if not isinstance(header.get("layers"), dict):
        raise ValueError(f"{path} is damaged: its metadata {FORMAT} list no layers")
    return header


def _policy(path: Path, header: Mapping[str, Any]) -> Policy:
    """The rules of the file's layers."""
    rules = []
    for layer, entry in header["layers"].items():
        try:
            rules.append(Rule(path=re.escape(layer), **entry["rule"]))
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged: the rule of layer {layer!r}: {error}") from error
    return Policy(rules)


def _stream_budget(entry: Mapping[str, Any]) -> int | np.ndarray:
    """The budget of a stream; by filter with the axes of the stream."""
    if not isinstance(entry["budget"], list):
        return entry["budget"]
    shape, filters = entry["stream"]["shape"], entry["stream"]["filters"]
    extents = [n if a in filters else 1 for a, n in enumerate(shape)]
    return np.asarray(entry["budget"], np.int32).reshape(extents)


def _stored_budget(entry: Mapping[str, Any], scale: jax.Array) -> jax.Array:
    """The budget as a model stores it; by filter in the shape of the scale."""
    budget = jnp.asarray(entry["budget"], jnp.int32)
    axis = entry.get("scale_axis")
    shape = tuple(1 if a == axis else n for a, n in enumerate(scale.shape))
    return budget.reshape(shape) if budget.ndim else budget


def _integers(name: str, entry: Mapping[str, Any], tensors: dict[str, jax.Array]) -> np.ndarray:
    """The kernel's integers, int32, taken out of the tensors."""
    rule = entry["rule"]
    if f"{name}.integers" in tensors:
        return np.asarray(tensors.pop(f"{name}.integers"), np.int32)
    packed = PackedTerms(
        data=np.asarray(tensors.pop(f"{name}.terms")),
        shape=tuple(entry["stream"]["shape"]),
        axis=entry["stream"]["axis"],
        group_size=rule["group_size"],
        budget=_stream_budget(entry),
        encoding=rule["encoding"],
        bits=rule["bits"],
    )
    return unpack(packed).reshape(entry["shape"])


def _kernel(name: str, entry: Mapping[str, Any], tensors: dict[str, jax.Array]) -> jax.Array:
    """The kernel, float32: its integers times its scale."""
    integers = _integers(name, entry, tensors)
    scale = tensors[f"{name}.scale"]
    if "scale_axis" in entry:
        axes, size = (entry["scale_axis"],), entry["rule"]["scale_group"]
        scale = spread_scale(scale, integers.shape, axes, size)
    return jnp.asarray(integers, jnp.float32) * scale


def _values(entries: Mapping[str, Any], tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The values of an STP model's variables by dotted path."""
    tensors = dict(tensors)
    values = {}
    for path, entry in entries.items():
        try:
            values[entry["kernel"]] = _kernel(entry["kernel"], entry, tensors)
            scale = tensors.pop(f"{entry['kernel']}.scale")
            values[_in_layer(path, "promote_dtype.weight_scale")] = scale
            values[_in_layer(path, "promote_dtype.budget")] = _stored_budget(entry, scale)
        except _DAMAGE as error:
            raise ValueError(f"the file is damaged at layer {path!r}: {error}") from error
        if (stored := _in_layer(path, "input.scale")) in tensors:
            name = _in_layer(path, "promote_dtype.activation_scale")
            values[name] = tensors.pop(stored)
    return values | tensors


@overload
def load_packed(model: Model, path: str | Path) -> Model: ...


@overload
def load_packed(model: nn.Module, path: str | Path, *inputs: Any, **kwargs: Any) -> BoundModel: ...


def load_packed(model: Any, path: str | Path, *inputs: Any, **kwargs: Any) -> Any:
    """Reads a file of `save_packed` into an STP model.

    Args:
      model: the float model that the saved one was made from, with any weights: an NNX module,
        which may be abstract (from ``nnx.eval_shape``), or a Linen module. It is not changed.
      path: the file.
      *inputs: of a Linen module, to find its layers; only shape and dtype are used.
      **kwargs: keyword arguments of that call, such as ``train=False``.

    Returns:
      An STP model like `stp_jax.quantize`'s, for Linen with its variables, with the file's rules,
      budgets, scales and integers: its outputs are bit for bit those of the saved model. Its float
      kernels are the integers times their scales.

    Raises:
      ValueError: the file is missing, damaged, of another kind, or does not fit the model; the
        message names what is missing, left over or of another shape.

    >>> import stp_jax, tempfile
    >>> from stp_jax import models
    >>> float_model = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4)
    >>> model = stp_jax.quantize(float_model, stp_jax.default_policy(float_model, budget=6))
    >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    ...     save_packed(model, file.name)
    ...     again = load_packed(float_model, file.name)
    >>> bool((again(jnp.ones((1, 4))) == model(jnp.ones((1, 4)))).all())
    True
    """
    path = Path(path)
    tensors, metadata = read(path)
    header = _header(path, metadata)
    policy = _policy(path, header)
    if isinstance(model, nn.Module):
        return _load_linen(model, path, header["layers"], policy, tensors, inputs, kwargs)
    return _load_nnx(model, path, header, policy, tensors)


def _with_budgets(wanted: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A model's variables with budgets in the file's shape: by layer, or by filter as its scale."""
    return {n: values.get(n, v) if n.endswith(_BUDGET) else v for n, v in wanted.items()}


def _load_linen(
    module: nn.Module,
    path: Path,
    entries: Mapping[str, Any],
    policy: Policy,
    tensors: dict[str, jax.Array],
    inputs: Sequence[Any],
    options: Mapping[str, Any],
) -> BoundModel:
    if not inputs:
        raise ValueError("the layers of a Linen module are known once it is traced: pass an input")
    quantized = quantize_linen(module, policy)
    init = functools.partial(quantized.init, **options)
    flat = hooks.flat_variables(jax.eval_shape(init, jax.random.key(0), *inputs))
    model = quantized.bind(hooks.nested_variables(flat))
    names = _linen_names(without_quantizers(model).variables)
    values = _values(entries, tensors)
    # What a quantizer stores has a name of its own in the file, as it has in an NNX model.
    for layer_path, layer in quantized_layers(model).items():
        for key in flat:
            if key[0] in (STATE, LEARNED) and key[1:-1] == keys_of(layer.path):
                names[_in_layer(layer_path, f"promote_dtype.{key[-1]}")] = key
    for name in names:
        scalar = name in values and values[name].ndim == 0
        if scalar and name.endswith((_BUDGET, "promote_dtype.activation_scale")):
            values[name] = values[name].reshape(unboxed(flat[names[name]]).shape)
    wanted = {name: unboxed(flat[key]) for name, key in names.items()}
    check_fit(path, _with_budgets(wanted, values), values)
    found = {key: values[name].astype(unboxed(flat[key]).dtype) for name, key in names.items()}
    return quantized.bind(hooks.replace_variables(model.variables, found))


def _load_nnx(
    model: nnx.Module,
    path: Path,
    header: Mapping[str, Any],
    policy: Policy,
    tensors: dict[str, jax.Array],
) -> nnx.Module:
    entries, paths = header["layers"], kernel_paths(model)
    unknown = [layer for layer in entries if layer not in paths]
    if unknown:
        raise ValueError(
            f"{path} (of a {header.get('model')}) does not fit {type(model).__name__}: "
            + "".join(listing("no such layers", unknown))
            + f"; the model has {', '.join(paths[:LISTED])} …"
        )
    loaded = nnx.eval_shape(lambda float_model: quantize_nnx(float_model, policy), model)
    random = {n: v for n, v in variables(model) if isinstance(v, nnx.RngState)}
    values = _values(entries, tensors)
    wanted = {n: v for n, v in variables(loaded) if not isinstance(v, nnx.RngState)}
    shapes = {n: v.get_value() for n, v in wanted.items()}
    check_fit(path, _with_budgets(shapes, values), values)
    for name, variable in variables(loaded):
        if name in wanted:
            dtype = variable.get_value().dtype
            variable.set_value(values[name].astype(dtype))
        else:
            variable.set_value(random[name].get_value())
    constants = [
        (path, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if not isinstance(leaf, nnx.Variable)
    ]
    nnx.update(loaded, nnx.from_flat_state(constants))
    return loaded


def load_integers(path: str | Path) -> dict[str, np.ndarray]:
    """Integer kernels of a file of `save_packed` by layer path, int32, without the model's code.

    Raises:
      ValueError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    tensors, metadata = read(path)
    entries, kernels = _header(path, metadata)["layers"], {}
    for layer, entry in entries.items():
        try:
            kernels[layer] = _integers(entry["kernel"], entry, tensors)
        except _DAMAGE as error:
            raise ValueError(f"the file is damaged at layer {layer!r}: {error}") from error
    return kernels


# --- Sizes ----------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Bytes of the same values in three forms."""

    float32: int
    int8: int  # kernels as integers of their rule's width, and their scales
    packed: int  # as `save_packed` writes them


@dataclasses.dataclass(frozen=True)
class PackedSizes:
    """Bytes of a model as `save_packed` writes it, and of the same model in float32 and int8."""

    layers: Mapping[str, Size]  # of quantized layers: kernel and scales
    rest: int  # everything else, which is the same in all forms

    @property
    def total(self) -> Size:
        """The whole model's bytes, without a file's header."""
        return Size(*(sum(sizes) + self.rest for sizes in zip(*self.layers.values(), strict=True)))


def packed_sizes(model: Any) -> PackedSizes:
    """Memory size of an STP model as packed terms, in float32 and in int8.

    Raises:
      ValueError: the model has no quantized layer.
    """
    groups, sizes = group_counts(model), {}
    for path, quantized in quantized_layers(model).items():
        rule, kernel = quantized.rule, quantized.kernel
        budgets = np.asarray(quantized.flat_budget).reshape(-1)
        scales = quantized.shared_scale.nbytes + 4 * rule.stores_input_scale
        integers = kernel.size * _integer_type(rule).itemsize
        slots = groups[path] // len(budgets) * int(_slot_bits(rule, budgets).sum())
        stream = -(-slots // 8) if _is_stream(rule, budgets) else integers
        sizes[path] = Size(4 * kernel.size, integers + scales, stream + scales)
    rest = sum(int(value.nbytes) for value in _float_values(model).values())
    return PackedSizes(sizes, rest)
