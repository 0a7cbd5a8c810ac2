"""Every studied processing element computes exactly, in the cycles that its stimulus states."""

import numpy as np
import pytest

from benchmarks.rtl.catalogue import DESIGNS
from benchmarks.rtl.design import Design, Operands, joined
from benchmarks.rtl.play import play_design
from benchmarks.rtl_tables import OTHERS, Case, other_events
from stp_jax import hwmodel, terms
from stp_jax.hwmodel.rtl.simulate import icarus_available

pytestmark = pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")

_EXTREMES = np.array([-128, -127, -1, 0, 1, 85, -86, 127])


def _within(weights: np.ndarray, design: Design) -> np.ndarray:
    """Weights clipped to the width that the design takes, its smallest value included."""
    limit = 1 << (design.weight_bits - 1)
    return np.clip(weights, -limit, limit - 1)


def _operands(design: Design, budget: int, *, filters: int = 9) -> Operands:
    """Random and extreme values: folds of both, filters of both, one of empty slots only."""
    rng = np.random.default_rng(budget)
    group = max(design.group, 8)
    activations = rng.integers(-128, 128, (4, group))
    activations[1] = np.resize(_EXTREMES, group)
    activations[2] = -128
    weights = rng.integers(-128, 128, (4, filters, group))
    weights[:, 1] = np.resize(_EXTREMES[::-1], group)
    weights[:, 2] = -128
    weights[:, 3] = 127
    weights[:, 4] = 0
    weights = _within(weights, design)
    if design.takes_terms:
        options = {"group_size": design.group, "budget": budget, "axis": -1}
        weights = np.asarray(terms.project(weights, method="greedy", **options))
    elif design.top == "mac_offset_dot":
        weights = np.maximum(weights, -127)  # sign and magnitude
    return Operands(
        activations=activations,
        weights=weights,
        psums=rng.integers(-(2**22), 2**22, (4, filters)),
    )


@pytest.mark.parametrize("scale", [0, 20, 128])
@pytest.mark.parametrize("name", OTHERS)
def test_the_models_cycles_are_the_verilogs(name: str, scale: int) -> None:
    """On an array of this PE alone, which waits for no other one.

    That the Verilog keeps to the cycles of its stimulus is what `test_values_and_cycles` says.
    """
    design, pe, budget = DESIGNS[name], OTHERS[name], 5
    rng = np.random.default_rng(1)
    weights = rng.integers(-scale, scale, (1, 9, 8)) if scale else rng.integers(0, 65, (1, 9, 8))
    weights = _within(weights, design)
    if design.takes_terms:
        weights = np.asarray(terms.project(weights, group_size=8, budget=budget, axis=-1))
    activations = rng.integers(0, 128, (1, 8))
    operands = Operands(activations=activations, weights=weights, psums=np.zeros((1, 9), int))
    first, end = design.drive(operands, budget).measured
    network = hwmodel.Network((hwmodel.dense("pe", 8, 9),))
    array = hwmodel.Array(rows=1, cols=1, pe=pe)
    report = hwmodel.evaluate(
        network,
        array,
        budgets=budget if design.takes_terms else None,
        weights={"pe": weights[0].T},
        activations={"pe": activations},
        technology=hwmodel.NANGATE_45NM_GATES,
    )
    folding = hwmodel.arrays.fold(network, array)
    loads = operands.rows * folding.folds.item()
    assert end - first - loads == (report.cycles - folding.fill_cycles).item()


@pytest.mark.parametrize("name", OTHERS)
def test_the_table_by_gates_prices_what_the_bench_counts(name: str) -> None:
    """Four times the rows see the column's bus for four times the cycles; nothing else changes."""
    few, many = (
        other_events(DESIGNS[name], case.operands(), case)
        for case in (
            Case(budget=4, folds=3, filters=5, rows=rows).narrowed(DESIGNS[name].weight_bits)
            for rows in (8, 32)
        )
    )
    assert few.keys() <= hwmodel.NANGATE_45NM_GATES.energy_pj.keys()
    lanes = 8 if name == "mac_dot_1x1" else 1  # as many PEs do the work of one of eight lanes
    bus = next(event for event in few if event.endswith("_bus"))
    assert (few[bus], many[bus]) == (3 * 8 * lanes, 3 * 32 * lanes)
    few.pop(bus), many.pop(bus)
    assert many == pytest.approx(few)


@pytest.mark.parametrize("name", DESIGNS)
def test_values_and_cycles(name: str) -> None:
    """One simulation for all budgets, as compiling it takes longer than running it."""
    design = DESIGNS[name]
    budgets = (1, 3, 6, 8) if design.takes_terms else (1,)
    stimuli = [design.drive(_operands(design, budget), budget) for budget in budgets]
    play_design(design, joined(stimuli))


def test_stripes_takes_fewer_columns_where_weights_are_small_or_unsigned() -> None:
    design, rng = DESIGNS["stripes"], np.random.default_rng(0)
    for low, high, columns in ((0, 65, 7), (-20, 20, 6), (0, 1, 1)):
        weights = rng.integers(low, high, (2, 9, 8))
        weights[0, 0, 0], weights[0, 0, 1] = low, high - 1
        activations = rng.integers(-128, 128, (2, 8))
        work = Operands(activations=activations, weights=weights, psums=np.ones((2, 9), int))
        stimulus = design.drive(work, 8)
        play_design(design, stimulus)
        first, end = stimulus.measured
        assert end - first == 2 * (work.rows + 9 * columns)


def test_player_sees_a_wrong_sum() -> None:
    design = DESIGNS["gpe"]
    stimulus = design.drive(_operands(design, 2), 2)
    cycles, values = stimulus.expected["psum"]
    values[5] ^= 1
    with pytest.raises(RuntimeError, match=f"FAIL cycle {cycles[5]}"):
        play_design(design, stimulus)


def test_a_wrong_sum_is_seen_in_the_second_of_joined_stimuli() -> None:
    design = DESIGNS["gpe"]
    first, second = (design.drive(_operands(design, budget), budget) for budget in (2, 3))
    cycles, values = second.expected["psum"]
    values[5] ^= 1
    with pytest.raises(RuntimeError, match=f"FAIL cycle {first.cycles + cycles[5]}"):
        play_design(design, joined([first, second]))
