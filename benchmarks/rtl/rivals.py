"""Stimuli of the rivals' processing elements: their published rules on real operands.

All work on groups of eight along the reduction, as the group PE does. A group's steps come one a
cycle; in Bit-Pragmatic and BitWave their number depends on the weights. Sums leave two cycles after
a group's last step. The rules are those of `stp_jax.hwmodel.bitserial`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Operands, Stimulus
from benchmarks.rtl.stimuli import WIDTH, Schedule, pack, terms, unsigned
from stp_jax.terms import project

PSUM = 28
DATA_TERMS = 3  # of an activation, in term revealing's tMAC
_BITS = np.arange(WIDTH)

Steps = list[list[int]]  # the step words of each group, [folds * filters][steps]


def drive_stripes(operands: Operands, budget: int) -> Stimulus:
    """Bit columns of weights at the precision of all, that of signs first if there are any."""
    del budget
    weights = operands.weights.astype(np.int64)
    precision = precision_of(weights)
    bits = weights[..., None] >> _BITS[:precision][::-1] & 1
    columns = (bits << np.arange(8)[:, None]).sum(axis=-2)  # [folds, filters, columns]
    columns[..., 0] |= int(weights.min() < 0) << 8
    zero_point = _zero_point(operands)
    extra = zero_point * operands.weights.sum(axis=-1)
    return _stimulus(operands, columns.reshape(-1, precision).tolist(), 9, zero_point, extra)


def precision_of(weights: npt.NDArray[np.integer]) -> int:
    """Bits of the weights, in two's complement where one is negative."""
    magnitude = int(np.maximum(weights, ~weights).max()).bit_length()
    return max(magnitude + int(weights.min() < 0), 1)


def drive_bitwave(operands: Operands, budget: int) -> Stimulus:
    """Bit columns of sign and magnitude that are not zero; a group of zeros takes one."""
    del budget
    weights = operands.weights.reshape(-1, 8).astype(np.int64)
    bits = np.abs(weights)[..., None] >> _BITS & 1
    columns = (bits << np.arange(8)[:, None]).sum(axis=-2)  # [groups, significance]
    signs = ((weights < 0) << np.arange(8)).sum(axis=-1)
    steps = [
        [int(e << 16 | sign << 8 | row[e]) for e in (np.flatnonzero(row) if row.any() else [0])]
        for row, sign in zip(columns, signs, strict=True)
    ]
    return _stimulus(operands, steps, 19, *_offset_form(operands))


def drive_pragmatic(operands: Operands, budget: int) -> Stimulus:
    """Essential bits of every lane, largest first; lanes wait for the slowest."""
    del budget
    steps = [_essential_steps(group) for group in operands.weights.reshape(-1, 8).tolist()]
    return _stimulus(operands, steps, 40, *_offset_form(operands))


def _essential_steps(group: list[int]) -> list[int]:
    lanes = [[e for e in range(7, -1, -1) if abs(w) >> e & 1] for w in group]
    steps = [0] * max(1, *(len(lane) for lane in lanes))
    for i, (weight, lane) in enumerate(zip(group, lanes, strict=True)):
        for n, exponent in enumerate(lane):
            steps[n] |= (1 << 4 | (weight < 0) << 3 | exponent) << 5 * i
    return steps


def drive_bitvert(operands: Operands, budget: int) -> Stimulus:
    """All bit columns, each by its ones or, if they are the more, by its zeros."""
    del budget
    bits = operands.weights.reshape(-1, 8).astype(np.int64)[..., None] >> _BITS[::-1] & 1
    steps = [[_column(column) for column in group.T.tolist()] for group in bits]
    for group in steps:
        group[0] |= 1 << 17
    zero_point = _zero_point(operands)
    extra = zero_point * operands.weights.sum(axis=-1)
    return _stimulus(operands, steps, 18, zero_point, extra)


def _column(bits: list[int]) -> int:
    inverted = int(sum(bits) > 4)
    picks = [i for i, bit in enumerate(bits) if bit != inverted]
    return inverted << 16 | sum((8 | index) << 4 * n for n, index in enumerate(picks))


def drive_term_mac(operands: Operands, budget: int) -> Stimulus:
    """Pairs of a weight term and an activation term, all slots whether there is a term or not.

    Activations are projected to `DATA_TERMS` terms each, as the method does.
    """
    held = project(operands.activations, group_size=1, budget=DATA_TERMS, axis=-1)
    activations = np.asarray(held, np.int64)
    data = terms(activations[..., None], DATA_TERMS)  # [folds, g, DATA_TERMS]
    fields = data["valid"] << 4 | data["sign"] << 3 | data["exponent"]
    resident = pack(fields.reshape(len(fields), -1), 5)
    slots = terms(operands.weights, budget)
    word = slots["valid"] << 4 | slots["sign"] << 3 | slots["exponent"]
    word = (word << 3 | slots["index"])[..., None] | np.arange(DATA_TERMS) << 8
    folds, filters = operands.psums.shape
    steps = word.reshape(folds * filters, -1).tolist()
    sums = np.einsum("fng,fg->fn", operands.weights.astype(np.int64), activations)
    return _assembled(operands, steps, 10, resident, 8 * DATA_TERMS * 5, sums + operands.psums)


def _zero_point(operands: Operands) -> int:
    return 128 if operands.activations.min() < 0 else 0


def _offset_form(operands: Operands) -> tuple[int, npt.NDArray[np.int64]]:
    """What is added to activations, and with the complements to the sums."""
    zero_point = _zero_point(operands)
    weights = operands.weights.astype(np.int64)
    return zero_point, (zero_point * weights + 255 * np.maximum(-weights, 0)).sum(axis=-1)


def _stimulus(
    operands: Operands, steps: Steps, bits: int, zero_point: int, extra: npt.NDArray[np.integer]
) -> Stimulus:
    resident = pack(operands.activations + zero_point, WIDTH)
    return _assembled(operands, steps, bits, resident, 8 * WIDTH, operands.sums + extra)


def _assembled(
    operands: Operands,
    steps: Steps,
    bits: int,
    resident: npt.NDArray,
    resident_bits: int,
    sums: npt.NDArray[np.integer],
) -> Stimulus:
    folds, filters = operands.psums.shape
    lengths = np.array([len(group) for group in steps])
    plan = Schedule(folds, lengths.reshape(folds, filters).sum(axis=1), rows=operands.rows)
    last = np.zeros(len(plan.stream), np.int64)
    last[np.cumsum(lengths) - 1] = 1
    closing = plan.stream[last == 1]
    words = np.array([word for group in steps for word in group], object)
    return Stimulus(
        inputs={
            "reset": plan.reset(),
            **plan.loads(resident, bus=True),
            "step_in": plan.port(words, plan.stream),
            "last_in": plan.port(last, plan.stream),
            "psum_in": plan.port(unsigned(operands.psums, PSUM), closing + 1, hold=True),
        },
        widths={
            **dict.fromkeys(("reset", "load", "last_in"), 1),
            "activations_in": resident_bits,
            "step_in": bits,
            "psum_in": PSUM,
            "psum": PSUM,
        },
        expected={"psum": (closing + 2, unsigned(sums, PSUM).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )
