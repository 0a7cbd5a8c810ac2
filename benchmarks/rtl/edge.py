"""A row's edge as a design: encoders and the serialiser, a new group of weights every k cycles."""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.rtl.design import PRODUCT, Design, Operands, Stimulus
from benchmarks.rtl.stimuli import RESET, WIDTH, pack, passes, terms

EDGE = "weight_edge"  # the module
COLUMNS = 32  # of the array that one edge serves


def drive_edge(
    operands: Operands, budget: int, *, lanes: int = 1, weight_bits: int = WIDTH
) -> Stimulus:
    """Groups follow each other without a gap; each is loaded in the last pass of the one before.

    A weight of 128, which int8 lacks, becomes 64, and of other widths likewise. What lanes without
    a term show is not compared.
    """
    group = operands.weights.shape[-1]
    groups = operands.weights.reshape(-1, group)
    beyond = 1 << (weight_bits - 1)
    groups = np.where(groups == beyond, beyond // 2, groups)
    count = passes(budget, lanes)
    slots = {
        name: values.reshape(len(groups) * count, lanes)
        for name, values in terms(groups, count * lanes).items()
    }
    starts = RESET + np.arange(len(groups)) * count
    cycles = RESET + len(groups) * count + 2
    load = np.zeros(cycles, np.int64)
    load[starts] = 1
    held = np.clip((np.arange(cycles) - RESET) // count, 0, len(groups) - 1)
    seen = (starts[:, None] + 1 + np.arange(count)).ravel()
    full = slots["valid"].all(axis=-1)
    bits = {
        "sign": 1,
        "exponent": (weight_bits - 1).bit_length(),
        "index": (group - 1).bit_length(),
    }
    return Stimulus(
        inputs={
            "reset": (np.arange(cycles) < RESET).astype(np.int64),
            "load": load,
            "weights": pack(groups, weight_bits)[held],
        },
        widths={
            "reset": 1,
            "load": 1,
            "weights": group * weight_bits,
            "valid": lanes,
            **{name: lanes * width for name, width in bits.items()},
        },
        expected={
            "valid": (seen, pack(slots["valid"], 1)),
            **{name: (seen[full], pack(slots[name][full], w)) for name, w in bits.items()},
        },
        multiplications=groups.size,
        measured=(RESET, RESET + len(groups) * count),
    )


def weight_edge(lanes: int = 1, weight_bits: int = WIDTH) -> Design:
    """The edge that gives ``lanes`` terms a cycle."""
    narrow = weight_bits != WIDTH
    return Design(
        name="weight_edge"
        + (f"_{lanes}" if lanes > 1 else "")
        + (f"_w{weight_bits}" if narrow else ""),
        title=f"encoders and serialiser of a row, {lanes} terms of a group of 8 a cycle"
        + (f", weights of {weight_bits} bits" if narrow else ""),
        top=EDGE,
        sources=tuple(
            PRODUCT / f"{name}.v" for name in ("naf_encoder", "term_stream", "weight_edge")
        ),
        parameters={"GROUP": 8, "LANES": lanes, "WIDTH": weight_bits},
        group=8,
        driver=functools.partial(drive_edge, lanes=lanes, weight_bits=weight_bits),
        rate=lambda budget: 8 / passes(budget, lanes),
        weight_bits=weight_bits,
    )


def lanes_of(design: Design) -> int:
    """Terms of a group that a group PE takes a cycle."""
    return int(design.parameters.get("LANES", 1))
