"""A finished run comes back as the model that its results speak of."""

import json

import jax
import numpy as np
import pytest

import experiments
import stp_jax
from experiments.config import ConfigError
from experiments.run import main
from stp_jax import data

SETTINGS = [
    "model_options.hidden=8",
    "float_epochs=1",
    "guided_epochs=0",
    "retrain_epochs=0.5",
    "bn_batches=2",
    "batch_size=64",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = [f"--workdir={folder / 'run'}", "--set", *SETTINGS, f"data_dir={folder / 'tfds'}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["--exp=stp_mlp", *arguments]) == 0
    return folder / "run"


def test_the_loaded_model_has_the_accuracy_and_budgets_of_the_results(workdir):
    run = experiments.load_run(workdir)
    assert run.config.model == "mlp"
    stored = run.results["budgets_by_filter"]
    held = {path: budget.tolist() for path, budget in stp_jax.budgets(run.model).items()}
    assert held == stored
    dataset = data.load("digits", data_dir=run.config.data_dir)
    (test,) = data.eval_batches(dataset, batch_size=360)
    hits = np.asarray(run.model(test["input"]).argmax(axis=-1)) == test["label"]
    assert 100 * hits.mean() == pytest.approx(run.results["top1_percent"]["retrained"])


@pytest.mark.slow  # its fixture is
def test_other_folders_are_refused(workdir, tmp_path):
    with pytest.raises(ConfigError, match=r"no finished run: there is no config\.json"):
        experiments.load_run(tmp_path)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"there is no results\.json"):
        experiments.load_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"experiment": "stp_mlp"}))
    with pytest.raises(ConfigError, match="results of stp_mlp, but no model"):
        experiments.load_run(tmp_path)


@pytest.mark.parametrize(
    ("config", "results", "message"),
    [
        ("{", "{}", r"config\.json is damaged"),
        ("{}", "[1]", r"results\.json is damaged"),
        ("{}", "{}", r"config\.json holds no configuration"),
        ('{"config": {"seeds": 3}}', "{}", r"config\.json holds no configuration.*seeds"),
        ('{"config": {"seed": "3"}}', "{}", r"config\.json holds no configuration"),
        ('{"config": {"data": 0}}', "{}", r"holds no configuration: data must be text, got 0"),
    ],
)
def test_a_damaged_folder_is_named(config, results, message, tmp_path):
    for name, text in (("config.json", config), ("results.json", results)):
        (tmp_path / name).write_text(text)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        experiments.load_run(tmp_path)
