"""The designs under study, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from benchmarks.rtl import rivals
from benchmarks.rtl.design import PRODUCT, VERILOG, Design, Operands, Stimulus
from benchmarks.rtl.stimuli import (
    drive_group,
    drive_lanes,
    drive_mac,
    drive_mac_dot,
    drive_serial,
    drive_term_dot,
    passes,
)

_TERM_DOT = (PRODUCT / "carry_save.v", VERILOG / "term_dot.v")


def _term_dot(*, lanes: int, groups: int = 1, columns: int = 1, indexed: bool = False) -> Design:
    """A feed-forward group PE of this shape."""
    return Design(
        name=f"term_dot_{lanes}x{groups}x{columns}{'i' if indexed else ''}",
        title=f"group PE, {lanes} terms of {groups} groups a cycle, {columns} columns"
        + (", index decoded inside" if indexed else ""),
        top="term_dot",
        sources=_TERM_DOT,
        parameters={
            "LANES": lanes,
            "GROUPS": groups,
            "COLUMNS": columns,
            "INDEXED": int(indexed),
        },
        group=8,
        driver=functools.partial(
            drive_term_dot, lanes=lanes, groups=groups, columns=columns, indexed=indexed
        ),
        rate=lambda budget: 8 * groups * columns / passes(budget, lanes),
    )


_SERIAL = {  # name, title, and options of the Verilog and of the stimulus
    "plain": ("as landed, psum of 28 bits", {}),
    "isolated": ("wide adder isolated", {"isolated": 1}),
    "late": ("group's sum registered", {"late": 1}),
    "one_hot": ("one-hot selects", {"one_hot": 1}),
    "horner": ("Horner, the sum moves up", {"late": 1, "one_hot": 1, "horner": 1}),
    "late_one_hot": ("registered sum, one-hot selects", {"late": 1, "one_hot": 1}),
    "cells": (
        "registered sum, one-hot selects, full-adder cells",
        {"late": 1, "one_hot": 1, "cells": 1},
    ),
    "offset": (
        "registered sum, one-hot selects, full-adder cells, offset form",
        {"late": 1, "one_hot": 1, "cells": 1, "offset": 1},
    ),
    "by_index": (
        "the same, terms by index",
        {"late": 1, "one_hot": 1, "cells": 1, "offset": 1, "order": "index"},
    ),
}


def _serial(name: str, group: int = 8) -> Design:
    """A group PE of one term a cycle with some options."""
    title, options = _SERIAL[name]
    driven = {n: v for n, v in options.items() if n not in ("isolated", "cells")}
    shape = {n.upper(): v for n, v in options.items() if n != "order"}
    return Design(
        name=f"serial_{name}" + (f"_{group}" if group != 8 else ""),
        title=f"group PE of {group}, one term a cycle, {title}",
        top="serial_pe",
        sources=(PRODUCT / "carry_save.v", VERILOG / "serial_pe.v"),
        parameters={**shape, "GROUP": group},
        group=8,
        driver=functools.partial(drive_serial, **driven, joined=group // 8),
        rate=lambda budget: 8 / budget,
    )


_TERM_TITLES = {
    "offset": "complements in offset form",
    "split": "added and subtracted terms apart",
}


def _unsigned_dot(form: str, *, lanes: int, groups: int = 1, columns: int = 1) -> Design:
    """A feed-forward group PE without signed operands of this shape."""
    shape = {"lanes": lanes, "groups": groups, "columns": columns}
    return Design(
        name=f"{form}_dot_{lanes}x{groups}x{columns}",
        title=f"group PE, {lanes} terms of {groups} groups a cycle, {columns} columns, "
        + _TERM_TITLES[form],
        top=f"{form}_dot",
        sources=(PRODUCT / "carry_save.v", VERILOG / f"{form}_dot.v"),
        parameters={name.upper(): value for name, value in shape.items()},
        group=8,
        driver=functools.partial(drive_term_dot, **shape, form=form),
        rate=lambda budget: 8 * groups * columns / passes(budget, lanes),
    )


def _product_lanes(lanes: int, weight_bits: int = 8) -> Design:
    """The product's element of several lanes, for weights of so many bits."""
    narrow = weight_bits != 8
    psum = 20 + weight_bits
    shape = {"LANES": lanes, "PSUM": psum}
    return Design(
        name=f"gpe_lanes_{lanes}" + (f"_w{weight_bits}" if narrow else ""),
        title=f"group PE, {lanes} terms a cycle, complements in offset form (the product's)"
        + (f", weights of {weight_bits} bits" if narrow else ""),
        top="gpe_lanes",
        sources=(PRODUCT / "carry_save.v", PRODUCT / "gpe_lanes.v"),
        parameters={"GROUP": 8, **shape, "EXPONENT": (weight_bits - 1).bit_length()},
        group=8,
        driver=functools.partial(drive_lanes, lanes=lanes, weight_bits=weight_bits, psum=psum),
        rate=lambda budget: 8 / passes(budget, lanes),
        weight_bits=weight_bits,
    )


