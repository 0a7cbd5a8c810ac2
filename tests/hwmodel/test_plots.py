import numpy as np
import pytest
from matplotlib.figure import Figure
from networks import resnet18

from stp_jax import hwmodel

NETWORK = resnet18()
INT8 = hwmodel.Array(rows=32, cols=32)


def test_rooflines_bound_every_layer():
    array = hwmodel.Array(rows=32, cols=32, dram_bandwidth=4.0)
    report = hwmodel.evaluate(NETWORK, array)
    points = hwmodel.roofline(report, array)
    assert (points["achieved"] <= points["attainable"] * (1 + 1e-9)).all()
    assert set(points["bound"]) == {"compute", "memory"}
    assert points.loc["fc", "bound"] == "memory"
    np.testing.assert_allclose(points["compute"], 1024)


def test_rooflines_are_of_the_layers_real_rate():
    """Activations of 2 bits take Stripes 2 cycles, not the 8 of its nominal rate."""
    network = hwmodel.Network((hwmodel.dense("fc", 512, 4096, rows=8),))
    array = hwmodel.Array(rows=32, cols=8, pe=hwmodel.Stripes())
    activations = {"fc": np.full((8, 512), 3)}
    report = hwmodel.evaluate(network, array, activations=activations)
    points = hwmodel.roofline(report, array)
    assert points.loc["fc", "compute"] == pytest.approx(32 * 8 * 16 / 2)
    assert 0.9 < points.loc["fc", "achieved"] / points.loc["fc", "attainable"] <= 1


def test_rooflines_name_the_busiest_port():
    array = hwmodel.Array(rows=32, cols=32, dram_bandwidth=1e3, sram_bandwidth=2.0)
    report = hwmodel.evaluate(NETWORK, array)
    points = hwmodel.roofline(report, array)
    assert (points["achieved"] <= points["attainable"] * (1 + 1e-9)).all()
    assert set(points["bound"]) == {"sram"}
    ports = report.to_pandas().filter(like="_sram_bytes").max(axis=1)
    np.testing.assert_allclose(points["sram"], 2.0 * report.operations["macs"] / ports)


def test_figures_label_their_units():
    left, right = Figure().subplots(1, 2)
    array = hwmodel.Array(rows=32, cols=32, dram_bandwidth=4.0)
    report = hwmodel.evaluate(NETWORK, array)
    assert "µJ" in hwmodel.plot_energy(left, {"int8": report}).get_ylabel()
    assert "MAC per DRAM byte" in hwmodel.plot_roofline(right, report, array).get_xlabel()
    with pytest.raises(ValueError, match="finite dram_bandwidth"):
        hwmodel.plot_roofline(right, report, INT8)


def test_the_sensitivity_figure_leaves_out_what_does_not_matter():
    frame = hwmodel.sensitivity(lambda technology: technology.energy_pj["int32_add"] ** 2)
    axes = hwmodel.plot_sensitivity(Figure().subplots(), frame, figure="squared energy (pJ²)")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["int32_add"]
    assert frame.loc["int32_add", "elasticity"] == pytest.approx(2)
    bar = axes.patches[0]
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((0.05**2, 0.2**2))
