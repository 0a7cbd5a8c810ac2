"""Groups: the weights that share a budget of terms, and how an array is cut into them.

Groups of g follow each other along the reduction, which is one axis of an array or several adjacent
ones, merged in their order. Which axes these are says how groups lie: along the input channels of a
kernel ``[*window, channels, filters]`` they start anew at each window position; along the window
and the channels together ("flat") they run on from one position to the next. A last group that the
reduction does not fill is ragged: it is filled up with zeros, which hold no terms, and keeps the
same budget.

Extents are Python integers, NumPy arrays or traced values in `group_count` and `ragged_size`, so
that an accelerator model can count with them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)

# Below this many trailing elements, `GroupLayout.cut` makes a long axis of the leading ones: the
# compiled loops vectorise over the last axis, which costs as much for a short row as for a long.
_MIN_LANES = 32


def group_count(extent: Any, size: Any) -> Any:
    """Groups of ``size`` that cover ``extent`` members, the ragged one included: ⌈extent / size⌉.

    >>> group_count(20, 8)
    3
    """
    return -(-extent // size)


def ragged_size(extent: Any, size: Any) -> Any:
    """Members of the ragged last group; 0 if every group is whole.

    >>> ragged_size(20, 8)
    4
    """
    return extent % size


def check_group_size(group_size: object) -> None:
    """Raises ValueError unless a group's size is a positive integer."""
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, got {group_size!r}")


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Groups of ``size`` members along the adjacent ``axes`` of an array.

    Its methods take NumPy and JAX arrays, traced ones too, and return their kind.

    Raises:
      ValueError: size is no positive integer, or (from the methods) axes are not adjacent.

    >>> GroupLayout(4, axes=(0,)).sums(np.arange(6)).tolist()
    [6, 9]
    """

    size: int  # g
    axes: tuple[int, ...]  # the reduction; negative ones count from the last

    def __post_init__(self) -> None:  # noqa: D105
        check_group_size(self.size)

    def merged(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The shape with the layout's axes merged into one, and where that one is.

        >>> GroupLayout(8, axes=(0, 1)).merged((3, 3, 64))
        ((9, 64), 0)
        """
        axes = tuple(sorted(a % len(shape) for a in self.axes))
        if not axes or axes != tuple(range(axes[0], axes[-1] + 1)):
            raise ValueError(f"group axes must be adjacent and at least one, got {axes}")
        first, last = axes[0], axes[-1] + 1
        return (*shape[:first], math.prod(shape[first:last]), *shape[last:]), first

    def along(self, shape: tuple[int, ...]) -> int:
        """The number of groups along the reduction of an array of this shape."""
        shape, axis = self.merged(shape)
        return group_count(shape[axis], self.size)

    def count(self, shape: tuple[int, ...]) -> int:
        """The number of groups in an array of this shape."""
        merged, axis = self.merged(shape)
        return self.along(shape) * math.prod(merged[:axis] + merged[axis + 1 :])

    def pad(self, x: Array) -> Array:
        """x with the axes merged and filled up with zeros to whole groups."""
        shape, axis = self.merged(x.shape)
        missing = -shape[axis] % self.size
        x = x.reshape(shape)
        if not missing:
            return x
        widths = [(0, 0)] * len(shape)
        widths[axis] = (0, missing)
        return jnp.pad(x, widths) if isinstance(x, jax.Array) else np.pad(x, widths)

    def split(self, x: Array) -> Array:
        """x as ``[*before, groups, size, *after]``: the merged axis, filled up, becomes two."""
        _, axis = self.merged(x.shape)
        x = self.pad(x)
        along = x.shape[axis] // self.size
        return x.reshape(*x.shape[:axis], along, self.size, *x.shape[axis + 1 :])

    def join(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Undoes `split` for an array of this shape."""
        merged, axis = self.merged(shape)
        filled = group_count(merged[axis], self.size) * self.size
        x = groups.reshape(*merged[:axis], filled, *merged[axis + 1 :])
        return x[(slice(None),) * axis + (slice(merged[axis]),)].reshape(shape)

    def sums(self, x: Array) -> Array:
        """Sums over each group, ``[*before, groups, *after]``."""
        return self.split(x).sum(axis=self.merged(x.shape)[1] + 1)

    def cut(self, x: jax.Array) -> jax.Array:
        """All groups as ``[n, size, m]``, laid out for computing over the last axis.

        Where the elements behind the reduction make short rows, those in front of it are moved
        behind as well, so that m is long whatever the shape.
        """
        x = x.reshape(self._rows(x.shape))
        if x.shape[2] < _MIN_LANES:
            x = jnp.moveaxis(x, 0, 2).reshape(1, x.shape[1], -1)
        return GroupLayout(self.size, (1,)).split(x).reshape(-1, self.size, x.shape[2])

    def uncut(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `cut` for an array of this shape."""
        before, length, after = self._rows(shape)
        along = GroupLayout(self.size, (1,))
        if after < _MIN_LANES:
            x = along.join(groups, (1, length, after * before))
            return jnp.moveaxis(x.reshape(length, after, before), 2, 0).reshape(shape)
        return along.join(groups, (before, length, after)).reshape(shape)

    def merge_shared(self, x: jax.Array) -> jax.Array:
        """What the reduction shares, of size 1 along it, with the layout's axes merged."""
        return x.reshape(self.merged(x.shape)[0])

    def cut_shared(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What all members of a group share, ``[n, 1, m]``, as `cut` lays the groups out.

        Args:
          x: with the axes of the array, each 1 or equal, and 1 along the reduction.
          shape: of the array.
        """
        merged, axis = self.merged(shape)
        x = jnp.broadcast_to(self.merge_shared(x), (*merged[:axis], 1, *merged[axis + 1 :]))
        before, _, after = self._rows(shape)
        x = x.reshape(before, 1, after)
        if after < _MIN_LANES:
            x = jnp.moveaxis(x, 0, 2).reshape(1, 1, -1)
        before, _, after = x.shape
        x = jnp.broadcast_to(x[:, None], (before, self.along(shape), 1, after))
        return x.reshape(-1, 1, after)

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Extents before, along and behind the reduction."""
        merged, axis = self.merged(shape)
        return math.prod(merged[:axis]), merged[axis], math.prod(merged[axis + 1 :])
