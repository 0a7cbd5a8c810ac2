"""Neural networks made of few power-of-two terms: train them, and know what they cost.

The pieces: `stp_jax.terms` (encodings, projection, quantizers, budgets), `stp_jax.models`,
`stp_jax.data`, `stp_jax.hwmodel` (the accelerator). `quantize` turns a Flax model into an STP
model.
"""

from stp_jax.integration.bias import correct_bias as correct_bias
from stp_jax.integration.compensation import compensate as compensate
from stp_jax.integration.integer import integer_model as integer_model
from stp_jax.integration.nnx import RelaxedBudget as RelaxedBudget
from stp_jax.integration.nnx import budgets as budgets
from stp_jax.integration.nnx import calibrate as calibrate
from stp_jax.integration.nnx import integer_weights as integer_weights
from stp_jax.integration.nnx import kernel_paths as kernel_paths
from stp_jax.integration.nnx import project_params as project_params
from stp_jax.integration.nnx import quantized_layers as quantized_layers
from stp_jax.integration.nnx import relax_budgets as relax_budgets
from stp_jax.integration.nnx import relaxed_budgets as relaxed_budgets
from stp_jax.integration.nnx import search_weight_scales as search_weight_scales
from stp_jax.integration.nnx import set_budgets as set_budgets
from stp_jax.integration.policy import Policy as Policy
from stp_jax.integration.policy import Rule as Rule
from stp_jax.integration.quantize import quantize as quantize
from stp_jax.integration.sensitivity import error_curves as error_curves
from stp_jax.integration.sensitivity import group_counts as group_counts
from stp_jax.integration.sensitivity import squared_gradients as squared_gradients
