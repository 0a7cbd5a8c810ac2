"""Operands for measurements: synthetic ones, and those of a trained network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats

from benchmarks.rtl.design import Operands
from stp_jax import terms
from stp_jax.export import load_integers

GROUP = 8
WEIGHT_DEVIATION = 36.0  # int8 steps: the largest of some 500 Gaussian weights is then near 127
ACTIVATION_DEVIATION = 40.0
ZERO_ACTIVATIONS = 0.4
ROWS_ABOVE = 32  # of groups whose sums come from above, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperandSet:
    """The same work in int8 and at each budget of terms in a group of 8.

    Attributes:
      dense: int8 weights.
      by_budget: weights projected to each budget.
      description: where they come from, for reports.
    """

    dense: Operands
    by_budget: Mapping[int, Operands]
    description: str

    def at(self, budget: int, *, takes_terms: bool) -> Operands:
        """Projected weights for a PE that takes terms, int8 ones for others."""
        return self.by_budget[budget] if takes_terms else self.dense


def synthetic(
    budgets: tuple[int, ...],
    *,
    folds: int,
    filters: int,
    seed: int,
    group: int = GROUP,
    zeros: float = ZERO_ACTIVATIONS,
    activation_deviation: float = ACTIVATION_DEVIATION,
    weight_deviation: float = WEIGHT_DEVIATION,
    weight_bits: int = 8,
) -> OperandSet:
    """Gaussian weights, and half-Gaussian activations of which a share is zero.

    Partial sums from above are those of up to 32 more groups of the same kind, in integers
    throughout: what differs between PEs is their own work. Deviations are in steps of the integers.
    """
    random = np.random.default_rng(seed)
    largest = (1 << (weight_bits - 1)) - 1

    def weights(*shape: int) -> npt.NDArray[np.float64]:
        return np.clip(random.normal(scale=weight_deviation, size=shape), -largest, largest)

    def activations(*shape: int) -> npt.NDArray[np.int64]:
        values = np.abs(random.normal(scale=activation_deviation, size=shape)).round()
        return np.where(random.random(shape) < zeros, 0, np.clip(values, 0, 127)).astype(np.int64)

    own_weights, own_activations = weights(folds, filters, group), activations(folds, group)
    psums = np.zeros((folds, filters), np.int64)
    for fold, count in enumerate(random.integers(0, ROWS_ABOVE, size=folds)):
        above = weights(filters, count * group).round().astype(np.int64)
        psums[fold] = above @ activations(count * group)
    return _operand_set(
        own_weights,
        own_activations,
        psums,
        budgets,
        f"synthetic: Gaussian int{weight_bits} weights of deviation {weight_deviation:g}, "
        f"activations half-Gaussian of deviation {activation_deviation:g} with {zeros:.0%} zeros, "
        f"{folds} folds of {filters} filters, seed {seed}",
    )


def best_deviation(bits: int) -> float:
    """Deviation, in steps, of Gaussian weights whose rounding to so many bits errs least.

    The step is that of least squared error, as learned scales come near it; the integers are
    symmetric, and values beyond the largest are clipped.
    """
    normal = scipy.stats.norm.ppf((np.arange(20_001) + 0.5) / 20_001)
    largest = (1 << (bits - 1)) - 1

    def error(deviation: float) -> float:
        values = deviation * normal
        rounded = np.clip(values.round(), -largest, largest)
        return float(np.mean((values - rounded) ** 2)) / deviation**2

    return float(scipy.optimize.minimize_scalar(error, bounds=(0.3, largest), method="bounded").x)


def of_network(
    packed: Path,
    activations: Path,
    budgets: tuple[int, ...],
    *,
    folds: int,
    filters: int,
    seed: int,
    group: int = GROUP,
) -> OperandSet:
    """Groups of a trained network's layers with the activations that meet them.

    A fold is a random group of a random layer (layers weighted by the square root of their size),
    at a random pixel whose window lies inside the image, and up to ``filters`` neighbouring
    filters. What comes from above are the same filters' sums over the groups before it. Weights are
    projected further where a budget is below that of the file; the int8 PE takes the file's own.

    Args:
      packed: a file of `stp_jax.export.save_packed`.
      activations: an .npz of what `stp_jax.hwmodel.record_activations` returns for that model:
        (N, H, W, C) or (N, C) integers by layer; those above 127 are halved, as the PEs take int8.
      budgets: terms a group, for the projections.
      folds: how many groups.
      filters: of each; layers with fewer are passed over.
      seed: of the choice.
      group: size of a group.

    Raises:
      ValueError: no layer has kernel and activations that fit, or the file is none of these.
    """
    kernels = load_integers(packed)
    with np.load(activations) as file:
        inputs = {name: file[name] for name in file.files}
    fitting = {
        name: (kernel, inputs[name])
        for name, kernel in kernels.items()
        if name in inputs and _fits(kernel, inputs[name], filters, group)
    }
    if not fitting:
        raise ValueError(
            f"no layer with at least {group} input channels, {filters} filters and recorded "
            f"activations; {packed} has {', '.join(kernels)}, {activations} has {', '.join(inputs)}"
        )
    random = np.random.default_rng(seed)
    shares = np.sqrt([float(kernel.size) for kernel, _ in fitting.values()])
    chosen = random.choice(list(fitting), size=folds, p=shares / shares.sum())
    parts = [_sample(*fitting[name], random, filters, group) for name in chosen]
    weights, resident, psums = (np.stack(column) for column in zip(*parts, strict=True))
    return _operand_set(
        weights.astype(np.float64),
        resident,
        psums,
        budgets,
        f"layers {', '.join(fitting)} of {packed.name} with {activations.name}, "
        f"{folds} folds of {filters} filters, seed {seed}",
    )


def _fits(kernel: npt.NDArray[np.integer], inputs: npt.NDArray, filters: int, group: int) -> bool:
    """Dense layers and convolutions whose channels hold a group and whose filters suffice."""
    return (
        kernel.ndim in (2, 4)
        and inputs.ndim == kernel.ndim
        and kernel.shape[-2] == inputs.shape[-1] >= group
        and kernel.shape[-1] >= filters
        and all(x >= w for x, w in zip(inputs.shape[1:-1], kernel.shape[:-2], strict=True))
    )


def _sample(
    kernel: npt.NDArray[np.integer],
    inputs: npt.NDArray[np.integer],
    random: np.random.Generator,
    filters: int,
    group: int,
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Weights [filters, group], activations [group] and partial sums [filters] of one group."""
    window = kernel.shape[:-2]
    corner = [random.integers(x - w + 1) for x, w in zip(inputs.shape[1:-1], window, strict=True)]
    image = inputs[random.integers(len(inputs))]
    patch = image[tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))]
    patch = patch.astype(np.int64)
    if patch.max(initial=0) > 127 or inputs.max() > 127:
        patch = patch // 2
    channels = kernel.shape[-2] // group * group  # whole groups
    first = random.integers(kernel.shape[-1] - filters + 1)
    taken = kernel[..., :channels, first : first + filters].astype(np.int64)
    rows = taken.reshape(-1, group, filters)  # groups along (window, channels)
    values = patch[..., :channels].reshape(-1, group)
    number = random.integers(len(rows))
    above = np.einsum("rgm,rg->m", rows[:number], values[:number])
    return rows[number].T, values[number], above


def _operand_set(
    weights: npt.NDArray,
    activations: npt.NDArray[np.int64],
    psums: npt.NDArray[np.int64],
    budgets: tuple[int, ...],
    description: str,
) -> OperandSet:
    group = weights.shape[-1]
    projected = {
        k: np.asarray(terms.project(weights, group_size=group, budget=k, axis=-1)) for k in budgets
    }
    dense = Operands(
        activations=activations,
        weights=np.clip(weights.round(), -128, 127).astype(np.int64),
        psums=psums,
    )
    return OperandSet(
        dense=dense,
        by_budget={k: dataclasses.replace(dense, weights=w) for k, w in projected.items()},
        description=description,
    )
