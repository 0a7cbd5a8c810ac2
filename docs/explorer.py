"""Data of the design explorer: a sweep of the accelerator model over arrays, PEs and budgets.

``python docs/explorer.py`` prints them; the documentation's build writes them beside the page.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax import hwmodel, models

# Title → model, side of the images, classes.
NETWORKS = {
    "ResNet-18, 224×224": ("resnet18", 224, 1000),
    "ResNet-20, 32×32": ("resnet20", 32, 10),
    "MobileNetV2, 224×224": ("mobilenet_v2", 224, 1000),
    "ViT-S/16, 224×224": ("vit_s16", 224, 1000),
}
SIZES = (8, 16, 32, 64, 128)  # rows and columns
GROUP_SIZES = (4, 8, 16)
TERMS_PER_WEIGHT = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
DRAM_BANDWIDTH = 16.0  # bytes a cycle

TABLE, GATES = hwmodel.HOROWITZ_45NM, hwmodel.NANGATE_45NM_GATES
GATES_GROUP_SIZE = 8  # of the group PE that was measured
COMPONENTS = ("array", "encoder", "registers", "sram", "dram")
# Of a design; energies in µJ, null where nothing was measured. g is 0 for the int8 array.
FIELDS = (
    *("rows", "cols", "g", "k", "cycles", "utilization", "dram_bytes", "area_mm2"),
    *(f"table_{name}" for name in COMPONENTS),
    *(f"gates_{name}" for name in COMPONENTS),
)


def network(title: str) -> hwmodel.Network:
    """The layers of a network of the explorer."""
    name, side, classes = NETWORKS[title]
    model = nnx.eval_shape(lambda: models.create(name, num_classes=classes, rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return hwmodel.trace(model, image, name=title)


def _sweep(layers: hwmodel.Network, g: int, designs: dict[str, np.ndarray]) -> dict[str, Any]:
    """A column for each of `FIELDS`, of designs with one kind of PE."""
    pe: hwmodel.PE = hwmodel.GroupPE(group_size=g) if g else hwmodel.BitParallel()
    swept = {k: v for k, v in designs.items() if g or k != "budgets"}
    totals = hwmodel.sweep(layers, swept, pe=pe)
    array = hwmodel.Array(rows=designs["rows"], cols=designs["cols"], pe=pe)
    area = np.asarray(sum(hwmodel.array_area_um2(array).values())) * 1e-6
    count = len(area)
    gates: dict[str, Any] = {f"{name}_pj": [None] * count for name in COMPONENTS}
    if g in (0, GATES_GROUP_SIZE):
        gates = hwmodel.sweep(layers, swept, pe=pe, technology=GATES)

    def micro(energy: Any) -> list:
        return [None if e is None else float(e) * 1e-6 for e in energy]

    return {
        "rows": designs["rows"].tolist(),
        "cols": designs["cols"].tolist(),
        "g": [g] * count,
        "k": designs["budgets"].tolist() if g else [0] * count,
        **{name: totals[name].tolist() for name in ("cycles", "utilization", "dram_bytes")},
        "area_mm2": area.tolist(),
        **{f"table_{name}": micro(totals[f"{name}_pj"]) for name in COMPONENTS},
        **{f"gates_{name}": micro(gates[f"{name}_pj"]) for name in COMPONENTS},
    }


def designs(title: str) -> list[list[Any]]:
    """The designs of a network, each a list in the order of `FIELDS`, to four digits."""
    layers, rows = network(title), []
    for g in (0, *GROUP_SIZES):
        budgets = [round(g * mean) for mean in TERMS_PER_WEIGHT] if g else [0]
        grid = np.array(list(itertools.product(SIZES, SIZES, budgets)))
        columns = {
            "rows": grid[:, 0],
            "cols": grid[:, 1],
            "budgets": grid[:, 2],
            "dram_bandwidth": np.full(len(grid), DRAM_BANDWIDTH),
        }
        swept = _sweep(layers, g, columns)
        rows += [list(design) for design in zip(*(swept[name] for name in FIELDS), strict=True)]
    return [[float(f"{x:.4g}") if isinstance(x, float) else x for x in row] for row in rows]


def data() -> dict[str, Any]:
    """All that the page shows."""
    return {
        "fields": FIELDS,
        "bandwidth": DRAM_BANDWIDTH,
        "table": TABLE.name,
        "gates": GATES.name,
        "networks": {
            title: {"macs": int(network(title).macs), "designs": designs(title)}
            for title in NETWORKS
        },
    }


def script() -> str:
    """The data as a script, which a page can load without a server."""
    text = json.dumps(data(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"const EXPLORER = {text};\n"


if __name__ == "__main__":
    print(script(), end="")
