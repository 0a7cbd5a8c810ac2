"""Policies: which layers of a model are quantized, and how. Rules match module paths by pattern."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from stp_jax.terms.activations import check_activation_terms
from stp_jax.terms.encodings import MAX_BITS, Encoding
from stp_jax.terms.projection import Method
from stp_jax.terms.quantizers import WeightFormat

WeightScale = Literal["max", "search", "learned"]
Activations = Literal["none", "dynamic", "calibrated", "learned"]


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule: the quantization of all layers whose path matches.

    Raises:
      ValueError: an attribute is out of range, or the path is no regular expression.
      TypeError: the path is no string, or the budget no integer.
    """

    path: str  # regular expression that must match the whole path, as "layer[34]\\..*"
    keep_float: bool = False  # leave the layers as they are; nothing below applies then
    budget: int | None = None  # terms per group; None keeps every term: plain integer weights
    group_size: int = 8  # weights that share the budget
    encoding: Encoding = "naf"  # how terms are counted
    method: Method = "optimal"  # how a group is projected
    bits: int = 8  # width of the integer weights
    weight_scale: WeightScale = "learned"  # per output channel: largest weight, search, LSQ
    scale_group: int | None = None  # weights along the reduction that share a scale; None: all
    power_of_two_scales: bool = False  # of weights and input; biases then lie on the sums' grid
    activations: Activations = "learned"  # the layer's input, per tensor; "none" stays float
    activation_bits: int = 8  # width of the integer activations
    activation_terms: int | None = None  # most terms of each, by encoding and method; None: all
    embeddings: bool = False  # whether embedding tables that match are quantized too

    def __post_init__(self) -> None:  # noqa: D105
        if not isinstance(self.path, str):
            raise TypeError(f"path must be a regular expression, a string, got {self.path!r}")
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path {self.path!r} is no regular expression: {error}") from error
        _check_choice("weight_scale", self.weight_scale, WeightScale)
        _check_choice("activations", self.activations, Activations)
        bits = self.activation_bits
        if not isinstance(bits, int) or not 2 <= bits <= MAX_BITS:
            raise ValueError(
                f"activation_bits must be an integer, 2 or more and at most {MAX_BITS}, got {bits}"
            )
        self._check_scale_group()
        check_activation_terms(self.activation_terms)
        if self.activation_terms is not None and self.activations == "none":
            raise ValueError("activation_terms needs integer activations, not activations='none'")
        weights = self.format  # which checks itself
        if self.budget is not None:
            if not isinstance(self.budget, int | np.integer):
                raise TypeError(
                    f"a rule's budget must be an integer or None, got {self.budget!r}; "
                    "stp_jax.set_budgets gives filters their own"
                )
            weights.check_budget(self.budget)

    def _check_scale_group(self) -> None:
        size = self.scale_group
        if size is None:
            return
        if self.power_of_two_scales:
            raise ValueError("power_of_two_scales needs one scale per filter, without scale_group")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"scale_group must be a positive integer or None, got {size!r}")
        if isinstance(self.group_size, int) and self.group_size > 0 and size % self.group_size:
            raise ValueError(
                f"scale_group {size} must be a multiple of group_size {self.group_size}, so that "
                "weights that share a budget share a scale"
            )

    @property
    def format(self) -> WeightFormat:
        """The static part of the weight quantizer."""
        return WeightFormat(
            group_size=self.group_size, encoding=self.encoding, method=self.method, bits=self.bits
        )

    @property
    def stores_input_scale(self) -> bool:
        """Whether the scale of the layer's input is a value of its own, calibrated or learned."""
        return self.activations in ("calibrated", "learned")

    def matches(self, path: str) -> bool:
        """Whether the rule matches the layer at this dotted path."""
        return re.fullmatch(self.path, path) is not None


class UnmatchedRuleError(ValueError):
    """A rule matches no layer of the model."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Rules in order; the first that matches a layer's path decides, and no match means float.

    >>> policy = Policy([Rule(path="conv1|fc"), Rule(path=".*", budget=6)])
    >>> policy.find("fc").budget is None, policy.find("layer1.0.conv1").budget
    (True, 6)
    """

    rules: Sequence[Rule]

    def __post_init__(self) -> None:  # noqa: D105
        if isinstance(self.rules, str) or not isinstance(self.rules, Iterable):
            raise TypeError(f"a policy takes a sequence of Rules, got {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"a policy takes a sequence of Rules; one of them is {rule!r}")

    def find(self, path: str) -> Rule | None:
        """The rule for the layer at the dotted path, None if it stays float."""
        rule = next((rule for rule in self.rules if rule.matches(path)), None)
        return None if rule is None or rule.keep_float else rule

    def check(self, paths: Iterable[str], *, tables: Iterable[str] = ()) -> None:
        """Raises UnmatchedRuleError if a rule decides no layer, with the nearest paths.

        Args:
          paths: dotted paths of all layers that a rule can name.
          tables: those of them that are embeddings, which only rules with ``embeddings`` quantize.
        """
        paths, tables = list(paths), set(tables)
        decided: dict[int, list[str]] = {}
        for path in paths:
            first = next((i for i, rule in enumerate(self.rules) if rule.matches(path)), -1)
            decided.setdefault(first, []).append(path)
        for i, rule in enumerate(self.rules):
            if i in decided:
                if rule.keep_float or rule.embeddings or not tables.issuperset(decided[i]):
                    continue
                why = "it matches embedding tables only; set embeddings=True to quantize them"
            elif any(rule.matches(path) for path in paths):
                why = "every layer that it matches is taken by an earlier rule"
            else:
                near = difflib.get_close_matches(rule.path, paths, n=3, cutoff=0.3) or paths[:3]
                why = f"no layer has such a path; near misses: {', '.join(near) or 'none'}"
            raise UnmatchedRuleError(f"rule {rule.path!r} decides no layer: {why}")
