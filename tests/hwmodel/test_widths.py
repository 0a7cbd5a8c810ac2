"""Widths by operand and level: halving one halves its bytes there, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from networks import SMALL, random_weights

from stp_jax import hwmodel
from stp_jax.hwmodel import Widths

BUFFERS = {"inputs": "ifmap", "weights": "filter", "outputs": "ofmap", "partial_sums": "psum"}
# Partial sums of each of these spill, and nothing depends on what fits.
ARRAY = hwmodel.Array(rows=8, cols=12, ofmap_sram=16, ifmap_sram=1 << 20, filter_sram=1 << 20)
PES = {
    "parallel": hwmodel.BitParallel(),
    "dot product": hwmodel.DotProduct(lanes=4),
    "groups": hwmodel.GroupPE(),
    "packed": hwmodel.GroupPE(packed=True),
    "serial": hwmodel.BitWave(lanes=8),
}
WEIGHTS = random_weights(SMALL)


def evaluated(pe, **fields):
    array = dataclasses.replace(ARRAY, pe=pe, **fields)
    return hwmodel.evaluate(SMALL, array, weights=WEIGHTS)


def halved(operand, pe, level):
    """The level's widths with one of them halved."""
    whole = Widths(weights=7.0) if operand == "weights" else Widths()
    changed = dataclasses.replace(whole, **{operand: getattr(whole, operand) / 2})
    return (evaluated(pe, **{level: widths}) for widths in (whole, changed))


@pytest.mark.parametrize("pe", PES.values(), ids=PES)
@pytest.mark.parametrize("operand", BUFFERS)
def test_half_the_width_in_dram_is_half_its_bytes(operand, pe):
    whole, half = halved(operand, pe, "dram_bits")
    for name, count in whole.dram_operand_bytes.items():
        factor = 0.5 if name == BUFFERS[operand] else 1.0
        assert count.sum() > 0
        np.testing.assert_allclose(half.dram_operand_bytes[name], factor * count)
    for component in ("array", "encoder", "registers", "sram"):
        np.testing.assert_array_equal(half.energy_pj[component], whole.energy_pj[component])
    np.testing.assert_allclose(
        half.energy_pj["dram"] / half.dram_bytes, whole.energy_pj["dram"] / whole.dram_bytes
    )


@pytest.mark.parametrize("pe", PES.values(), ids=PES)
@pytest.mark.parametrize("operand", ["inputs", "weights"])
def test_half_the_width_in_a_buffer_is_half_its_bytes(operand, pe):
    whole, half = halved(operand, pe, "sram_bits")
    for name, count in whole.sram_bytes.items():
        factor = 0.5 if name == BUFFERS[operand] else 1.0
        np.testing.assert_allclose(half.sram_bytes[name], factor * count)
    for component in ("array", "encoder", "registers", "dram"):
        np.testing.assert_array_equal(half.energy_pj[component], whole.energy_pj[component])


def test_outputs_and_partial_sums_share_a_buffer():
    """Outputs are written and sent on; a partial sum is written and read, once more if it spills.

    Whether it spills depends on its width, so that the buffer is too small for either.
    """
    whole, fewer = (
        evaluated(PES["parallel"], sram_bits=Widths(outputs=8, partial_sums=bits))
        for bits in (32, 16)
    )
    outputs = SMALL.extents("output_words")
    sums = whole.accesses["sram_psum_read"] + whole.accesses["dram_psum_read"]
    np.testing.assert_array_equal(whole.sram_bytes["ofmap"], 2 * (outputs + 4 * sums))
    np.testing.assert_array_equal(fewer.sram_bytes["ofmap"], 2 * (outputs + 2 * sums))
    np.testing.assert_array_equal(fewer.dram_bytes, whole.dram_bytes)


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
@pytest.mark.parametrize("pe", PES.values(), ids=PES)
def test_register_energy_is_the_sum_of_its_operands(pe, dataflow):
    """Each share is twice what half of its width saves, and together they are the whole."""
    shares = 0.0
    for operand in ("inputs", "weights", "partial_sums"):
        whole, half = (
            evaluated(pe, dataflow=dataflow, register_bits=widths)
            for widths in (
                Widths(weights=6.0),
                dataclasses.replace(
                    Widths(weights=6.0),
                    **{operand: getattr(Widths(weights=6.0), operand) / 2},
                ),
            )
        )
        saved = whole.energy_pj["registers"] - half.energy_pj["registers"]
        assert (saved > 0).all()
        shares = shares + 2 * saved
        np.testing.assert_array_equal(half.dram_bytes, whole.dram_bytes)
        np.testing.assert_array_equal(half.energy_pj["sram"], whole.energy_pj["sram"])
    np.testing.assert_allclose(shares, whole.energy_pj["registers"])


def test_registers_of_a_mac_by_hand():
    """One fold of 8 x 12 PEs: 4 filters stream their weights, sums are clocked with them."""
    network = hwmodel.Network((hwmodel.dense("fc", 8, 4, rows=12),))
    widths = Widths(inputs=4, weights=2, partial_sums=20)
    array = hwmodel.Array(rows=8, cols=12, register_bits=widths)
    bits = 8 * 8 * 12 * 4 + 8 * 12 * 4 * (2 + 20)
    energy = hwmodel.evaluate(network, array).energy_pj["registers"]
    assert energy.sum() == pytest.approx(bits * hwmodel.HOROWITZ_45NM.energy_pj["register_bit"])


@pytest.mark.parametrize("pe", PES.values(), ids=PES)
def test_without_a_width_weights_are_as_the_pe_stores_them(pe):
    """Terms of a packed PE, and else 8 bits; an explicit width takes their place at its level."""
    default = evaluated(pe)
    words = default.accesses["dram_filter_read"]
    stored = 8 * default.dram_operand_bytes["filter"] / words
    if pe is PES["packed"]:
        k = np.asarray(default.budgets)
        groups = -(-SMALL.extents("K") // 8) / SMALL.extents("K")
        np.testing.assert_allclose(stored, groups * k * pe.slot_format(k).stored_bits)
    else:
        np.testing.assert_array_equal(stored, 8)
    narrow = evaluated(pe, dram_bits=Widths(weights=4))
    np.testing.assert_array_equal(narrow.dram_operand_bytes["filter"], words / 2)
    np.testing.assert_array_equal(narrow.sram_bytes["filter"], default.sram_bytes["filter"])


def test_wide_operands_no_longer_fit_their_buffers():
    network = hwmodel.Network((hwmodel.dense("fc", 64, 64, rows=64),))
    array = hwmodel.Array(rows=8, cols=8, filter_sram=2 * 64 * 64 + 2)
    wide = dataclasses.replace(array, sram_bits=Widths(weights=9))
    once, again = (hwmodel.evaluate(network, a).accesses["dram_filter_read"] for a in (array, wide))
    assert once.tolist() == [64 * 64] and again.tolist() == [8 * 64 * 64]


def test_outputs_stay_on_the_chip_in_their_own_width():
    network = hwmodel.Network(
        (hwmodel.dense("a", 8, 64, rows=2), hwmodel.dense("b", 64, 8, rows=2))
    )
    for bits, capacity in ((16, 256), (4, 64)):
        for spare, stays in ((0, True), (-1, False)):
            array = hwmodel.Array(
                rows=8,
                cols=8,
                activation_sram=capacity + spare,
                sram_bits=Widths(outputs=bits),
            )
            report = hwmodel.evaluate(network, array)
            assert report.sram_bytes["activation"].sum() == (2 * capacity if stays else 0)


def test_widths_are_swept_traced_and_differentiated():
    designs = {"dram_bits.weights": [8.0, 3.5], "sram_bits.partial_sums": [32, 24]}
    designs["register_bits.inputs"] = [8, 4]
    swept = hwmodel.sweep(SMALL, designs)
    for i, (dram, sram, register) in enumerate(zip(*designs.values(), strict=True)):
        array = hwmodel.Array(
            rows=32,
            cols=32,
            dram_bits=Widths(weights=dram),
            sram_bits=Widths(partial_sums=sram),
            register_bits=Widths(inputs=register),
        )
        report = hwmodel.evaluate(SMALL, array)
        np.testing.assert_allclose(swept["dram_bytes"][i], report.dram_bytes.sum(), rtol=1e-6)
        for name in ("sram", "registers"):
            energy = report.energy_pj[name].sum()
            np.testing.assert_allclose(swept[f"{name}_pj"][i], energy, rtol=1e-5)

    def moved(bits):
        array = dataclasses.replace(ARRAY, dram_bits=Widths(inputs=bits))
        return hwmodel.evaluate(SMALL, array).dram_bytes.sum()

    assert jax.grad(moved)(8.0) == pytest.approx(SMALL.extents("input_words").sum() / 8)


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="Widths: weights must be positive, got 0"):
        Widths(weights=0)
    with pytest.raises(TypeError, match="Array: dram_bits must be a hwmodel"):
        hwmodel.Array(rows=8, cols=8, dram_bits=8)
    with pytest.raises(ValueError, match="leave the array as partial sums"):
        hwmodel.Array(rows=8, cols=8, register_bits=Widths(outputs=4))
    with pytest.raises(ValueError, match="cannot sweep"):
        hwmodel.sweep(SMALL, {"register_bits.outputs": [8]})
    by_gates = hwmodel.NANGATE_45NM_GATES
    array = hwmodel.Array(rows=8, cols=8, register_bits=Widths(inputs=4, partial_sums=16))
    with pytest.raises(ValueError, match="other widths of inputs, partial_sums, but energies by"):
        hwmodel.evaluate(SMALL, array, technology=by_gates)
    with pytest.raises(ValueError, match="measured PEs with their registers"):
        hwmodel.sweep(SMALL, {"register_bits.inputs": [4]}, technology=by_gates)
