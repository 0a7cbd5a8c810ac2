"""The policy of each model: which layers get term budgets, and which keep every term of int8.

What is common to all: biases, normalisation and products of two activations (attention) hold no
weights to prune and stay float. The layer that makes the logits keeps all its terms, since its
errors reach the decision unfiltered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from flax import nnx

from stp_jax.models.efficientnet import EfficientNetLite
from stp_jax.models.lstm import LSTMLanguageModel
from stp_jax.models.mlp import MLP
from stp_jax.models.mobilenet import MobileNetV2
from stp_jax.models.resnet import CifarResNet, ResNet
from stp_jax.models.vgg import VGG
from stp_jax.models.vit import VisionTransformer
from stp_jax.quant.nnx import kernel_paths
from stp_jax.quant.policy import Policy, Rule
from stp_jax.terms import Encoding, Method


@dataclasses.dataclass(frozen=True)
class _AllTerms:
    """The layers of a model that keep every term: patterns of paths, and the last of a list."""

    patterns: tuple[str, ...] = ()
    last_of: str | None = None  # a list whose length depends on the model's options

    def pattern(self, paths: Iterable[str]) -> str:
        """One regular expression for them all."""
        if self.last_of is None:
            return "|".join(self.patterns)
        numbered = re.compile(rf"{self.last_of}\.(\d+)")
        last = max(int(found[1]) for found in map(numbered.fullmatch, paths) if found)
        return "|".join([*self.patterns, rf"{self.last_of}\.{last}"])


# Shares of multiply-accumulates are `hwmodel.trace`'s at 224×224 and 1000 classes.
_ALL_TERMS: dict[type[nnx.Module], _AllTerms] = {
    # The first convolution sees three channels, so that groups of eight would be ragged at every
    # window position, and everything after it sees its errors; 6.5 % of ResNet-18.
    ResNet: _AllTerms(("conv1", "fc")),
    CifarResNet: _AllTerms(("conv1", "linear")),
    # As above, 0.6 %. The hidden dense layers of the published head, with 86 % of the
    # weights, get budgets; only the last is spared.
    VGG: _AllTerms((r"features\.0",), last_of="classifier"),
    # As above, and the depthwise convolutions: a filter of 3×3 or 5×5 has no other weight to make
    # up for one that is rounded, and all of them are 6.9 % of MobileNetV2, 9.0 % of Lite0.
    MobileNetV2: _AllTerms(
        (
            r"features\.0\.0",
            r"features\.1\.conv\.0\.0",  # the block without expansion
            r"features\.\d+\.conv\.1\.0",
            r"classifier\.1",
        )
    ),
    EfficientNetLite: _AllTerms(("conv_stem", r"blocks\..*\.conv_dw", "classifier")),
    # The patch embedding is the first convolution (1.3 %). Query, key and value projections get
    # budgets like the rest: they are 23 %, and as wide as the feed-forward layers' inputs.
    VisionTransformer: _AllTerms((r"patch_embed\.proj", "head")),
    # The first layer sees whole groups and holds a large share of the weights: it gets a budget.
    MLP: _AllTerms(last_of="layers"),
    # Gates get budgets, input and recurrent alike: sigmoid and tanh bound what their errors do. The
    # embedding is read, not multiplied, and stays float (`Rule.embeddings`).
    LSTMLanguageModel: _AllTerms(("decoder",)),
}


def all_terms_layers(model: nnx.Module) -> str:
    """The regular expression of the layers that keep every term in `default_policy`.

    Args:
      model: a float model of `stp_jax.models`, which may be abstract.

    Raises:
      ValueError: the model is of another class.
    """
    for kind, layers in _ALL_TERMS.items():
        if isinstance(model, kind):
            return layers.pattern(kernel_paths(model))
    known = ", ".join(kind.__name__ for kind in _ALL_TERMS)
    raise ValueError(
        f"there is no default policy for {type(model).__name__}, only for {known}; write a "
        "stp_jax.Policy of rules for its layers"
    )


def default_policy(
    model: nnx.Module,
    *,
    budget: int,
    group_size: int = 8,
    encoding: Encoding = "naf",
    method: Method = "optimal",
    activation_bits: int = 8,
    all_terms: str | None = None,
) -> Policy:
    """Group budgets for a model of `stp_jax.models`, except where all terms had better stay.

    Args:
      model: the float model, which may be abstract.
      budget: terms per group of the layers that get one.
      group_size: weights that share a budget.
      encoding: how terms are counted.
      method: how groups are projected.
      activation_bits: width of the integer activations, whose scales are learned.
      all_terms: regular expression of the layers that keep every term, in place of the model's own.

    Returns:
      Two rules: ``all_terms`` layers in int8, every other one with the budget.

    Raises:
      ValueError: an argument is out of range, or the model's class has no policy of its own and
        ``all_terms`` is not given.

    >>> from flax import nnx
    >>> from stp_jax import models
    >>> model = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4, hidden=(8,))
    >>> [(rule.path, rule.budget) for rule in models.default_policy(model, budget=6).rules]
    [('layers\\\\.2', None), ('.*', 6)]
    """

    def rule(path: str, budget: int | None) -> Rule:
        return Rule(
            path=path,
            budget=budget,
            group_size=group_size,
            encoding=encoding,
            method=method,
            activation_bits=activation_bits,
        )

    spared = all_terms_layers(model) if all_terms is None else all_terms
    return Policy([rule(spared, None), rule(".*", budget)])
