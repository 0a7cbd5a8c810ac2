"""NaN and infinity, found in the step where they first appear and named by their path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 4096  # elements of a leaf that costs less to copy than a kernel of its own


def _floating(tree: Any) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf)
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def paths(tree: Any) -> list[str]:
    """Dotted paths of a tree's floating leaves, in the order of `nonfinite`."""
    return [path for path, _ in _floating(tree)]


def nonfinite(tree: Any) -> jax.Array:
    """Which floating leaves of a tree hold a NaN or an infinity: bool ``[leaves]``; jit-able.

    Cheap to compile, since a train step has hundreds of leaves: small ones of one size are looked
    at together, and x - x, which is 0 or NaN, is summed because XLA has a kernel for sums.
    """
    leaves = [leaf for _, leaf in _floating(tree)]
    together: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        key = (leaf.size, leaf.dtype) if leaf.size <= _SMALL else i
        together.setdefault(key, []).append(i)
    sums = []
    for members in together.values():
        x = jnp.stack([leaves[i].reshape(-1) for i in members])
        sums.append(jnp.sum(x - x, axis=1))
    order = np.concatenate(list(together.values()))
    return jnp.isnan(jnp.concatenate(sums))[np.argsort(order)]


def name_nonfinite(names: Sequence[str], flags: Any, *, most: int = 3) -> str:
    """The paths that are flagged, the first few by name; "" if there is none.

    >>> name_nonfinite(["a", "b", "c", "d"], [False, True, True, True], most=2)
    'b, c and 1 more'
    """
    found = [name for name, flag in zip(names, np.asarray(flags).tolist(), strict=True) if flag]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


class Watch:
    """Flags of the steps since the last check. A check waits for the device, so it is rare.

    Attributes:
      names: dotted paths, in the order of the flags.
    """

    def __init__(self, names: Sequence[str]):
        """Takes the paths that the flags of every step stand for."""
        self.names = tuple(names)
        self._noted: list[tuple[int, jax.Array]] = []

    def note(self, step: int, flags: jax.Array) -> None:
        """Keeps a step's flags, on the device."""
        self._noted.append((step, flags))

    def first(self) -> tuple[int, str] | None:
        """The first step noted since the last call with anything flagged, and the paths' names."""
        noted, self._noted = self._noted, []
        for step, flags in noted:
            found = name_nonfinite(self.names, flags)
            if found:
                return step, found
        return None
