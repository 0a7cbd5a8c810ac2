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


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file of a run, such as results.json.

    Raises:
      OSError: it cannot be read.
      ConfigError: it is no JSON, or holds no table.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no table")
    return content


def load_run(workdir: str | Path) -> LoadedRun:
    """The model, the configuration and the results of a finished training run.

    Args:
      workdir: the run's folder.

    Raises:
      ConfigError: the folder holds no run, an unfinished one, a damaged one, or an experiment that
        trains nothing.
      ValueError: the model's file is damaged.
    """
    workdir = Path(workdir)
    missing = [name for name in ("config.json", "results.json") if not (workdir / name).is_file()]
    if missing:
        absent = " and no ".join(missing)
        raise ConfigError(f"{workdir} holds no finished run: there is no {absent}")
    results = read_record(workdir / "results.json")
    stored: Any = read_record(workdir / "config.json").get("config")
    if not (workdir / "model.safetensors").is_file():
        raise ConfigError(f"{workdir} holds results of {results.get('experiment')}, but no model")
    try:
        lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
        # The float weights that the run started from are in the model's file already.
        config = Config(**{**stored, **lists, "init_from": None})
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{workdir / 'config.json'} holds no configuration: {error}") from error
    dataset = load_data(config)
    float_model = make_float_model(config, dataset)
    if config.fold_batch_norm:
        float_model = stp_jax.fold_batch_norm(float_model, dataset.example_input())
    model = export.load_packed(float_model, workdir / "model.safetensors")
    model.eval()
    return LoadedRun(model, config, results)
