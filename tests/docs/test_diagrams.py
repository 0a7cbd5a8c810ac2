"""The pages' diagrams: what they draw is what the library computes."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.config import STAGE_NAMES
from stp_jax import hwmodel, terms


@pytest.fixture(scope="module")
def diagrams(hooks):
    return hooks._beside("diagrams")


def boxes(figure):
    """The attributes of a drawing's boxes; the figure is one block of well-formed XML."""
    assert "\n" not in figure
    return [node.attrib for node in ElementTree.fromstring(figure).iter() if "rect" in node.tag]


def test_the_projected_group_is_drawn_with_its_terms(diagrams):
    drawn = [box["data-term"] for box in boxes(diagrams.projection()) if "data-term" in box]
    before = int(terms.count(np.array(diagrams.GROUP)).sum())
    assert sum(text.startswith("its projection") for text in drawn) == diagrams.BUDGET
    assert sum(text.startswith(f"a group of weights: {before} ") for text in drawn) == before


def test_the_array_takes_the_model_s_cycles_and_computes_the_layer(diagrams):
    drawn = [box for box in boxes(diagrams.array()) if "data-pe" in box]
    filters, reduction = diagrams.FILTERS.shape
    layer = hwmodel.dense("fc", reduction, filters, rows=diagrams.COLS)
    pe = hwmodel.GroupPE(group_size=reduction // diagrams.ROWS)
    array = hwmodel.Array(rows=diagrams.ROWS, cols=diagrams.COLS, pe=pe)
    report = hwmodel.evaluate(hwmodel.Network((layer,)), array, budgets=diagrams.BUDGET)
    cycles = [int(box["data-cycle"]) for box in drawn]
    assert max(cycles) == report.total_cycles
    assert f"= {report.total_cycles} cycles" in diagrams.array()
    assert len(drawn) == len({(box["data-pe"], box["data-cycle"]) for box in drawn})

    # The terms that pass a column make up the layer's product.
    x = np.arange(1, reduction + 1)
    sums = np.zeros(filters, int)
    for row in range(diagrams.ROWS):
        mine = [box["data-term"] for box in drawn if box["data-pe"] == f"{row},0"]
        for place, term in enumerate(mine):
            if term != "empty":
                sign, power, index = re.fullmatch(r"([+−])(\d+)·x(\d+)", term).groups()
                value = int(power) * x[int(index)]
                sums[place // diagrams.BUDGET] += value if sign == "+" else -value
    size = reduction // diagrams.ROWS
    projected = terms.project(diagrams.FILTERS, group_size=size, budget=diagrams.BUDGET, axis=1)
    assert sums.tolist() == (np.asarray(projected) @ x).tolist()


def test_the_stages_are_drawn_in_their_order(diagrams):
    drawn = [box for box in boxes(diagrams.stages()) if "data-stage" in box]
    assert [box["data-stage"] for box in drawn] == list(STAGE_NAMES)
    blue = [box["data-stage"] for box in drawn if box["fill"] != "none"]
    assert blue == ["float", "guided", "budgeted", "retrained"]
    assert [box["data-stage"] for box in drawn if "stroke-dasharray" in box] == [
        "guided",
        "budgeted",
    ]
    places = [(float(box["y"]), float(box["x"])) for box in drawn]
    assert all(one < other for one, other in pairwise(places))  # as one reads