# Name, title, stimulus, multiplications a cycle by budget, whether it takes terms. Where that
# rate depends on the weights it is the mean over Gaussian ones (`operands.synthetic`).
_RIVALS: tuple[tuple[str, str, Callable, Callable[[int], float], bool], ...] = (
    ("stripes", "Stripes, weights serial", rivals.drive_stripes, lambda k: 1.0, False),
    ("pragmatic", "Bit-Pragmatic, weights serial", rivals.drive_pragmatic, lambda k: 1.84, False),
    ("bitwave", "BitWave", rivals.drive_bitwave, lambda k: 1.25, False),
    ("bitvert", "BitVert, nothing pruned", rivals.drive_bitvert, lambda k: 1.0, False),
    (
        "term_mac",
        "term revealing's tMAC, 3 terms an activation",
        rivals.drive_term_mac,
        lambda k: 8 / (k * rivals.DATA_TERMS),
        True,
    ),
)


def _rival(
    name: str,
    title: str,
    driver: Callable[[Operands, int], Stimulus],
    rate: Callable[[int], float],
    takes_terms: bool,
) -> Design:
    """A rival's PE of eight lanes."""
    return Design(
        name=name,
        title=title,
        top=f"{name}_pe",
        sources=(PRODUCT / "carry_save.v", VERILOG / "late_sum.v", VERILOG / f"{name}_pe.v"),
        parameters={"PSUM": rivals.PSUM},
        group=8,
        driver=driver,
        rate=rate,
        takes_terms=takes_terms,
    )


_MAC_TITLES = {
    "plain": "array multiplier",
    "offset": "sign and magnitude, offset form",
    "booth": "radix-4 Booth, offset form",
    "quiet_booth": "radix-4 Booth, zero activations still",
}


def _mac_dot(*, lanes: int, columns: int = 1, form: str = "plain") -> Design:
    """An int8 dot-product PE of this shape."""
    top = "mac_dot" if form == "plain" else f"mac_{form}_dot"
    return Design(
        name=f"{top}_{lanes}x{columns}",
        title=f"int8 dot product of {lanes}, {columns} columns, {_MAC_TITLES[form]}",
        top=top,
        sources=(PRODUCT / "carry_save.v", VERILOG / f"{top}.v"),
        parameters={"LANES": lanes, "COLUMNS": columns},
        group=8,
        driver=functools.partial(drive_mac_dot, lanes=lanes, columns=columns, form=form),
        rate=lambda budget: float(lanes * columns),
        takes_terms=False,
    )


def _narrow_dot(weight_bits: int) -> Design:
    """The dot product of eight with weights of fewer bits, and partial sums of as many fewer."""
    psum = 20 + weight_bits
    wide = _mac_dot(lanes=8)
    return dataclasses.replace(
        wide,
        name=f"{wide.name}_w{weight_bits}",
        title=f"dot product of 8, weights of {weight_bits} bits, array multiplier",
        parameters={**wide.parameters, "WEIGHT_WIDTH": weight_bits, "PSUM": psum},
        driver=functools.partial(drive_mac_dot, lanes=8, weight_bits=weight_bits, psum=psum),
        weight_bits=weight_bits,
    )


_ALL = (
    Design(
        name="mac",
        title="int8 MAC, one product a cycle",
        top="mac_pe",
        sources=(PRODUCT / "mac_pe.v",),
        parameters={},
        group=1,
        driver=drive_mac,
        rate=lambda budget: 1.0,
        takes_terms=False,
    ),
    Design(
        name="gpe",
        title="group PE, one term a cycle",
        top="gpe",
        sources=(PRODUCT / "gpe.v",),
        parameters={"GROUP": 8},
        group=8,
        driver=drive_group,
        rate=lambda budget: 8 / budget,
    ),
    *(_serial(name) for name in _SERIAL),
    _serial("offset", 16),
    _serial("offset", 32),
    *(
        _mac_dot(lanes=lanes, form=form)
        for form in ("plain", "offset", "booth", "quiet_booth")
        for lanes in (1, 8)
    ),
    _mac_dot(lanes=16, columns=4),
    *map(_narrow_dot, (4, 3, 2)),
    _term_dot(lanes=2),
    _term_dot(lanes=4),
    _term_dot(lanes=4, indexed=True),
    _term_dot(lanes=8),
    _term_dot(lanes=4, columns=4),
    _term_dot(lanes=4, columns=4, indexed=True),
    _term_dot(lanes=4, groups=2, columns=4),
    *(
        _unsigned_dot("offset", lanes=lanes, groups=groups, columns=columns)
        for lanes, groups, columns in (
            *((2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 1, 4), (4, 2, 4), (8, 2, 4), (4, 4, 8)),
        )
    ),
    _unsigned_dot("split", lanes=4, groups=2, columns=4),
    *(_rival(*rival) for rival in _RIVALS),
    *(_product_lanes(lanes) for lanes in (2, 4, 8)),
    *(_product_lanes(lanes, weight_bits=4) for lanes in (2, 4)),
)

DESIGNS = {design.name: design for design in _ALL}
