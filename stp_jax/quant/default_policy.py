"""The default policy of a model: group budgets for all layers but those that it exempts.

A model names the layers that are to keep every term of int8 in its attribute ``exempt_layers``,
regular expressions of their paths. In every model, biases, normalisation and products of two
activations (attention) stay float, since they hold no weights to prune.
"""

from __future__ import annotations

from typing import Any

from stp_jax.quant.policy import Policy, Rule
from stp_jax.terms import Encoding, Method


def _exempt_pattern(model: Any) -> str:
    """One regular expression for the layers that a model exempts from pruning."""
    patterns = getattr(model, "exempt_layers", None)
    if patterns is None:
        raise ValueError(
            f"{type(model).__name__} does not say which layers are exempt from pruning: give it "
            "the attribute exempt_layers, regular expressions of their paths, or pass exempt=…, or "
            "write a stp_jax.Policy of rules"
        )
    return "|".join(patterns)


def default_policy(
    model: Any,
    *,
    budget: int,
    group_size: int = 8,
    encoding: Encoding = "naf",
    method: Method = "optimal",
    weight_bits: int = 8,
    activation_bits: int = 8,
    power_of_two_scales: bool = False,
    exempt: str | None = None,
    embeddings: bool = False,
) -> Policy:
    """Group budgets for a model's layers, except layers exempt from pruning.

    Args:
      model: a float model with the attribute ``exempt_layers``, as all of `stp_jax.models`; it may
        be abstract.
      budget: terms per group of the layers that get one.
      group_size: weights that share a budget.
      encoding: how terms are counted.
      method: how groups are projected.
      weight_bits: width of the integer weights of the layers that get a budget.
      activation_bits: width of the integer activations, whose scales are learned.
      power_of_two_scales: as in `Rule`; for `stp_jax.integer_network`.
      exempt: regular expression of the layers that keep every term, in place of the model's own.
      embeddings: whether embedding tables are quantized as well.

    Returns:
      Exempt layers, if there are any, in int8, every other one with the budget.

    Raises:
      ValueError: an argument is out of range, or the model has no ``exempt_layers`` and ``exempt``
        is not given.

    >>> import stp_jax
    >>> from flax import nnx
    >>> from stp_jax import models
    >>> model = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4, hidden=(8,))
    >>> [(rule.path, rule.budget) for rule in stp_jax.default_policy(model, budget=6).rules]
    [('layers\\\\.2', None), ('.*', 6)]
    """

    def rule(path: str, budget: int | None, bits: int) -> Rule:
        return Rule(
            path=path,
            bits=bits,
            budget=budget,
            group_size=group_size,
            encoding=encoding,
            method=method,
            activation_bits=activation_bits,
            power_of_two_scales=power_of_two_scales,
            embeddings=embeddings,
        )

    pattern = _exempt_pattern(model) if exempt is None else exempt
    exempted = [rule(pattern, None, 8)] if pattern else []
    return Policy([*exempted, rule(".*", budget, weight_bits)])
