"""`quantize`: one line from a Flax model and a policy to an STP model."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from flax import linen as nn
from flax import nnx

from stp_jax.quant.linen import QuantizedModule, quantize_linen
from stp_jax.quant.nnx import quantize_nnx
from stp_jax.quant.policy import Policy

Model = TypeVar("Model", bound=nnx.Module)


@overload
def quantize(model: Model, policy: Policy) -> Model: ...


@overload
def quantize(model: nn.Module, policy: Policy) -> QuantizedModule: ...


def quantize(model: Any, policy: Policy) -> Any:
    """Turns a Flax model into an STP model: weights of few terms, integer activations.

    Args:
      model: an NNX or a Linen module. It stays as it is.
      policy: which layers, and how (see `Policy` and `Rule`).

    Returns:
      For NNX, a copy with the same call, the same parameters at the same paths, and a quantizer in
      each layer that the policy names. Call `calibrate` on it before its activations are
      quantized. For Linen, a `QuantizedModule`, which is initialised and applied as the module is,
      with the same ``params``; with its variables (`QuantizedModule.bind`) the functions of
      `stp_jax` take it.

    Raises:
      UnmatchedRuleError: a rule decides no layer; the message lists near misses. Linen layers are
        known when the model is initialised, so it is raised there.
      ValueError: a layer that a rule names has no reduction axis to group along or lies in a
        WeightNorm or SpectralNorm, or the model is quantized already.
      TypeError: the model is no Flax module, or the policy no Policy.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"the policy must be a Policy([Rule(...), …]), got {policy!r}")
    if isinstance(model, nnx.Module):
        return quantize_nnx(model, policy)
    if isinstance(model, nn.Module):
        return quantize_linen(model, policy)
    raise TypeError(f"quantize takes a Flax NNX or Linen module, got {type(model).__name__}")
