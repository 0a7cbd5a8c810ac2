"""Sharding of the training state: whole on each device, or cut along the output channels.

A batch is always split over the devices. With ``data``, each device keeps the whole state; with
``fsdp`` (fully sharded data parallelism: Rajbhandari et al., ZeRO, SC20, stage 3), each keeps its
share of parameters and optimizer state, and XLA gathers a layer's weights where they are used.
They are cut along the last axis, which holds the output channels, so that a group of weights that
share a budget, which lies along the reduction, is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
Tree = TypeVar("Tree")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices on one axis; by default all of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Cut along the first axis, into as many pieces as there are devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def along_outputs(mesh: Mesh, tree: Tree) -> Tree:
    """Shardings of a tree's leaves: the last axis cut where it divides by the devices, else whole.

    >>> mesh = make_mesh()
    >>> spec = along_outputs(mesh, jnp.zeros((3, 8 * mesh.size))).spec
    >>> tuple(spec)
    (None, 'data')
    """

    def one(leaf: Any) -> NamedSharding:
        if leaf.ndim == 0 or leaf.shape[-1] % mesh.size:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), AXIS))

    return jax.tree.map(one, tree)


def gather(tree: Tree) -> Tree:
    """The same values whole in this process, on its default device, wherever they were."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            whole = replicated(leaf.sharding.mesh)  # type: ignore[attr-defined]
            leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(one, tree)
