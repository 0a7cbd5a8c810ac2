"""Models by name."""

import difflib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from flax import nnx

from stp_jax.models import decoder, efficientnet, lstm, mlp, mobilenet, resnet, vgg, vit

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet44": resnet.resnet44,
    "resnet56": resnet.resnet56,
    "vgg16_bn": vgg.vgg16_bn,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "efficientnet_lite0": efficientnet.efficientnet_lite0,
    "vit_s16": vit.vit_s16,
    "mlp": mlp.mlp,
    "lstm_lm": lstm.lstm_lm,
    "decoder_lm": decoder.decoder_lm,
}


def _check_name(name: str) -> None:
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(MODELS)}"
        raise ValueError(f"no model is called {name!r}; {hint}")


def _model_class(name: str) -> type[nnx.Module]:
    factory = MODELS[name]
    made = factory if isinstance(factory, type) else typing.get_type_hints(factory).get("return")
    if not (isinstance(made, type) and issubclass(made, nnx.Module)):
        raise ValueError(
            f"model {name!r}: annotate what it returns, since the options are that class's: "
            f"def {getattr(factory, '__name__', 'make')}(...) -> MyModel"
        )
    return made


def model_options(name: str) -> dict[str, Any]:
    """The options of a model beside `num_classes` and `rngs`, with their types.

    They are the keyword-only arguments of its class: what `MODELS` holds, or what the function
    there is annotated to return.

    Raises:
      ValueError: if the name is unknown, its function is not annotated with an NNX module, or an
        option has no type.

    >>> model_options("mlp")["in_features"]
    <class 'int'>
    """
    _check_name(name)
    build = _model_class(name).__init__
    types = typing.get_type_hints(build)
    options = [
        key
        for key, parameter in inspect.signature(build).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in ("num_classes", "rngs")
    ]
    bare = [key for key in options if key not in types]
    if bare:
        raise ValueError(f"model {name!r}: annotate the types of its options {', '.join(bare)}")
    return {key: types[key] for key in options}


def create(name: str, *, num_classes: int, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Builds a model by name, in training mode.

    Args:
      name: a key of `MODELS`.
      num_classes: outputs of the last layer (of a language model: its vocabulary), at least 1.
      rngs: random streams for the initial weights.
      **options: the model's own (`width`, `in_channels`, `dtype`, `stem` …).

    Raises:
      ValueError: if the name is unknown (naming the nearest ones), the model has no such option,
        or a count is not positive.
    """
    known = model_options(name)
    for key, value in {"num_classes": num_classes, **options}.items():
        if key not in ("num_classes", *known):
            raise ValueError(f"model {name!r} has no option {key!r}; it has {', '.join(known)}")
        if key in ("num_classes", "width", "in_channels") and not (
            isinstance(value, int) and value >= 1
        ):
            raise ValueError(f"{key} must be a positive integer, got {value!r}")
    try:
        return MODELS[name](num_classes=num_classes, rngs=rngs, **options)
    except TypeError as error:
        if "required keyword" not in str(error):
            raise
        raise ValueError(f"model {name!r}: {error}") from error
