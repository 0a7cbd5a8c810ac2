"""STP models for other programs: packed checkpoints, ONNX, memory images for the RTL test bench."""

from stp_jax.export.card import model_card as model_card
from stp_jax.export.onnx import export_onnx as export_onnx
from stp_jax.export.packed import PackedSizes as PackedSizes
from stp_jax.export.packed import Size as Size
from stp_jax.export.packed import load_integers as load_integers
from stp_jax.export.packed import load_packed as load_packed
from stp_jax.export.packed import packed_sizes as packed_sizes
from stp_jax.export.packed import save_packed as save_packed
from stp_jax.export.rtl import layer_jobs as layer_jobs
from stp_jax.export.rtl import simulate_network as simulate_network
from stp_jax.export.rtl import write_layer_images as write_layer_images
from stp_jax.export.variables import is_variables as is_variables
from stp_jax.export.variables import load_variables as load_variables
from stp_jax.export.variables import save_variables as save_variables
