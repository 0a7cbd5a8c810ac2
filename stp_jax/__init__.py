"""Neural networks whose weights are sums of few powers of two, and their cost on an accelerator.

`quantize` turns a Flax model into an STP model. The pieces: `stp_jax.terms` (encodings, projection,
quantizers, budgets), `stp_jax.models`, `stp_jax.data`, `stp_jax.export` (packed terms, ONNX, memory
images) and `stp_jax.hwmodel` (the accelerator); they are imported when they are first used.
"""

import importlib as _importlib
import typing as _typing

from stp_jax.quant.allocation import allocate as allocate
from stp_jax.quant.allocation import allocate_by_divergence as allocate_by_divergence
from stp_jax.quant.batch_norm import fold_batch_norm as fold_batch_norm
from stp_jax.quant.bias import correct_bias as correct_bias
from stp_jax.quant.budgets import budgets as budgets
from stp_jax.quant.budgets import mean_budgets as mean_budgets
from stp_jax.quant.budgets import relax_budgets as relax_budgets
from stp_jax.quant.budgets import relaxed_budgets as relaxed_budgets
from stp_jax.quant.budgets import set_budgets as set_budgets
from stp_jax.quant.calibration import calibrate as calibrate
from stp_jax.quant.calibration import integer_weights as integer_weights
from stp_jax.quant.calibration import project_params as project_params
from stp_jax.quant.calibration import search_weight_scales as search_weight_scales
from stp_jax.quant.calibration import terms_per_weight as terms_per_weight
from stp_jax.quant.calibration import weight_terms as weight_terms
from stp_jax.quant.compensation import compensate as compensate
from stp_jax.quant.default_policy import default_policy as default_policy
from stp_jax.quant.guidance import damping as damping
from stp_jax.quant.guidance import guidance as guidance
from stp_jax.quant.integer import integer_model as integer_model
from stp_jax.quant.integer_network import integer_network as integer_network
from stp_jax.quant.integer_steps import IntegerNetwork as IntegerNetwork
from stp_jax.quant.layers import quantized_layers as quantized_layers
from stp_jax.quant.linen import BoundModel as BoundModel
from stp_jax.quant.linen import QuantizedModule as QuantizedModule
from stp_jax.quant.nnx import ActivationScale as ActivationScale
from stp_jax.quant.nnx import Budget as Budget
from stp_jax.quant.nnx import RelaxedBudget as RelaxedBudget
from stp_jax.quant.nnx import WeightScale as WeightScale
from stp_jax.quant.nnx import kernel_paths as kernel_paths
from stp_jax.quant.policy import Policy as Policy
from stp_jax.quant.policy import Rule as Rule
from stp_jax.quant.policy import UnmatchedRuleError as UnmatchedRuleError
from stp_jax.quant.quantize import quantize as quantize
from stp_jax.quant.reconstruction import reconstruct as reconstruct
from stp_jax.quant.scale_steps import relative_scale_steps as relative_scale_steps
from stp_jax.quant.sensitivity import error_curves as error_curves
from stp_jax.quant.sensitivity import group_counts as group_counts
from stp_jax.quant.sensitivity import measured_importance as measured_importance
from stp_jax.quant.sensitivity import output_divergence as output_divergence
from stp_jax.quant.sensitivity import output_divergences as output_divergences
from stp_jax.quant.sensitivity import squared_gradients as squared_gradients

if _typing.TYPE_CHECKING:
    from stp_jax import data as data
    from stp_jax import export as export
    from stp_jax import hwmodel as hwmodel
    from stp_jax import models as models
    from stp_jax import terms as terms
    from stp_jax.cost import ModelCost as ModelCost
    from stp_jax.cost import evaluate_model as evaluate_model
    from stp_jax.cost import group_pe as group_pe
    from stp_jax.cost import term_costs as term_costs

_PACKAGES = ("data", "export", "hwmodel", "models", "terms")
_COSTS = ("ModelCost", "evaluate_model", "group_pe", "term_costs")  # need the accelerator


def __getattr__(name: str) -> _typing.Any:
    if name in _PACKAGES:
        try:
            return _importlib.import_module(f"stp_jax.{name}")
        except ModuleNotFoundError as error:
            if name != "data":
                raise
            raise ImportError(
                f"stp_jax.data needs {error.name}: pip install 'stp-jax[train]'"
            ) from error
    if name in _COSTS:
        return getattr(_importlib.import_module("stp_jax.cost"), name)
    if name == "__version__":
        return _importlib.import_module("importlib.metadata").version("stp-jax")
    raise AttributeError(f"module 'stp_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_COSTS, "__version__"})
