"""The configuration of a run: one flat, typed, frozen record, checked before any work starts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from stp_jax.cost import Resource
from stp_jax.data import AUGMENTATIONS
from stp_jax.models import MODELS, model_options
from stp_jax.terms import ENCODINGS, Encoding, Method, max_budget

# The method as a whole; see `experiments.stages`.
STAGE_NAMES = (
    "float",
    "int8",
    "allocated",
    "guided",
    "projected",
    "budgeted",
    "retrained",
    "integer",
)


class ConfigError(ValueError):
    """A key or a value of the configuration is wrong; the message names it and what is right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run's result."""

    # Data.
    data: str = "digits"  # "digits", "python_docs" (text), "folder", or a TFDS image data set
    data_dir: str | None = None  # where the folder or TFDS's prepared data lie
    on_corrupt: Literal["error", "skip"] = "error"  # unreadable images in a folder
    validation: float = 0.1  # fraction held out of training, by class; choices are made on it
    augment: str = "none"  # augmentation of training images
    image_size: int | None = None  # side in pixels; None keeps the data set's
    window: int = 64  # context of a language model, in characters

    # Model.
    model: str = "resnet18"  # a network's name, as docs/experiments.md lists them
    stem: Literal["imagenet", "small"] | None = None  # of networks that have one
    width: int | None = None  # channels of the first stage; None is the published width
    # Other arguments of the model's constructor, as --set model_options.depth=4.
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"  # to compute in; parameters stay float32
    init_from: str | None = None  # PyTorch weights, or another run's float.safetensors

    # Training.
    seed: int = 0
    stages: tuple[str, ...] = STAGE_NAMES  # of the run, in this order (`experiments.stages`)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 128
    eval_batch_size: int = 256

    # Schedule. Epochs may be fractions; 0 leaves a stage's training out.
    float_epochs: float = 10.0
    guided_epochs: float = 0.0  # of guidance, which has not paid yet (docs/comparisons.md)
    budgeted_epochs: float = 0.0  # of training weights and budgets, with energy in the loss
    retrain_epochs: float = 8.0
    float_lr: float = 0.1  # peak; each stage warms up linearly and falls as a cosine
    guided_lr: float = 0.01
    retrain_lr: float = 0.02
    warmup: float = 0.1  # fraction of a stage

    # Regularization and distillation.
    momentum: float = 0.9  # Nesterov; of sgd only
    weight_decay: float = 5e-4  # on kernels only
    label_smoothing: float = 0.0
    distill: float = 0.5  # weight of the float model's soft labels in the retraining loss
    temperature: float = 4.0  # of the soft labels

    # Budgets.
    # allocated budgets take as much of allocate_for as this many terms in every weight would
    terms_per_weight: float = 0.75
    allocate_for: Resource = "energy"  # the resource that is distributed (`stp_jax.term_costs`)
    budgets_by: Literal["layer", "filter"] = "filter"  # what has a budget of its own
    budget_step: int = 1  # allocated budgets are multiples of it: PEs' lanes
    # how errors weigh: outputs, by the measured effect of each layer's error on the model's outputs
    # (no labels); none, all alike; gradients, by the squared gradient of each weight
    error_weighting: Literal["outputs", "none", "gradients"] = "outputs"
    budget: int | None = None  # terms per group, the same in every layer; None allocates
    budgets: str | None = None  # JSON file {layer: terms per group, or a list by filter}, by hand
    int8_layers: str | None = None  # paths that keep all terms; None is the model's own choice
    budget_lr: float = 0.05  # of trained budgets: about the largest change in a step, in terms
    energy_weight: float = 100.0  # of trained budgets: of the squared relative excess of energy

    # Projection.
    group_size: int = 8  # weights that share a budget
    encoding: Encoding = "naf"
    method: Method = "optimal"
    weight_bits: int = 8  # of the layers with budgets
    scale_slack: float = 0.0  # share of error given for scales with room to grow
    activation_bits: int = 8
    embeddings: bool = False  # budgets also for embedding tables that are the last layer (tied)
    guidance: float = 0.05  # fraction of the way to few-term values per step, at its peak
    # At the projection, before any retraining, weights are fitted to the outputs on the calibration
    # examples: by stp_jax.compensate within each layer, or by stp_jax.reconstruct.
    fit: Literal["none", "compensate", "reconstruct"] = "none"
    bn_batches: int = 30  # to re-estimate BatchNorm statistics after each stage
    calibration_batches: int = 4  # training batches for input scales, budgets and fit
    fold_batch_norm: bool = False  # into the layers before it, once the float model is trained
    # Scales are powers of two, and the last stage runs in integers from input to logits.
    integer_network: bool = False

    # Evaluation.
    check_integers: bool = True  # evaluate the retrained model in integers as well
    test: bool = True  # read the test examples, once, after the last stage
    measured: tuple[str, ...] = ()  # stages whose accuracy is measured; none named: all

    # Accelerator.
    rows: int = 32  # of the array's PEs
    cols: int = 32
    activation_sram: int = 0  # bytes of a buffer for outputs until their last reader; 0: none

    # Devices: a batch is split over all of them.
    sharding: Literal["data", "fsdp"] = "data"  # fsdp splits parameters and optimizer as well

    # Bookkeeping; without influence on the result.
    checkpoint_every: int = 50  # steps
    log_every: int = 5  # steps

    # Keys that a resumed run may change: they do not touch its result, but for rounding.
    BOOKKEEPING: ClassVar = (
        "checkpoint_every",
        "log_every",
        "eval_batch_size",
        "data_dir",
        "sharding",
        "test",
    )
    # What runs did before a key was there, where that is not its default.
    BEFORE: ClassVar = {"validation": 0.0}

    def __post_init__(self) -> None:  # noqa: D105
        _check(self)

    @property
    def max_budget(self) -> int:
        """Terms at which a group loses nothing."""
        return max_budget(self.group_size, self.encoding, self.weight_bits)


def _check(c: Config) -> None:
    def need(ok: bool, key: str, what: str) -> None:
        if not ok:
            raise ConfigError(f"{key} must be {what}, got {getattr(c, key)!r}")

    check_choices(c)
    need(c.model in MODELS, "model", f"one of {', '.join(MODELS)}")
    need(c.augment in AUGMENTATIONS, "augment", f"one of {', '.join(AUGMENTATIONS)}")
    need(c.image_size is None or c.image_size >= 1, "image_size", "1 or more")
    need(c.width is None or c.width >= 1, "width", "1 or more")
    need(c.window >= 1, "window", "1 or more")
    _check_model_options(c)
    need(0 <= c.seed < 2**32, "seed", "in [0, 2**32)")
    for key in ("batch_size", "eval_batch_size", "group_size", "rows", "cols"):
        need(getattr(c, key) >= 1, key, "1 or more")
    for key in ("checkpoint_every", "log_every", "calibration_batches"):
        need(getattr(c, key) >= 1, key, "1 or more")
    for key in ("float_epochs", "guided_epochs", "budgeted_epochs", "retrain_epochs"):
        need(getattr(c, key) >= 0, key, "0 or more")
    for key in ("weight_decay", "bn_batches", "energy_weight", "scale_slack"):
        need(getattr(c, key) >= 0, key, "0 or more")
    need(0 <= c.activation_sram < 2**53, "activation_sram", "from 0 to below 2**53")
    for key in ("float_lr", "guided_lr", "retrain_lr", "budget_lr", "temperature"):
        need(getattr(c, key) > 0, key, "positive")
    absent = [name for name in c.measured if name not in c.stages]
    need(not absent, "measured", f"among the stages {', '.join(c.stages)}")
    need(0 <= c.validation <= 0.5, "validation", "from 0 to 0.5")
    if not (c.validation or c.test):
        raise ConfigError("test=false needs examples to evaluate on; set validation above 0")
    for key in ("warmup", "distill", "guidance"):
        need(0 <= getattr(c, key) <= 1, key, "in [0, 1]")
    for key in ("momentum", "label_smoothing"):
        need(0 <= getattr(c, key) < 1, key, "in [0, 1)")
    for key, value in vars(c).items():
        need(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    for key in ("weight_bits", "activation_bits"):
        need(2 <= getattr(c, key) <= 8, key, "from 2 to 8")
    most = c.max_budget
    need(
        c.budget is None or 0 <= c.budget <= most,
        "budget",
        f"from 0 to {most} (groups of {c.group_size} {c.encoding} values of {c.weight_bits} bits)",
    )
    need(1 <= c.budget_step <= most, "budget_step", f"from 1 to {most}")
    least = c.budget_step / c.group_size
    need(
        least <= c.terms_per_weight <= most / c.group_size,
        "terms_per_weight",
        f"from {least:g} (the least budget of a group) to {most / c.group_size:g}",
    )
    if (
        c.budget is None
        and c.budgets is None
        and not (ENCODINGS[c.encoding].convex and c.method == "optimal")
    ):
        raise ConfigError(
            "budgets are allocated for encoding=naf and method=optimal only; set budget or budgets"
        )
    if c.budget is not None and c.budgets is not None:
        raise ConfigError("budget and budgets exclude each other; set one of them")
    if c.embeddings and (c.check_integers or c.integer_network):
        raise ConfigError(
            "embedding tables have no integer form; embeddings=true needs check_integers=false and "
            "integer_network=false"
        )
    try:
        re.compile(c.int8_layers or "")
    except re.error as error:
        raise ConfigError(f"int8_layers is no regular expression: {error}") from None
    for key in ("init_from", "budgets"):
        path = getattr(c, key)
        need(path is None or Path(path).expanduser().is_file(), key, "an existing file")
    if c.data == "folder" and c.data_dir is None:
        raise ConfigError("data=folder needs data_dir, the folder with train/CLASS/* and test/")


# Options of models that follow from the data or have a key of their own.
_OTHER_KEYS = {
    "in_channels": "it follows from the data",
    "in_features": "it follows from the data",
    "image_size": "set the key image_size",
    "stem": "set the key stem",
    "width": "set the key width",
    "dtype": "set the key dtype",
}


def _check_model_options(c: Config) -> None:
    """Raises ConfigError for an option that the model does not have."""
    known = model_options(c.model)
    for key in c.model_options:
        if key in _OTHER_KEYS:
            raise ConfigError(f"model_options.{key} cannot be set: {_OTHER_KEYS[key]}")
    chosen = [*c.model_options, *(key for key in ("stem", "width") if getattr(c, key) is not None)]
    for key in chosen:
        if key not in known:
            free = [option for option in known if option not in _OTHER_KEYS]
            also = [option for option in ("stem", "width") if option in known]
            unset = f" (unset it: {key}=none)" if key in _OTHER_KEYS else ""
            raise ConfigError(
                f"model {c.model} has no {key}{unset}; it has "
                + (", ".join([*also, *(f"model_options.{option}" for option in free)]) or "none")
            )


def check_choices(config: Any) -> None:
    """Raises ConfigError if a field of text holds none, or one that names its values another."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        named, value = choices(hints[field.name]), getattr(config, field.name)
        if hints[field.name] in (str, str | None) and not isinstance(value, hints[field.name]):
            raise ConfigError(f"{field.name} must be text, got {value!r}")
        if named and value not in named:
            raise ConfigError(
                f"{field.name} must be one of {', '.join(map(str, named))}, got {value!r}"
            )


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal type, a registry's key, or an optional one admits; () for others.

    A registry's key is ``Annotated[str, registry]``, as `stp_jax.terms.Encoding` is.
    """
    if typing.get_origin(hint) is Annotated:
        return tuple(hint.__metadata__[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        named = tuple(choice for part in typing.get_args(hint) for choice in choices(part))
        return (*named, None) if named else ()
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _parse(key: str, text: str, hint: Any) -> Any:
    """The value that the text of ``--set key=text`` stands for."""
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(_parse(key, part.strip(), kind) for part in text.split(",") if part.strip())
    parts = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if type(None) in parts and text.lower() in ("none", ""):
        return None
    for kind in parts:
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ConfigError(f"{key} must be true or false, got {text!r}")
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                raise ConfigError(f"{key} must be {what}, got {text!r}") from None
    return text


def _parse_option(model: str, key: str, text: str) -> Any:
    """The value that the text of ``--set model_options.key=text`` stands for."""
    hint = model_options(model).get(key, str)  # an unknown key is refused with the others
    name = f"model_options.{key}"
    if typing.get_origin(hint) is None:
        return _parse(name, text, hint)
    parts = [part for part in text.strip("()").split(",") if part.strip()]
    return [_parse(name, part, typing.get_args(hint)[0]) for part in parts]


AnyConfig = TypeVar("AnyConfig")


def override(config: AnyConfig, settings: Sequence[str]) -> AnyConfig:
    """The configuration, of any experiment, with ``key=value`` settings applied.

    Raises:
      ConfigError: a setting is not of that form, its key does not exist (near misses are named)
        or its value is wrong.
    """
    hints = typing.get_type_hints(type(config))
    keys = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        group, _, option = key.partition(".")
        if group == "model_options" and isinstance(config, Config):
            if not option:
                raise ConfigError("model_options are set one by one, as model_options.depth=4")
            options[option] = text
            continue
        if key not in keys:
            alike = functools.partial(difflib.get_close_matches, key, keys)
            near = alike(cutoff=0.8) or alike()
            hint = f"did you mean {', '.join(near)}?" if near else "--help lists the keys"
            raise ConfigError(f"unknown key {key!r}; {hint}")
        changes[key] = _parse(key, text, hints[key])
    if not isinstance(config, Config):
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    model = changes.get("model", config.model)
    # Another model's options are not this one's.
    kept = config.model_options if model == config.model else {}
    if options and model in MODELS:
        kept = {**kept, **{key: _parse_option(model, key, text) for key, text in options.items()}}
    changes["model_options"] = dict(kept)
    return dataclasses.replace(config, **changes)


def differences(ours: Any, theirs: Mapping[str, Any]) -> list[str]:
    """Differences in effect from a stored configuration, as ``key: theirs → ours``."""
    mine, stored = (json.loads(json.dumps(x)) for x in (dataclasses.asdict(ours), dict(theirs)))
    # A run of an older version did what a key that it did not know has as its default.
    unsaid = {**dataclasses.asdict(type(ours)()), **getattr(ours, "BEFORE", {})}
    stored = {**json.loads(json.dumps(unsaid)), **stored}
    keys = [key for key in mine if key not in getattr(ours, "BOOKKEEPING", ())]
    return [
        f"{key}: {stored.get(key)!r} → {mine[key]!r}"
        for key in keys
        if stored.get(key) != mine[key]
    ]


class Key(NamedTuple):
    """A key of a configuration, as its source describes it."""

    name: str
    type: str
    default: str
    remark: str


def config_sections(config: type) -> dict[str, list[Key]]:
    """A configuration's keys under the headings, and with the remarks, of its source.

    A comment that opens a paragraph of fields is a heading; one behind a field, or in lines of its
    own above it, is a remark.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    sections: dict[str, list[Key]] = {}
    heading, above, opens = "", [], False
    for line in inspect.getsource(config).splitlines():
        text = line.strip()
        name = text.partition(":")[0]
        if text.startswith("#"):
            if opens:
                heading = text.lstrip("# ")
            else:
                above.append(text.lstrip("# "))
        elif name in fields:
            field = fields[name]
            default = field.default
            if default is dataclasses.MISSING and callable(field.default_factory):
                default = field.default_factory()
            remark = text.partition("  # ")[2] or " ".join(above)
            key = Key(name, str(field.type), repr(default), remark)
            sections.setdefault(heading, []).append(key)
            above = []
        elif text.startswith("def "):
            break
        opens = not text
    return sections
