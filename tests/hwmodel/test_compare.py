import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from resnet18 import resnet18

from stp_jax import hwmodel

NETWORK = resnet18()
INT8 = hwmodel.Array(rows=32, cols=32)
STP = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


def test_one_term_per_weight_saves_what_the_table_says():
    frame = hwmodel.compare(NETWORK, {"int8": INT8, "stp": hwmodel.Design(array=STP, budgets=8)})
    # Layers whose last group is ragged have the budget of whole ones: conv1, 147 = 18 * 8 + 3.
    slots = np.ceil(NETWORK.extents("K") / 8) * 8 * NETWORK.extents("P") * NETWORK.extents("M")
    expected = 0.3 * NETWORK.macs / (0.124 * slots.sum())
    assert frame.loc["stp", "array_saving"] == pytest.approx(expected)
    assert frame.loc["stp", "array_saving_with_encoder"] < frame.loc["stp", "array_saving"]
    assert frame.loc["int8", ["speedup", "array_saving", "total_saving"]].tolist() == [1, 1, 1]


def test_matched_arrays_have_the_baselines_area_or_throughput():
    designs = {
        "int8": hwmodel.Design(array=INT8),
        "stp": hwmodel.Design(array=STP, budgets=16),
        "stripes": hwmodel.Design(array=hwmodel.Array(rows=32, cols=32, pe=hwmodel.Stripes())),
    }
    area = hwmodel.compare(NETWORK, designs, by="area")
    column = area["area_mm2"] / area["cols"]
    assert (area["area_mm2"] <= area.loc["int8", "area_mm2"]).all()
    assert (area["area_mm2"] + column > area.loc["int8", "area_mm2"]).all()
    matched = [
        hwmodel.match(design, designs["int8"], NETWORK, by="throughput")
        for design in designs.values()
    ]
    assert [design.array.cols for design in matched] == [32, 64, 16]
    assert {hwmodel.peak_macs(design, NETWORK) for design in matched} == {1024.0}
    with pytest.raises(ValueError, match="'area' or 'throughput'"):
        hwmodel.compare(NETWORK, designs, by="price")


def test_nothing_to_compare_is_said():
    with pytest.raises(ValueError, match="at least a baseline"):
        hwmodel.compare(NETWORK, {})


def test_a_list_of_designs_is_refused():
    with pytest.raises(TypeError, match="must be a mapping from names to arrays"):
        hwmodel.compare(NETWORK, [INT8, STP])


def test_tables_without_areas_compare_all_but_area():
    table = dataclasses.replace(hwmodel.HOROWITZ_45NM, area_um2={})
    frame = hwmodel.compare(NETWORK, {"int8": INT8, "stp": STP}, technology=table)
    assert frame["area_mm2"].isna().all()
    assert frame.loc["stp", "array_saving"] > 0
    with pytest.raises(ValueError, match="has no area_um2 entry"):
        hwmodel.compare(NETWORK, {"int8": INT8, "stp": STP}, by="area", technology=table)


def test_what_cannot_be_matched_is_refused():
    small = hwmodel.Design(array=hwmodel.Array(rows=2, cols=1))
    with pytest.raises(ValueError, match=r"a single column of 32 GroupPE takes .* more than"):
        hwmodel.match(hwmodel.Design(array=STP), small, NETWORK, by="area")
    empty = hwmodel.Design(array=STP, budgets=0)
    for design, reference in ((empty, small), (small, empty)):
        with pytest.raises(ValueError, match="budgets are all 0"):
            hwmodel.match(design, reference, NETWORK, by="throughput")


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
def test_matched_area_counts_the_encoders_of_every_dataflow(dataflow):
    array = dataclasses.replace(STP, dataflow=dataflow)
    base = hwmodel.Design(array=INT8)
    matched = hwmodel.match(hwmodel.Design(array=array), base, NETWORK, by="area").array
    wider = dataclasses.replace(matched, cols=matched.cols + 1)
    area, more, room = (sum(hwmodel.array_area_um2(a).values()) for a in (matched, wider, INT8))
    assert area <= room < more
    itself = hwmodel.match(
        hwmodel.Design(array=array), hwmodel.Design(array=array), NETWORK, by="area"
    )
    assert itself.array.cols == 32


def test_elasticities_are_the_entries_shares_of_array_energy():
    def saving(technology):
        reports = (
            hwmodel.evaluate(NETWORK, INT8, technology=technology),
            hwmodel.evaluate(NETWORK, STP, budgets=8, technology=technology),
        )
        return hwmodel.computational_saving(*reports)

    frame = hwmodel.sensitivity(saving)
    expected = dict.fromkeys(frame.index, 0.0)
    expected["int8_multiply"] = 0.2 / 0.3
    expected["int32_add"] = 0.1 / 0.3 - 0.1 / 0.124
    expected["int8_shift"] = -0.024 / 0.124
    for name, elasticity in expected.items():
        assert frame.loc[name, "elasticity"] == pytest.approx(elasticity, abs=1e-5)
    assert frame.loc["int8_multiply", "doubled"] == pytest.approx(
        saving(hwmodel.HOROWITZ_45NM) * 5 / 3
    )


def test_edge_encoders_are_shared_by_the_columns():
    encoders = hwmodel.edge_encoders(STP)
    assert encoders.count == 32 * 8
    assert encoders.area_per_pe_um2 == pytest.approx(29.8 * 8 / 32)
    wide = dataclasses.replace(STP, cols=64)
    assert hwmodel.edge_encoders(wide).pj_per_use == pytest.approx(encoders.pj_per_use / 2)
    assert hwmodel.edge_encoders(dataclasses.replace(STP, pe=hwmodel.GroupPE(packed=True))) is None
    assert hwmodel.encoder_table(STP)["area_um2"].idxmin() == "booth2"
    with pytest.raises(ValueError, match="takes no encoded terms"):
        hwmodel.edge_encoders(INT8)


def test_encoders_are_where_weights_enter():
    """Rows where inputs are resident; else columns, down which weights move, or load to stay."""
    expected = {"is": (32 * 8, 64), "ws": (64 * 8, 1), "os": (64 * 8, 32)}
    for dataflow, (count, users) in expected.items():
        encoders = hwmodel.edge_encoders(dataclasses.replace(STP, cols=64, dataflow=dataflow))
        assert encoders.count == count
        assert encoders.pj_per_use == pytest.approx(encoders.pj_per_weight / users)


def designs(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "rows": rng.integers(4, 65, count),
        "cols": rng.integers(4, 65, count),
        "group_size": rng.integers(4, 17, count),
        "budgets": rng.integers(1, 16, (count, len(NETWORK))),
        "filter_sram": 1 << rng.integers(12, 21, count),
        "dram_bandwidth": rng.uniform(1, 64, count),
    }


def test_a_sweep_over_all_devices_agrees_with_single_evaluations():
    swept = hwmodel.sweep(NETWORK, designs(13))
    single = hwmodel.sweep(NETWORK, designs(13), devices=jax.devices()[:1])
    for name, values in swept.items():
        assert values.shape == (13,)
        np.testing.assert_allclose(values, single[name], rtol=1e-6)
    for i in range(13):
        chosen = {name: x[i] if x[i].ndim else x[i].item() for name, x in designs(13).items()}
        budgets, pe = chosen.pop("budgets"), hwmodel.GroupPE(group_size=chosen.pop("group_size"))
        report = hwmodel.evaluate(NETWORK, hwmodel.Array(pe=pe, **chosen), budgets=budgets)
        np.testing.assert_allclose(swept["cycles"][i], report.total_cycles, rtol=1e-5)
        np.testing.assert_allclose(swept["dram_pj"][i], report.energy_pj["dram"].sum(), rtol=1e-5)


def test_sweeps_of_a_subclass_keep_its_other_numbers():
    pe = hwmodel.TermMac(data_terms=2)
    swept = hwmodel.sweep(NETWORK, {"group_size": [4, 8], "budgets": [4, 4]}, pe=pe)
    for i, g in enumerate((4, 8)):
        array = hwmodel.Array(rows=32, cols=32, pe=hwmodel.TermMac(data_terms=2, group_size=g))
        report = hwmodel.evaluate(NETWORK, array, budgets=4)
        np.testing.assert_allclose(swept["cycles"][i], report.total_cycles, rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"colour": [1]}, "cannot sweep"),
        ({}, "cannot sweep"),
        ({"rows": [1, 2], "cols": [1]}, "one value a design"),
        ({"rows": [0]}, "positive whole"),
        ({"rows": [1.5]}, "positive whole"),
        ({"budgets": [[1, 2]]}, "shape"),
        ({"budgets": [9], "group_size": [2]}, "exceed"),
    ],
)
def test_bad_sweeps_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        hwmodel.sweep(NETWORK, bad)


def relaxed(smoothing, packed=True):
    pe = hwmodel.GroupPE(group_size=8, packed=packed)
    array = hwmodel.Array(rows=32, cols=32, pe=pe, dram_bandwidth=16.0)

    def cost(budgets):
        report = hwmodel.evaluate(NETWORK, array, budgets=budgets, smoothing=smoothing)
        return report.total_cycles, report.total_energy_pj

    return cost


# Not 8: there the 3x3x512x512 kernels fill half of their buffer to 98 %, on the smoothed step.
@pytest.mark.parametrize("k", [4, 9, 13])
def test_the_surrogate_is_within_its_smoothing_of_the_exact_model(k):
    exact, smooth = (relaxed(s)(np.full(len(NETWORK), k)) for s in (0.0, 0.01))
    np.testing.assert_allclose(smooth, exact, rtol=0.02)


@pytest.mark.parametrize("component", [0, 1])
def test_surrogate_gradients_are_its_differences(component):
    budgets = np.linspace(3.0, 14.0, len(NETWORK))
    cost = relaxed(0.05)
    gradient = jax.grad(lambda k: cost(k)[component])(jnp.asarray(budgets, jnp.float32))
    for i in (0, 7, 20):
        step = np.zeros(len(NETWORK))
        step[i] = 1e-4
        difference = (cost(budgets + step)[component] - cost(budgets - step)[component]) / 2e-4
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-3)
    assert (gradient > 0).all()


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


def test_technologies_are_read_from_files(tmp_path):
    table = hwmodel.HOROWITZ_45NM
    sources = dict(table.sources)
    content = {
        "name": table.name,
        "node_nm": 45,
        **{
            kind: {
                name: {"value": value, "source": sources[f"{kind}.{name}"], "node_nm": 45}
                for name, value in getattr(table, kind).items()
            }
            for kind in ("energy_pj", "area_um2")
        },
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    assert hwmodel.read_technology(path) == table
    del content["energy_pj"]["int32_add"]["source"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="int32_add needs a value and a source"):
        hwmodel.read_technology(path)
    with pytest.raises(ValueError, match=r"\.json or \.toml"):
        hwmodel.read_technology(tmp_path / "table.csv")


def test_onnx_graphs_become_networks(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, shape = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["z"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", shape, [2, 3, 16, 16])],
        [helper.make_tensor_value_info("z", shape, [2, 10])],
        [
            helper.make_tensor("w", shape, [8, 3, 3, 3], np.zeros(216)),
            helper.make_tensor("g", shape, [10, 8], np.zeros(80)),
        ],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph), str(path))
    network = hwmodel.read_onnx(path)
    extents = [(layer.name, layer.K, layer.P, layer.M) for layer in network]
    assert extents == [("conv", 27, 2 * 64, 8), ("fc", 8, 2, 10)]
