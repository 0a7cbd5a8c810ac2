"""Flax's own example models, from `quantize` to a report and a packed file.

Flax's wheel leaves them out. FLAX_EXAMPLES names their folder; `.ci/run` gets it from PyPI.
"""

import os
import sys
from functools import partial

import jax
import pytest

from benchmarks import flax_examples

FOLDER = os.environ.get("FLAX_EXAMPLES")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="FLAX_EXAMPLES must name the folder of Flax's examples"
)
MODELS = {
    "imagenet": (partial(flax_examples.imagenet, filters=8), 19),
    "lm1b": (flax_examples.lm1b, 13),
    "gemma": (flax_examples.gemma, 12),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_step_runs(name, monkeypatch):
    make, layers = MODELS[name]
    monkeypatch.syspath_prepend(os.path.join(FOLDER, name))
    monkeypatch.delitem(sys.modules, "models", raising=False)  # two examples call theirs so
    # Their code promotes ranks and types.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = dict(flax_examples.steps(make))
    assert found["layers with a budget"] == layers
    assert float(found["error in int8"]) < 0.05
    assert float(found["error compensated"]) < float(found["error projected"]) < 1
    if name == "gemma":
        assert found["integers"].startswith("refused: layer 'layers.0.attn.attn_vec_einsum'")
    else:  # of logits about 1: a few activations lie between two steps
        assert float(found["integers differ by"]) < 0.02
    assert found["packed file, KiB"] > 0
