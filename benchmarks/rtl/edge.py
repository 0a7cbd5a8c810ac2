"""A row's edge as a design: encoders and the serialiser, a new group of weights every k cycles."""

from __future__ import annotations

import numpy as np

from benchmarks.rtl.design import PRODUCT, Design, Operands, Stimulus
from benchmarks.rtl.stimuli import RESET, WIDTH, pack, terms

COLUMNS = 32  # of the array that one edge serves


def drive_edge(operands: Operands, budget: int) -> Stimulus:
    """Groups follow each other without a gap; each is loaded in the last slot of the one before.

    A weight of 128, which int8 lacks, becomes 64.
    """
    group = operands.weights.shape[-1]
    groups = operands.weights.reshape(-1, group)
    groups = np.where(groups == 128, 64, groups)
    slots = terms(groups, budget)
    starts = RESET + np.arange(len(groups)) * budget
    cycles = RESET + len(groups) * budget + 2
    load = np.zeros(cycles, np.int64)
    load[starts] = 1
    held = np.clip((np.arange(cycles) - RESET) // budget, 0, len(groups) - 1)
    seen = (starts[:, None] + 1 + np.arange(budget)).ravel()
    full = slots["valid"].ravel() == 1
    return Stimulus(
        inputs={
            "reset": (np.arange(cycles) < RESET).astype(np.int64),
            "load": load,
            "weights": pack(groups, WIDTH)[held],
        },
        widths={
            "reset": 1,
            "load": 1,
            "weights": group * WIDTH,
            "valid": 1,
            "sign": 1,
            "exponent": (WIDTH - 1).bit_length(),
            "index": (group - 1).bit_length(),
        },
        expected={
            "valid": (seen, slots["valid"].ravel()),
            **{
                name: (seen[full], slots[name].ravel()[full])
                for name in ("sign", "exponent", "index")
            },
        },
        multiplications=groups.size,
        measured=(RESET, RESET + len(groups) * budget),
    )


WEIGHT_EDGE = Design(
    name="weight_edge",
    title="encoders and serialiser of a row, for groups of 8",
    top="weight_edge",
    sources=tuple(PRODUCT / f"{name}.v" for name in ("naf_encoder", "term_stream", "weight_edge")),
    parameters={"GROUP": 8},
    group=8,
    driver=drive_edge,
    rate=lambda budget: 8 / budget,
)
