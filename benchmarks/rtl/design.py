"""What a studied processing element is: its Verilog, its stimulus and its rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

VERILOG = Path(__file__).parent / "verilog"
PRODUCT = Path(__file__).parents[2] / "stp_jax" / "hwmodel" / "rtl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """One PE's work, the same for every design.

    Attributes:
      activations: int8 values [folds, group], resident for one fold.
      weights: integers [folds, filters, group]; for a group PE at most as many NAF terms a group
        as the budget, each below 2**8 in magnitude; for a multiplier within its width.
      psums: integers [folds, filters], what comes from the row above.
      rows: of the array: cycles that a fold's loading takes.
    """

    activations: npt.NDArray[np.integer]
    weights: npt.NDArray[np.integer]
    psums: npt.NDArray[np.integer]
    rows: int = 8

    def __post_init__(self) -> None:
        """Checks shapes and the range of activations."""
        folds, filters, group = self.weights.shape
        if self.activations.shape != (folds, group) or self.psums.shape != (folds, filters):
            raise ValueError(
                f"weights [folds, filters, group] {self.weights.shape} do not match activations "
                f"{self.activations.shape} and psums {self.psums.shape}"
            )
        if self.activations.min() < -128 or self.activations.max() > 127:
            raise ValueError("activations must fit int8, [-128, 127]")

    @property
    def multiplications(self) -> int:
        """Multiply-accumulates of the dense layer."""
        return self.weights.size

    @property
    def sums(self) -> npt.NDArray[np.int64]:
        """Partial sums [folds, filters] that leave downwards."""
        product = np.einsum("fng,fg->fn", self.weights.astype(np.int64), self.activations)
        return product + self.psums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stimulus:
    """What a PE's ports see, cycle by cycle. A cycle begins with the rising edge of the clock.

    Attributes:
      inputs: port -> unsigned values [cycles], applied just after the cycle's rising edge; an
        object array of Python integers where they have more than 63 bits.
      widths: bits of each input and of each expected output.
      expected: output port -> (cycles, unsigned values), seen just before the next rising edge.
      multiplications: multiply-accumulates of the dense layer between the measured cycles.
      measured: the first cycle whose energy counts, and one more than the last.
    """

    inputs: Mapping[str, npt.NDArray]
    widths: Mapping[str, int]
    expected: Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray]]
    multiplications: int
    measured: tuple[int, int]

    @property
    def cycles(self) -> int:
        """Length of the stimulus."""
        return len(next(iter(self.inputs.values())))


def joined(stimuli: Sequence[Stimulus]) -> Stimulus:
    """One stimulus that plays several of one design after each other; all of it is measured.

    Raises:
      ValueError: their ports or widths differ.
    """
    first = stimuli[0]
    if any(s.widths != first.widths or s.expected.keys() != first.expected.keys() for s in stimuli):
        raise ValueError("stimuli of different ports cannot be joined")
    starts = np.cumsum([0, *(s.cycles for s in stimuli)])

    def expected(port: str) -> tuple[npt.NDArray[np.int64], npt.NDArray]:
        seen = [s.expected[port] for s in stimuli]
        cycles = [start + when for start, (when, _) in zip(starts[:-1], seen, strict=True)]
        return np.concatenate(cycles), np.concatenate([values for _, values in seen])

    return Stimulus(
        inputs={port: np.concatenate([s.inputs[port] for s in stimuli]) for port in first.inputs},
        widths=first.widths,
        expected={port: expected(port) for port in first.expected},
        multiplications=sum(s.multiplications for s in stimuli),
        measured=(0, int(starts[-1])),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """A processing element under study.

    Attributes:
      name: a Python identifier.
      title: one line for tables.
      top: the Verilog module; its clock port is ``clock``.
      sources: Verilog files.
      parameters: of the module.
      group: activations resident in the PE.
      driver: operands and budget -> stimulus.
      rate: budget -> multiplications a cycle, in the steady state.
      takes_terms: whether the weights must be within the budget (else any integers do).
      weight_bits: of the weights; powers of two among the terms reach ``2**(weight_bits - 1)``.
    """

    name: str
    title: str
    top: str
    sources: tuple[Path, ...]
    parameters: Mapping[str, int]
    group: int
    driver: Callable[[Operands, int], Stimulus]
    rate: Callable[[int], float]
    takes_terms: bool = True
    weight_bits: int = 8

    def drive(self, operands: Operands, budget: int) -> Stimulus:
        """The stimulus for these operands at a budget of terms a group."""
        return self.driver(operands, budget)

    def multiplications_per_cycle(self, budget: int) -> float:
        """Throughput in the steady state."""
        return self.rate(budget)
