"""Operand matrices (im2col) of a layer, and the cycles of lanes in lock-step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from stp_jax.hwmodel.network import Layer
from stp_jax.hwmodel.numbers import Operands
from stp_jax.hwmodel.term_histogram import GroupTerms, lookup, weight_matrix

if TYPE_CHECKING:
    from stp_jax.hwmodel.pes import PE


def layer_weights(layer: Layer, weights: ArrayLike, bits: int) -> np.ndarray:
    """Integer weights of one layer by product: int64 (groups, K, M); see `weight_matrix`."""
    matrix = weight_matrix(layer, weights, bits)
    return matrix.reshape(layer.K, layer.groups, layer.M).transpose(1, 0, 2)


def changed_bits(weights: np.ndarray, bits: int) -> np.ndarray:
    """Bits that differ from the filter before, the first one from zero: bool (K, M, bits).

    Args:
      weights: (K, M), in two's complement.
      bits: of a weight.
    """
    digits = weights[..., None] >> np.arange(bits) & 1 == 1
    return np.diff(digits, axis=1, prepend=False) if digits.size else digits


def layer_patches(layer: Layer, activations: ArrayLike, bits: int) -> np.ndarray:
    """Integer inputs of one layer as patches by product: int64 (groups, K, P).

    Args:
      layer: the layer.
      activations: patches (P, groups * K), channels fastest within a product, whose axes may be
        split where the layer is dense (as those of ``DenseGeneral`` are); or, for convolutions, the
        input (N, *spatial, channels), around which the layer's padding is laid.
      bits: width; magnitudes must be below 2**bits.

    Raises:
      TypeError: not integers. ValueError: wrong shape or out of range.
    """
    a = check_activations(layer, activations, bits)
    if a.shape == (layer.batch, *layer.in_size, layer.channels) and layer.kernel:
        a = _patches(layer, a)
    elif a.size == layer.P * layer.groups * layer.K and _ends_in(layer, a.shape):
        a = a.reshape(layer.P, layer.groups, layer.K).transpose(1, 2, 0)
    else:
        raise ValueError(
            f"{layer.name}: activations of shape {a.shape} are neither the input "
            f"{(layer.batch, *layer.in_size, layer.channels)} nor patches "
            f"{(layer.P, layer.groups * layer.K)}"
        )
    return a


def check_activations(layer: Layer, activations: ArrayLike, bits: int) -> np.ndarray:
    """The activations as int64; TypeError unless integers, ValueError if 2**bits is reached."""
    a = np.asarray(activations)
    if not np.issubdtype(a.dtype, np.integer):
        raise TypeError(f"{layer.name}: activations must be integers, got {a.dtype}")
    a = a.astype(np.int64)
    if a.size and np.abs(a).max() >= 1 << bits:
        raise ValueError(f"{layer.name}: activations exceed {bits} bits")
    return a


def _ends_in(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Whether the last axis, or of a dense layer the last axes, is that of patches."""
    most = len(shape) if layer.kind == "dense" else 1
    return layer.groups * layer.K in (math.prod(shape[-n:]) for n in range(1, most + 1))


def _patches(layer: Layer, a: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, 1 + len(layer.kernel)))
    padded = np.pad(a, [(0, 0), *layer.padding, (0, 0)])
    # A view of every window, of which strides and dilation choose some, is copied only at the end.
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.reach, axes)
    steps = zip(layer.out_size, layer.stride, strict=True)
    chosen = [slice(0, (out - 1) * stride + 1, stride) for out, stride in steps]
    taps = [slice(None, None, dilation) for dilation in layer.dilation]
    windows = windows[(slice(None), *chosen, slice(None), *taps)]  # (N, *out, channels, *kernel)
    split = windows.reshape(layer.P, layer.groups, layer.group_channels, layer.window)
    return split.transpose(1, 3, 2, 0).reshape(layer.groups, layer.K, layer.P)


def require(what: str, given: Operands | GroupTerms | None, layer: Layer, pe: PE) -> ArrayLike:
    """A layer's operand; ValueError if it was not given to a PE that needs it."""
    operand = lookup(given, layer) if isinstance(given, Mapping) else None
    if operand is None:
        raise ValueError(
            f"what {type(pe).__name__} takes depends on the digits of the {what}; pass "
            f"{what}={{...}} with {layer.name!r}"
        )
    return operand


def pad_rows(x: np.ndarray, multiple: int) -> np.ndarray:
    """Zeros below (rows, ...) up to a multiple of rows."""
    return np.pad(x, ((0, -len(x) % multiple), *((0, 0),) * (x.ndim - 1)))


def fold_maximum(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Maxima over consecutive blocks of ``size`` along an axis; the last may be short."""
    return np.maximum.reduceat(x, np.arange(0, x.shape[axis], size), axis=axis)


def lockstep_cycles(
    weight_side: np.ndarray,
    activation_side: np.ndarray,
    *,
    dataflow: str,
    rows: int,
    cols: int,
    lanes: int,
) -> int:
    """Cycles of one product whose array advances when its slowest lane is done. Exact.

    Lane l of filter m and position p takes ``weight_side[l, m] * activation_side[l, p]`` cycles, a
    step at least one. All lanes of all PEs that share a step wait for the slowest.

    Args:
      weight_side: (lanes along the reduction, M).
      activation_side: (lanes along the reduction, P).
      dataflow: which operand stays; see `Array`.
      rows: R.
      cols: C.
      lanes: lanes of the reduction in one PE.
    """
    # Factors are not negative, so the slowest of the pairs (m, p) that share a step has the product
    # of the largest factors: maxima are taken over each operand before they multiply.
    if dataflow == "os":
        w = fold_maximum(weight_side, cols, 1)
        a = fold_maximum(activation_side, rows, 1)
        blocks = _row_blocks(w, a, lanes)
    elif dataflow == "is":
        a = fold_maximum(activation_side, cols, 1)
        blocks = _row_blocks(weight_side, a, rows * lanes)
    else:
        w = fold_maximum(weight_side, cols, 1)
        blocks = _row_blocks(w, activation_side, rows * lanes)
    return sum(int(np.maximum(_largest_products(w, a), 1).sum(dtype=np.int64)) for w, a in blocks)


def own_cycles(weight_side: np.ndarray, activation_side: np.ndarray, lanes: int) -> int:
    """Cycles that all PEs work, without waiting for each other: sums of each step's slowest lane.

    Operands as in `lockstep_cycles`. A PE whose lanes have nothing to do rests.
    """
    blocks = _row_blocks(weight_side, activation_side, lanes)
    return sum(int(_largest_products(w, a).sum(dtype=np.int64)) for w, a in blocks)


def _row_blocks(w: np.ndarray, a: np.ndarray, size: int):
    for start in range(0, len(w), size):
        yield w[start : start + size], a[start : start + size]


def _largest_products(w: np.ndarray, a: np.ndarray) -> np.ndarray:
    """max over rows l of w[l, i] * a[l, j], shape (i, j), in slabs that fit the cache."""
    # Where one operand is the same in all columns, as for PEs that serialise the other one alone,
    # every column has the same maximum.
    if (a == a[:, :1]).all():
        return np.broadcast_to((w * a[:, :1]).max(axis=0)[:, None], (w.shape[1], a.shape[1]))
    if (w == w[:, :1]).all():
        return np.broadcast_to((w[:, :1] * a).max(axis=0)[None, :], (w.shape[1], a.shape[1]))
    largest = np.zeros((w.shape[1], a.shape[1]), np.result_type(w, a))
    for weights, activations in zip(w, a, strict=True):
        np.maximum(largest, weights[:, None] * activations[None, :], out=largest)
    return largest
