"""Model cards: the description that travels with an exported model (Mitchell et al., FAT* 2019)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stp_jax.export.packed import packed_sizes
from stp_jax.hooks import model_name
from stp_jax.quant.calibration import mean_terms, weight_terms
from stp_jax.quant.layers import QuantizedLayer, quantized_layers

_LOADING = """\
```python
from stp_jax.export import load_packed

model = load_packed(float_model, "{file}")  # float_model: the code that the model was made from
```

`stp_jax.export.load_integers("{file}")` reads the integers without that code."""


def model_card(
    model: Any,
    *,
    name: str,
    file: str = "model.safetensors",
    sections: Mapping[str, str] | None = None,
) -> str:
    """A Markdown card of an STP model: size, use, and the terms that its layers really hold.

    A card should also state what the model cannot tell: its data, accuracy, intended use, limits
    and license. These are the caller's sections.

    Args:
      model: an STP model; a Linen one with its variables.
      name: the title.
      file: the packed file that the card goes with.
      sections: heading → Markdown, put before the table of the layers.

    Raises:
      ValueError: the model has no quantized layer.

    >>> import stp_jax
    >>> from flax import nnx
    >>> layer = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    >>> rule = stp_jax.Rule(path=".*", budget=6, activations="dynamic")
    >>> stp = stp_jax.quantize(layer, stp_jax.Policy([rule]))
    >>> print(model_card(stp, name="Example", sections={"Data": "None."}).splitlines()[0])
    # Example
    """
    sizes = packed_sizes(model).total
    layers, terms = quantized_layers(model), weight_terms(model)
    held = mean_terms(terms, layers)
    parts = {
        "Model": f"`{model_name(model)}`, {len(layers)} quantized layers with {held:.3f} "
        "power-of-two terms per weight on average.",
        "Size": table(
            ("float32", "int8", "this file"), [[f"{size / 1e3:,.1f} kB" for size in sizes]]
        ),
        "Loading": _LOADING.format(file=file),
        **(sections or {}),
        "Layers": table(
            ("layer", "kernel", "terms per group", "group", "terms per weight", "inputs"),
            (_row(quantized, terms[path]) for path, quantized in layers.items()),
        ),
        "Software": f"stp_jax {importlib.metadata.version('stp-jax')}.",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in parts.items())
    return f"# {name}\n\n{body}\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _row(quantized: QuantizedLayer, terms: np.ndarray) -> tuple[str, ...]:
    rule = quantized.rule
    budgets = np.asarray(quantized.flat_budget)
    if rule.budget is None:
        budget = "all"
    elif (budgets == budgets.flat[0]).all():
        budget = f"{budgets.flat[0]:g}"
    else:
        budget = f"{budgets.min():g} to {budgets.max():g} by filter"
    inputs = "float" if rule.activations == "none" else f"int{rule.activation_bits}"
    return (
        f"`{quantized.path}`",
        "×".join(map(str, quantized.kernel.shape)),
        budget,
        str(rule.group_size),
        f"{terms.mean():.3f}",
        inputs,
    )
