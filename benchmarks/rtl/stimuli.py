"""Stimuli: operands to port values, cycle by cycle, for each kind of processing element.

All follow the array's schedule. A fold first loads: the activations of the ROWS rows pass through
the PE on their way down and its own come last. Then its filters stream, without a gap. The partial
sum from above changes in the cycle in which the PE samples it, and stays until the next one, as the
register of the row above does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Operands, Stimulus
from stp_jax.hwmodel.rtl import images
from stp_jax.terms import slot_format

ROWS = 8  # of the array: cycles for which a fold's loading clocks the resident registers
WIDTH = 8  # bits of activations and weights
PSUM = 32
RESET = 2  # cycles of reset before the first fold


def unsigned(values: npt.ArrayLike, bits: int) -> npt.NDArray[np.int64]:
    """Two's complement bits of signed values."""
    return np.asarray(values, np.int64) & ((1 << bits) - 1)


def pack(fields: npt.ArrayLike, bits: int) -> npt.NDArray:
    """Joins the last axis' fields of ``bits`` bits, element 0 lowest, into Python integers."""
    fields = unsigned(fields, bits).astype(object)
    shifts = np.array([1 << (bits * i) for i in range(fields.shape[-1])], object)
    return (fields * shifts).sum(axis=-1)


def terms(weights: npt.NDArray[np.integer], slots: int) -> dict[str, npt.NDArray[np.int64]]:
    """Terms of groups [..., g]: valid, sign, exponent and index, each [..., slots].

    Largest exponent first, then lowest index; empty slots last, all zero.
    """
    group = weights.shape[-1]
    words = images.wire_slots(weights, slots).astype(np.int64)
    form = slot_format(group, slots, images.BITS)
    above = form.index_bits + form.exponent_bits
    return {
        "valid": words >> (above + 1) & 1,
        "sign": words >> above & 1,
        "exponent": words >> form.index_bits & ((1 << form.exponent_bits) - 1),
        "index": words & ((1 << form.index_bits) - 1),
    }


class Schedule:
    """Cycles of reset, loads and streaming for folds of ``steps`` cycles; fills ports by fold."""

    def __init__(self, folds: int, steps: int, *, tail: int = 4) -> None:
        self.folds, self.steps = folds, steps
        self.fold_cycles = ROWS + steps
        self.cycles = RESET + folds * self.fold_cycles + tail
        self.measured = (RESET, RESET + folds * self.fold_cycles)
        starts = RESET + np.arange(folds) * self.fold_cycles
        self.load = starts[:, None] + np.arange(ROWS)
        self.stream = starts[:, None] + ROWS + np.arange(steps)  # [folds, steps]

    def port(self, values: npt.NDArray, cycles: npt.NDArray, *, hold: bool = False) -> npt.NDArray:
        """A port with ``values`` at ``cycles``; elsewhere zero, or what it was before."""
        flat_values, flat_cycles = values.reshape(-1), cycles.reshape(-1)
        port = np.zeros(self.cycles, flat_values.dtype)
        if not hold:
            port[flat_cycles] = flat_values
            return port
        since = np.searchsorted(flat_cycles, np.arange(self.cycles), side="right") - 1
        return np.where(since >= 0, flat_values[np.maximum(since, 0)], 0)

    def reset(self) -> npt.NDArray[np.int64]:
        """High for the first cycles."""
        return (np.arange(self.cycles) < RESET).astype(np.int64)

    def loads(self, words: npt.NDArray) -> dict[str, npt.NDArray]:
        """`load` and `activations_in` for one word a fold: the rows below take other folds'."""
        passing = words[(np.arange(self.folds)[:, None] - np.arange(ROWS)[::-1]) % self.folds]
        high = np.ones(self.load.shape, np.int64)
        return {
            "load": self.port(high, self.load),
            "activations_in": self.port(passing, self.load, hold=True),
        }


def drive_group(
    operands: Operands, budget: int, *, latency: int = 1, psum: int = PSUM, psum_delay: int = 0
) -> Stimulus:
    """A group PE that takes one term a cycle as valid, sign, exponent and index.

    Args:
      operands: the PE's work.
      budget: slots a group.
      latency: cycles from a group's last slot to its sum on ``psum``.
      psum: bits of partial sums.
      psum_delay: cycles from the last slot to that in which ``psum_in`` is sampled.
    """
    folds, filters, group = operands.weights.shape
    plan = Schedule(folds, filters * budget)
    slots = terms(operands.weights, budget)
    last = np.zeros((folds, filters, budget), np.int64)
    last[..., -1] = 1
    closing = plan.stream.reshape(folds, filters, budget)[..., -1]
    inputs = {
        "reset": plan.reset(),
        **plan.loads(pack(operands.activations, WIDTH)),
        **{f"{name}_in": plan.port(values, plan.stream) for name, values in slots.items()},
        "last_in": plan.port(last, plan.stream),
        "psum_in": plan.port(unsigned(operands.psums, psum), closing + psum_delay, hold=True),
    }
    exponent_bits = (WIDTH - 1).bit_length()
    widths = dict.fromkeys(inputs, 1) | {
        "activations_in": group * WIDTH,
        "exponent_in": exponent_bits,
        "index_in": (group - 1).bit_length(),
        "psum_in": psum,
        "psum": psum,
    }
    return Stimulus(
        inputs=inputs,
        widths=widths,
        expected={"psum": (closing.ravel() + latency, unsigned(operands.sums, psum).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )


def drive_mac(operands: Operands, budget: int, *, latency: int = 1, psum: int = PSUM) -> Stimulus:
    """A MAC PE: one resident activation, one weight a cycle; the budget does not matter.

    A group's activations are folds of their own, and the row above is the lane before.
    """
    del budget
    folds, filters, group = operands.weights.shape
    weights = operands.weights.transpose(0, 2, 1).reshape(folds * group, filters)
    activations = operands.activations.reshape(folds * group)
    products = operands.weights.astype(np.int64) * operands.activations[:, None, :]
    below = operands.psums[..., None] + np.cumsum(products, axis=-1)  # [folds, filters, group]
    above = (below - products).transpose(0, 2, 1).reshape(folds * group, filters)
    sums = below.transpose(0, 2, 1).reshape(folds * group, filters)
    plan = Schedule(folds * group, filters)
    loads = plan.loads(unsigned(activations, WIDTH))
    inputs = {
        "load": loads["load"],
        "activation_in": loads["activations_in"],
        "weight_in": plan.port(unsigned(weights, WIDTH), plan.stream),
        "psum_in": plan.port(unsigned(above, psum), plan.stream),
    }
    return Stimulus(
        inputs=inputs,
        widths={
            "load": 1,
            "activation_in": WIDTH,
            "weight_in": WIDTH,
            "psum_in": psum,
            "psum": psum,
        },
        expected={"psum": (plan.stream.ravel() + latency, unsigned(sums, psum).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )
