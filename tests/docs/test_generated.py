"""What the pages generate from the code: published numbers, and nothing left out."""

import dataclasses
import html
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

import stp_jax
from experiments import configs
from experiments.config import Config, config_sections
from experiments.run import main
from stp_jax import hwmodel

DOCS = Path(__file__).parents[2] / "docs"


def test_encodings_have_their_published_costs(hooks):
    costs = hooks.encoding_costs()
    means = {name: cost["uint8"] for name, cost in costs.items()}
    assert means == {"binary": 4.0, "booth4": 3.5, "naf": 3.109375, "hese": 3.25}
    assert {name: cost["most"] for name, cost in costs.items()} == {
        "binary": 7,
        "booth4": 4,
        "naf": 4,
        "hese": 5,
    }
    # Synthesis to the Nangate 45 nm library, µm².
    assert (costs["naf"]["area"], costs["booth4"]["area"]) == (29.8, 20.5)


def test_gaussian_weights_are_a_distribution_with_their_variance(hooks):
    p, values = hooks.gaussian_weights(20.0), np.arange(-127, 128)
    assert p.sum() == pytest.approx(1.0)
    assert p @ values == pytest.approx(0.0, abs=1e-9)
    # Rounding adds the variance of a uniform step, 1/12; nothing is clipped at six deviations.
    assert p @ values**2 == pytest.approx(20.0**2 + 1 / 12, rel=1e-6)


def test_what_the_encodings_page_says_of_break_even(hooks):
    pj = hwmodel.HOROWITZ_45NM.energy_pj
    even = (pj["int8_multiply"] + pj["int32_add"]) / (pj["int8_shift"] + pj["int32_add"])
    costs = hooks.encoding_costs()
    assert all(cost["int8"] > even for cost in costs.values())
    assert {n for n, cost in costs.items() if cost["gaussian"] < even} == {"naf", "hese"}
    assert all(cost["gaussian"] > 0.9 * even for cost in costs.values())


def test_every_configuration_key_is_listed_once():
    sections = config_sections(Config)
    listed = [key.name for keys in sections.values() for key in keys]
    assert listed == [field.name for field in dataclasses.fields(Config)]
    assert all(sections)  # each under a heading
    remarks = {key.name: key.remark for keys in sections.values() for key in keys}
    assert "None" in remarks["budget"] and "\n" not in "".join(remarks.values())


def test_every_key_of_the_other_experiments_is_listed(hooks):
    kinds = {name: type(configs.load(name).CONFIG) for name in configs.names()}
    others = {name: kind for name, kind in kinds.items() if kind is not Config}
    sections = re.split(r"^### `(\w+)`$", hooks.other_configs(), flags=re.MULTILINE)[1:]
    assert sections[::2] == sorted(others)
    for name, keys in zip(sections[::2], sections[1::2], strict=True):
        listed = re.findall(r"^\| `(\w+)`", keys, re.MULTILINE)
        assert listed == [field.name for field in dataclasses.fields(others[name])]


def test_every_mark_generates_something(hooks):
    for page in DOCS.rglob("*.md"):
        generated = hooks.generate(page.read_text())
        assert "generate:" not in generated
        assert not re.search(r"^(\| ---)+ \|\n(?!\|)", generated, re.MULTILINE), page  # no rows


def test_every_equation_becomes_mathml(hooks):
    pytest.importorskip("latex2mathml")
    for page in DOCS.glob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for written in re.findall(r"\\\(.+?\\\)|\\\[.+?\\\]", text, re.DOTALL):
            marked = f'<span class="arithmatex">{html.escape(written)}</span>'
            tree = ElementTree.fromstring(hooks.equations(marked))
            assert tree.tag.endswith("math")
            # An unknown command stays as it is written.
            assert "\\" not in "".join(tree.itertext()), written


def packages():
    """Packages of stp_jax that offer names, by their ``__init__``."""
    found = ["stp_jax"]
    for module in pkgutil.walk_packages(stp_jax.__path__, "stp_jax."):
        if module.ispkg:
            source = Path(importlib.import_module(module.name).__file__).read_text()
            found += [module.name] if "import" in source else []
    return found


@pytest.mark.parametrize("package", packages())
def test_every_public_name_has_a_reference_entry(hooks, package):
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert f"generate: api {package} -->" in pages
    module = importlib.import_module(package)
    public = {
        name
        for name in dir(module)
        if not name.startswith("_")
        and not inspect.ismodule(getattr(module, name))
        and name != "annotations"
    }
    assert set(hooks.public_names(package)) == public


def test_the_work_folder_holds_what_the_page_says(tmp_path):
    page = (DOCS / "experiments.md").read_text()
    _, table, _ = re.split(r"## The work folder|\*\*Resume", page, maxsplit=2)
    names = re.findall(r"^\| `([\w.]+)", table, re.MULTILINE)
    small = ["model_options.hidden=8", "batch_size=1024", "eval_batch_size=512"]
    short = ["float_epochs=1", "guided_epochs=0", "retrain_epochs=0", "calibration_batches=1"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        workdir = tmp_path / "run"
        status = main(["--exp=stp_mlp", f"--workdir={workdir}", "--set", *small, *short])
    assert status == 0
    assert sorted(names) == sorted(path.name for path in workdir.iterdir())


def test_the_language_model_page_says_what_was_measured(hooks):
    rows = json.loads((DOCS / "results" / "lm_perplexity.json").read_text())["rows"]
    shown = hooks.perplexities()
    assert all(f"| {name} |" in shown for name in rows)
    left = {name: row["divergence"] for name, row in rows.items()}
    ours, int4, gptq = left["1 reconstructed"], left["int4, reconstructed"], left["Qwix GPTQ int4"]
    shares = [
        left[f"{t:g} reconstructed"] / left[f"{t:g} term revealing"]
        for t in (2.0, 1.5, 1.0, 0.75, 0.5)
    ]
    page = (DOCS / "language_models.md").read_text()
    for said in (
        f"diverge less than int4 by GPTQ ({ours:.3f} and {gptq:.3f})",
        f"less than both ({int4:.3f})",
        f"{min(shares):.2f} to {max(shares):.2f} of term revealing",
        f"{rows['1 reconstructed']['bits_per_weight']:.2f} bits a weight",
    ):
        assert said in page
    assert f"weights {int4 / gptq:.2f} of that by GPTQ" in page
    assert left["0.5 reconstructed"] > 10 * gptq
