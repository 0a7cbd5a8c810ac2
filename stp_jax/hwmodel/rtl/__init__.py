"""Verilog of the group-PE array and its encoder: the golden reference of the accelerator model."""

from stp_jax.hwmodel.rtl.images import Job as Job
from stp_jax.hwmodel.rtl.images import wire_slots as wire_slots
from stp_jax.hwmodel.rtl.images import write_images as write_images
from stp_jax.hwmodel.rtl.simulate import JobResult as JobResult
from stp_jax.hwmodel.rtl.simulate import icarus_available as icarus_available
from stp_jax.hwmodel.rtl.simulate import simulate_array as simulate_array
from stp_jax.hwmodel.rtl.simulate import simulate_encoder as simulate_encoder
from stp_jax.hwmodel.rtl.simulate import simulate_weight_edge as simulate_weight_edge
from stp_jax.hwmodel.rtl.stream import simulate_stream as simulate_stream
