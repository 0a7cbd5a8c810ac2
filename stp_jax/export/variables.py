"""Float models as one safetensors file: every variable as it is, by its dotted path.

What training left is kept exactly, so that another run can go on from it. The packed checkpoint
(`stp_jax.export.packed`) reads and writes its tensors with the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

FORMAT = "stp_jax.variables"
VERSION = "1"
LISTED = 8  # names of each kind that an error message spells out
Model = TypeVar("Model", bound=nnx.Module)


def variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """The model's variables with their dotted paths; arrays that are none are constants of it."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable, nnx.Variable):
            yield ".".join(map(str, path)), variable


def read(path: Path) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ValueError if it is none."""
    try:
        with safe_open(path, framework="flax") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; one that exists is replaced when all is written."""
    partial = path.with_name(path.name + ".partial")
    save_file(dict(tensors), partial, dict(metadata))
    os.replace(partial, path)


def listing(title: str, names: list[str]) -> list[str]:
    """One line that counts and names, or none."""
    if not names:
        return []
    more = [f"… and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return [f"{title} ({len(names)}): " + ", ".join([*names[:LISTED], *more])]


def check_fit(path: Path, wanted: Mapping[str, Any], values: Mapping[str, jax.Array]) -> None:
    """Raises ValueError if names or shapes differ; the message lists them."""
    shared = [name for name in wanted if name in values]
    problems = [
        *listing("missing from the file", [name for name in wanted if name not in values]),
        *listing("not in the model", [name for name in values if name not in wanted]),
        *listing(
            "of another shape",
            [
                f"{name}: file {values[name].shape}, model {wanted[name].shape}"
                for name in shared
                if values[name].shape != wanted[name].shape
            ],
        ),
    ]
    if problems:
        raise ValueError("\n".join([f"{path} does not fit the model", *problems]))


def is_variables(path: str | Path) -> bool:
    """Whether this is a safetensors file of `save_variables`."""
    try:
        with safe_open(path, framework="flax") as file:
            return FORMAT in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def save_variables(model: nnx.Module, path: str | Path) -> None:
    """Writes the model's variables, random streams aside; an existing file is replaced at the end.

    Args:
      model: any NNX model whose variables are arrays.
      path: the file, conventionally ``*.safetensors``.
    """
    tensors = {n: v[...] for n, v in variables(model) if not isinstance(v, nnx.RngState)}
    write(Path(path), tensors, {FORMAT: VERSION})


def load_variables(model: Model, path: str | Path) -> Model:
    """Reads a file of `save_variables` into the model, in place; all of it or nothing.

    Args:
      model: an NNX model of the same variables, with any values.
      path: the file.

    Returns:
      The same model.

    Raises:
      ValueError: the file is missing, damaged, of another kind, or does not fit the model; the
        message names what is missing, left over or of another shape.

    >>> import tempfile
    >>> model, other = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    ...     save_variables(model, file.name)
    ...     _ = load_variables(other, file.name)
    >>> bool((model.kernel[...] == other.kernel[...]).all())
    True
    """
    path = Path(path)
    values, metadata = read(path)
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} holds no model's variables (its metadata lack {FORMAT}); PyTorch weights are "
            "read by stp_jax.models.load_torch, packed terms by stp_jax.export.load_packed"
        )
    wanted = {n: v for n, v in variables(model) if not isinstance(v, nnx.RngState)}
    check_fit(path, {n: v.get_value() for n, v in wanted.items()}, values)
    for name, variable in wanted.items():
        variable.set_value(values[name].astype(variable.get_value().dtype))
    return model
