"""Import of published PyTorch weights into NNX models of the same attribute names.

The models carry PyTorch's names, so one rule maps every weight: the path of a variable with its
last name changed (kernel → weight, mean → running_mean …) and its layout transposed. A model whose
weights are published under other names translates these in its method `adapt_torch`. Files from
strangers are never unpickled freely: safetensors holds no code, and .pt files are read by
`stp_jax.models.torch_files`, which knows plain tensors only.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax.models.torch_files import read_torch

Model = TypeVar("Model", bound=nnx.Module)
_Layout = Callable[[np.ndarray], np.ndarray]

# Module type → variable → (PyTorch's name, PyTorch's layout → Flax's).
_RULES: tuple[tuple[type, dict[str, tuple[str, _Layout]]], ...] = (
    (
        nnx.Conv,
        {
            "kernel": ("weight", lambda w: np.moveaxis(w, (0, 1), (-1, -2))),
            "bias": ("bias", np.asarray),
        },
    ),
    (
        nnx.Linear,
        {"kernel": ("weight", np.transpose), "bias": ("bias", np.asarray)},
    ),
    (
        nnx.BatchNorm,
        {
            "scale": ("weight", np.asarray),
            "bias": ("bias", np.asarray),
            "mean": ("running_mean", np.asarray),
            "var": ("running_var", np.asarray),
        },
    ),
    (nnx.LayerNorm, {"scale": ("weight", np.asarray), "bias": ("bias", np.asarray)}),
    (nnx.Embed, {"embedding": ("weight", np.asarray)}),
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_LISTED = 8  # names of each kind that an error message spells out


def _rule(module: Any, name: str) -> tuple[str, _Layout]:
    for kind, names in _RULES:
        if isinstance(module, kind) and name in names:
            return names[name]
    return name, np.asarray


def torch_variables(model: nnx.Module) -> dict[str, tuple[nnx.Variable, _Layout]]:
    """Returns {PyTorch name: (variable, layout)} over the model's parameters and statistics.

    `layout` maps an array in PyTorch's layout to the variable's: OIHW → HWIO for convolutions,
    (out, in) → (in, out) for dense layers.
    """
    found: dict[str, tuple[nnx.Variable, _Layout]] = {}
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            # Subclasses are other libraries' own variables, which no published file holds.
            if type(value) in (nnx.Param, nnx.BatchStat) and value.get_value() is not None:
                torch_name, layout = _rule(module, name)
                found[".".join(map(str, (*path, torch_name)))] = (value, layout)
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"there is no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(
            f"{path}: weights come as .safetensors or as PyTorch's {', '.join(_TORCH_SUFFIXES)}"
        )
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    content = read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return {name: value for name, value in content.items() if isinstance(value, np.ndarray)}


def _clean(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Strips DataParallel's 'module.'; drops BatchNorm's batch counter, which nothing uses."""
    return {
        name.removeprefix("module."): np.asarray(value)
        for name, value in weights.items()
        if not name.endswith("num_batches_tracked")
    }


def _listing(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    if not lines:
        return []
    more = [f"  … and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [f"{title} ({len(lines)}):", *(f"  {line}" for line in lines[:_LISTED]), *more]


def _near(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.8)
    return f"{name} (near: {near[0]})" if near else name


def load_torch(model: Model, weights: str | Path | Mapping[str, Any]) -> Model:
    """Loads PyTorch weights into `model`, in place; all of them or none.

    Args:
      model: an NNX model whose attributes carry PyTorch's names.
      weights: the path of a .safetensors or a .pt/.pth/.bin file (PyTorch is not needed), or a
        state dict of arrays in PyTorch's layouts. A prefix "module." is dropped.

    Returns:
      The same model, its variables cast to their own types.

    Raises:
      ValueError: if the file is missing, damaged or not plain weights; or if names are missing,
        unexpected or of another shape, or values are not finite; the message lists them. The
        model is then unchanged.
    """
    state = _clean(weights if isinstance(weights, Mapping) else _read(Path(weights)))
    adapt = getattr(model, "adapt_torch", None)
    if adapt is not None:
        state = adapt(state)
    variables = torch_variables(model)
    missing = [name for name in variables if name not in state]
    unexpected = [name for name in state if name not in variables]

    converted, wrong_shape, not_finite = {}, [], []
    for name in (name for name in variables if name in state):
        variable, layout = variables[name]
        raw = state[name]
        value = layout(raw) if raw.ndim == variable.ndim else raw
        if value.shape != variable.shape:
            wrong_shape.append(f"{name}: file {value.shape}, model {variable.shape}")
        elif not np.all(np.isfinite(value.astype(np.float64))):
            not_finite.append(name)
        else:
            converted[name] = value

    problems = [
        *_listing("missing from the weights", (_near(name, unexpected) for name in missing)),
        *_listing("not in the model", (_near(name, missing) for name in unexpected)),
        *_listing("of another shape, in the model's layout", wrong_shape),
        *_listing("holding NaN or infinity", not_finite),
    ]
    if problems:
        raise ValueError(
            "\n".join([f"the weights do not fit {type(model).__name__}; nothing loaded", *problems])
        )
    for name, value in converted.items():
        variable, _ = variables[name]
        variable.set_value(jnp.asarray(value, variable.dtype))
    return model
