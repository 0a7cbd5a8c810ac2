"""A finished run as objects: its model, its configuration and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

import stp_jax
from experiments.config import Config, ConfigError
from experiments.context import load_data, make_float_model
from stp_jax import export


class LoadedRun(NamedTuple):
    """A finished run, as `load_run` reads it."""

    model: nnx.Module  # the STP model that the last stage left, in evaluation mode
    config: Config
    results: dict[str, Any]  # of results.json


def load_run(workdir: str | Path) -> LoadedRun:
    """The model, the configuration and the results of a finished training run.

    Args:
      workdir: the run's folder.

    Raises:
      ConfigError: the folder holds no run, an unfinished one, or an experiment that trains nothing.
      ValueError: the model's file is damaged.
    """
    workdir = Path(workdir)
    missing = [name for name in ("config.json", "results.json") if not (workdir / name).is_file()]
    if missing:
        absent = " and no ".join(missing)
        raise ConfigError(f"{workdir} holds no finished run: there is no {absent}")
    results = json.loads((workdir / "results.json").read_text())
    stored = json.loads((workdir / "config.json").read_text())["config"]
    if not (workdir / "model.safetensors").is_file():
        raise ConfigError(f"{workdir} holds results of {results['experiment']}, but no model")
    # The float weights that the run started from are in the model's file already.
    lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
    config = Config(**{**stored, **lists, "init_from": None})
    dataset = load_data(config)
    float_model = make_float_model(config, dataset)
    if config.fold_batch_norm:
        float_model = stp_jax.fold_batch_norm(float_model, dataset.example_input())
    model = export.load_packed(float_model, workdir / "model.safetensors")
    model.eval()
    return LoadedRun(model, config, results)
