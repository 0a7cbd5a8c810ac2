"""The context of a run: data, devices, model and policy, checked before any work."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import stp_jax
from experiments.config import Config, ConfigError
from experiments.runtime import sharding
from stp_jax import data, export, hooks, hwmodel, models
from stp_jax.quant.reconstruction import check_reconstruction

_CALIBRATION_SEED = 0  # not the run's: runs that differ in their seed calibrate alike


# The streams of the stages that runs have always had; others follow from their names.
_STREAMS = {"float": 0, "guided": 1, "retrained": 2, "budgeted": 3, "batch_norm": 8}


def data_seed(seed: int, stage: str) -> int:
    """The seed of a stage's order of examples, in [0, 2³²).

    >>> data_seed(2, "retrained")
    34
    """
    if stage in _STREAMS:
        return (seed * 16 + _STREAMS[stage]) % 2**32
    return zlib.crc32(f"{seed}/{stage}".encode())


@dataclasses.dataclass(frozen=True)
class Context:
    """Data, devices and configuration of a run."""

    config: Config
    workdir: Path
    dataset: data.TrainingData
    console: Console
    mesh: jax.sharding.Mesh

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in a pass over the training examples."""
        return len(self.dataset.train) // self.config.batch_size

    def to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Splits a batch over the devices along its first axis."""
        layout = sharding.split_batch(self.mesh)
        return {
            key: jax.make_array_from_process_local_data(layout, np.asarray(value))
            for key, value in batch.items()
        }

    def train_iterator(self, stage: str) -> Any:
        """Batches for a stage, by its name; each stage draws its own order."""
        c = self.config
        return self.dataset.train_batches(
            batch_size=c.batch_size,
            seed=data_seed(c.seed, stage),
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def calibration_batches(self) -> list[dict[str, jax.Array]]:
        """Training examples as evaluation sees them, drawn at random; the same in every run."""
        c = self.config
        number = min(c.calibration_batches * c.batch_size, len(self.dataset.train))
        # Not the first ones, which are of one class where examples come in the order of classes.
        drawn = np.random.default_rng(_CALIBRATION_SEED).permutation(len(self.dataset.train))
        batches = self.dataset.eval_batches(
            batch_size=c.batch_size,
            split="train",
            indices=drawn[:number],
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )
        return [self.to_devices(batch) for batch in batches]


# Data other than images, by the value of the key ``data``.
DATA: dict[str, Callable[[Config], data.TrainingData]] = {
    data.TEXT: lambda c: data.load_text(window=c.window, validation=c.validation),
}


def load_data(config: Config) -> data.TrainingData:
    """The data of a configuration: an entry of `DATA`, or images (`stp_jax.data.load`).

    Raises:
      ValueError: the data are not there; the message says how to get them.
    """
    if config.data in DATA:
        return DATA[config.data](config)
    dataset = data.load(
        config.data,
        data_dir=config.data_dir,
        on_corrupt=config.on_corrupt,
        validation=config.validation,
    )
    return data.ImageData(dataset=dataset, augment=config.augment, image_size=config.image_size)


def make_context(
    config: Config,
    workdir: Path,
    console: Console,
    *,
    dataset: data.TrainingData | None = None,
) -> Context:
    """Loads the data, unless they are given, and lays out the devices.

    Raises:
      ConfigError: the batch sizes do not divide over the devices.
      ValueError: the data are not there; the message says how to get them.
    """
    devices = jax.device_count()
    for key in ("batch_size", "eval_batch_size"):
        if getattr(config, key) % devices:
            raise ConfigError(f"{key} must be a multiple of the {devices} devices")
    if dataset is None:
        dataset = load_data(config)
    if config.batch_size > len(dataset.train):
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the {len(dataset.train)} training "
            "examples"
        )
    return Context(config, workdir, dataset, console, sharding.make_mesh())


def make_model(context: Context) -> nnx.Module:
    """The float model of a run; see `make_float_model`."""
    return make_float_model(context.config, context.dataset)


def make_float_model(config: Config, dataset: data.TrainingData) -> nnx.Module:
    """The float model that a configuration names, from random or published weights.

    Raises:
      ConfigError: an option is out of the model's range, or the weights do not fit it.
    """
    known = models.model_options(config.model)
    options = {key: v for key, v in dataset.model_options().items() if key in known}
    options |= {key: getattr(config, key) for key in ("stem", "width") if getattr(config, key)}
    options |= config.model_options
    if config.dtype != "float32":
        options["dtype"] = jnp.dtype(config.dtype)
    try:
        model = models.create(
            config.model,
            num_classes=dataset.num_classes,
            rngs=nnx.Rngs(config.seed),
            **options,
        )
        if config.init_from is not None:
            weights = Path(config.init_from).expanduser()
            load = export.load_variables if export.is_variables(weights) else models.load_torch
            load(model, weights)
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from error
    return model


def check_model(context: Context) -> None:
    """Raises ConfigError if model, weights, data or policy do not fit together, before any work."""
    config = context.config
    if config.init_from is None:
        abstract = nnx.eval_shape(lambda: make_model(context))
    else:
        abstract = make_model(context)  # published weights are small, and must be read
    example = context.dataset.example_input()
    try:
        nnx.eval_shape(lambda model, x: model(x), abstract, example)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model={config.model} does not take data={config.data}, {example.dtype} inputs of "
            f"shape {example.shape[1:]}: {reason}"
        ) from error
    policy, layers = make_policy(config, abstract), stp_jax.kernel_paths(abstract)
    try:
        policy.check(layers)
    except ValueError as error:
        raise ConfigError(f"int8_layers={config.int8_layers}: {error}") from error
    if config.fit == "reconstruct":
        _check_reconstruction(context, policy)
    if config.embeddings:
        _check_embeddings(config, abstract, example)
    if config.budgets is not None:
        found: dict[str, int] = {}
        nnx.eval_shape(lambda m: found.update(filters(stp_jax.quantize(m, policy))), abstract)
        read_budgets(config, found)


def _check_reconstruction(context: Context, policy: stp_jax.Policy) -> None:
    """Raises ConfigError for a model whose layers `stp_jax.reconstruct` cannot fit."""
    model = make_model(context)
    model.eval()
    example = context.dataset.example_input()
    try:
        check_reconstruction(
            stp_jax.quantize(model, policy), jnp.zeros(example.shape, example.dtype)
        )
    except ValueError as error:
        raise ConfigError(f"fit=reconstruct: {error}") from error


def _check_embeddings(config: Config, model: nnx.Module, example: jax.ShapeDtypeStruct) -> None:
    """Raises ConfigError unless every embedding table is also a layer."""
    tables = [path for path, layer in hooks.kernel_layers(model).items() if layer.is_table]
    layers = hwmodel.trace(model, example).names
    unused = [path for path in tables if path not in layers]
    if unused or not tables:
        reason = f"{unused[0]} is read by index only" if unused else "it has none"
        raise ConfigError(
            f"embeddings=true needs a model whose embedding is its last layer, {config.model} is "
            f"none: {reason}"
        )


def make_policy(config: Config, model: nnx.Module) -> stp_jax.Policy:
    """Int8 in the layers that the model exempts, or that are named; group budgets elsewhere."""
    return stp_jax.default_policy(
        model,
        budget=config.max_budget,
        group_size=config.group_size,
        encoding=config.encoding,
        method=config.method,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        power_of_two_scales=config.integer_network,
        embeddings=config.embeddings,
        exempt=config.int8_layers,
    )


def filters(model: nnx.Module) -> dict[str, int]:
    """The number of filters of each layer with a budget rule."""
    layers = stp_jax.quantized_layers(model)
    return {path: la.filter_count for path, la in layers.items() if la.rule.budget is not None}


def read_budgets(config: Config, layers: Mapping[str, int]) -> dict[str, Any]:
    """Budgets by hand, from the JSON file that the configuration names.

    Args:
      config: names the file, which gives terms per group by layer: a number, or a list by filter.
      layers: path → number of filters.

    Raises:
      ConfigError: it does not fit the layers, or a budget is out of its range.
    """
    assert config.budgets is not None
    try:
        values = json.loads(Path(config.budgets).expanduser().read_text())
    except ValueError as error:
        raise ConfigError(f"budgets={config.budgets} is not JSON: {error}") from None
    if not isinstance(values, dict) or set(values) != set(layers):
        raise ConfigError(
            f"budgets={config.budgets} must give terms per group for these layers: "
            + ", ".join(layers)
        )
    for path, budget in values.items():
        each = budget if isinstance(budget, list) else [budget] * layers[path]
        good = [type(k) is int and 0 <= k <= config.max_budget for k in each]
        if not all(good) or len(good) != layers[path]:
            raise ConfigError(
                f"budgets={config.budgets}: {path} must have a whole number of terms from 0 to "
                f"{config.max_budget}, or a list of them for its {layers[path]} filters, got "
                f"{budget!r}"
            )
    return values
