"""Kernels as matrices of rows that whole groups fill, for projections under a full curvature."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.quant.layers import QuantizedLayer
from stp_jax.terms.groups import GroupLayout


@dataclasses.dataclass(frozen=True)
class KernelRows:
    """A kernel ``[*window, in / groups, out]`` as matrices of rows that whole groups fill.

    Attributes:
      shape: of the kernel.
      groups: channel groups G, each with M = out / G outputs.
      layout: the weight format's groups along the second axis.
      lead, run: axes of the rows: groups follow each other along the second.
    """

    shape: tuple[int, ...]
    groups: int
    layout: GroupLayout
    lead: int
    run: int

    @classmethod
    def of(cls, layer: QuantizedLayer) -> KernelRows:
        """Those of a dense layer or a convolution."""
        shape = layer.kernel.shape
        window = int(np.prod(shape[:-2]))
        layout = layer.rule.format.layout((1,))
        along_window = shape[-2] == 1 and len(shape) > 2
        lead, run = (1, window) if along_window else (window, shape[-2])
        return cls(shape, layer.layer.feature_groups, layout, lead, run)

    def pad(self, x: jax.Array) -> jax.Array:
        """Rows [K, n] filled up with zeros to whole groups, [K', n]."""
        return self.layout.pad(x.reshape(self.lead, self.run, -1)).reshape(-1, x.shape[-1])

    def split(self, kernel: jax.Array) -> jax.Array:
        """A kernel → [G, K', M]."""
        rows = self.pad(kernel.reshape(-1, kernel.shape[-1]))
        return jnp.moveaxis(rows.reshape(len(rows), self.groups, -1), 1, 0)

    def join(self, rows: jax.Array) -> jax.Array:
        """Undoes `split`."""
        rows = jnp.moveaxis(rows, 0, 1).reshape(self.lead, -1, self.shape[-1])
        return rows[:, : self.run].reshape(self.shape)

    def pad_square(self, gram: jax.Array) -> jax.Array:
        """[G, K, K] → [G, K', K']."""
        return jax.vmap(lambda h: self.pad(self.pad(h).T).T)(gram)
