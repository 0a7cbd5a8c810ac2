"""What an import needs: the library alone, without the packages of the training extra."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Import names of the training extra's packages; flax itself brings Orbax and rich.
EXTRA = ("tensorflow_datasets", "grain", "sklearn", "PIL", "matplotlib", "tensorboardX", "filelock")

WITHOUT = f"""
import sys
for name in {EXTRA!r}:
    sys.modules[name] = None  # as if it were not installed
import jax.numpy as jnp
import stp_jax
from flax import nnx
from stp_jax import export, hwmodel, models, terms

model = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4, hidden=(4,))
policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=4)])
model = stp_jax.quantize(model, policy)
stp_jax.calibrate(model, [jnp.ones((2, 4))])
print(stp_jax.evaluate_model(model, jnp.ones((1, 4))).saving > 0)
try:
    stp_jax.data
except ImportError as error:
    print(error)
"""


def test_the_library_works_without_the_training_extra():
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "True"
    assert "pip install 'stp-jax[train]'" in done.stdout


def test_the_extra_lists_what_these_tests_hide():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = " ".join(project["optional-dependencies"]["train"]).lower().replace("-", "_")
    distribution = {"sklearn": "scikit_learn", "PIL": "pillow"}
    for name in EXTRA:
        assert distribution.get(name, name).lower() in names
    assert not any(name in " ".join(project["dependencies"]) for name in ("grain", "tensorflow"))
