"""The designs under study, by name."""

from __future__ import annotations

from benchmarks.rtl.design import PRODUCT, Design
from benchmarks.rtl.stimuli import drive_group, drive_mac

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
)

DESIGNS = {design.name: design for design in _ALL}
