"""Model cards: they state what the model holds."""

import re

import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import export, terms


@pytest.fixture(scope="module")
def model():
    layers = [nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))]
    rules = [
        stp_jax.Rule(path="layers.1", activations="none"),
        stp_jax.Rule(path=".*", budget=6, activations="dynamic", activation_bits=6),
    ]
    model = stp_jax.quantize(nnx.Sequential(*layers), stp_jax.Policy(rules))
    stp_jax.set_budgets(model, {"layers.0": np.arange(32) % 5 + 1})
    return model


def test_a_card_has_the_model_s_terms_sizes_and_budgets(model):
    card = export.model_card(model, name="Two layers", file="two.safetensors")
    counts = {k: np.asarray(terms.count(v)) for k, v in stp_jax.integer_weights(model).items()}
    mean = sum(c.sum() for c in counts.values()) / sum(c.size for c in counts.values())
    assert card.startswith("# Two layers\n") and f"with {mean:.3f} power-of-two terms" in card
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in card.splitlines()}
    first = [f"{counts[f'layers.{i}'].mean():.3f}" for i in range(2)]
    assert rows["| `layers.0`"][1:] == ["64×32", "1 to 5 by filter", "8", first[0], "int6"]
    assert rows["| `layers.1`"][1:] == ["32×8", "all", "8", first[1], "float"]
    kilobytes = [f"{size / 1e3:,.1f} kB" for size in export.packed_sizes(model).total]
    assert "| " + " | ".join(kilobytes) + " |" in card


def test_the_card_loads_its_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export.save_packed(model, "two.safetensors")
    card = export.model_card(model, name="Two layers", file="two.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    layers = [nnx.Linear(64, 32, rngs=nnx.Rngs(2)), nnx.Linear(32, 8, rngs=nnx.Rngs(3))]
    scope = {"float_model": nnx.Sequential(*layers)}
    exec(code, scope)
    for path, values in stp_jax.integer_weights(scope["model"]).items():
        np.testing.assert_array_equal(values, stp_jax.integer_weights(model)[path])


def test_sections_stand_in_their_order(model):
    sections = {"Data": "Noise.", "License": "None."}
    card = export.model_card(model, name="Two layers", sections=sections)
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == ["Model", "Size", "Loading", "Data", "License", "Layers", "Software"]
    assert "## Data\n\nNoise.\n" in card


def test_float_models_have_no_card():
    with pytest.raises(ValueError, match="quantized"):
        export.model_card(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), name="float")
