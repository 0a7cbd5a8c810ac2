import pytest
from networks import extents

from stp_jax import hwmodel

HEADER = (
    "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, S,"
)


def test_reads_a_scalesim_topology(tmp_path):
    path = tmp_path / "net.csv"
    path.write_text(f"{HEADER}\nfirst,229,229,7,7,3,64,2,\n\nfc,1,1,1,1,512,1000,1,\n")
    network = hwmodel.read_scalesim_topology(path)
    assert network.names == ("first", "fc")
    assert (network.layers[0].K, network.layers[0].P, network.layers[0].M) == (147, 112**2, 64)
    assert network.layers[1].macs == 512_000


@pytest.mark.parametrize(
    "row", ["a,1,1,1,1,1", "a,8,8,3,3,4,x,1", "a,8,8,3,3,4,4,0", "a,2,2,3,3,4,4,1", "2:4", "1:1"]
)
def test_a_malformed_topology_row_is_named(tmp_path, row):
    path = tmp_path / "net.csv"
    path.write_text(f"{HEADER}\nok,8,8,3,3,4,4,1,\n{row}\n")
    with pytest.raises(ValueError, match=r"net\.csv:3"):
        hwmodel.read_scalesim_topology(path)


def test_scalesim_rounds_outputs_up(tmp_path):
    path = tmp_path / "net.csv"
    path.write_text(f"{HEADER}\nconv1,230,230,7,7,3,64,2,\n")
    (layer,) = hwmodel.read_scalesim_topology(path)
    assert layer.out_size == (113, 113)  # ceil((230 - 7 + 2) / 2)
    assert layer.input_words == 3 * 230**2


def test_scalesim_depthwise_layers_gemms_and_ratios(tmp_path):
    path = tmp_path / "net.csv"
    path.write_text(f"{HEADER}\nConv2_DP,16,16,3,3,32,1,1,1:1,\nqk,197,64,384,\nfc,5,6,7,1:1,\n")
    network = hwmodel.read_scalesim_topology(path)
    assert extents(network) == {
        "Conv2_DP": (9, 14**2, 1, 32),
        "qk": (384, 197, 64, 1),
        "fc": (7, 5, 6, 1),
    }
    path.write_text(f"{HEADER}\nsparse,16,16,3,3,32,1,1,2:4,\n")
    with pytest.raises(ValueError, match=r"net\.csv:2: layer 'sparse'.*2:4"):
        hwmodel.read_scalesim_topology(path)


def test_a_scalesim_topology_without_a_header_is_refused(tmp_path):
    path = tmp_path / "net.csv"
    path.write_text("conv1,229,229,7,7,3,64,2,\nfc,1,1,1,1,512,1000,1,\n")
    with pytest.raises(ValueError, match=r"net\.csv:1: expected a header line.*'conv1'"):
        hwmodel.read_scalesim_topology(path)


SCALESIM_CONFIG = """[general]
run_name = ours

[architecture_presets]
ArrayHeight:    16
ArrayWidth:     24
IfmapSramSzkB:  64
FilterSramSzkB: 32
OfmapSramSzkB:  8
Dataflow : os
Bandwidth : 10

[run_presets]
InterfaceBandwidth: {bandwidth}
"""


def test_reads_a_scalesim_configuration(tmp_path):
    path = tmp_path / "scale.cfg"
    path.write_text(SCALESIM_CONFIG.format(bandwidth="CALC"))
    expected = {
        "rows": 16,
        "cols": 24,
        "dataflow": "os",
        "ifmap_sram": 65536,
        "filter_sram": 32768,
        "ofmap_sram": 8192,
    }
    assert hwmodel.read_scalesim_config(path) == hwmodel.Array(**expected)
    path.write_text(SCALESIM_CONFIG.format(bandwidth="USER"))
    assert hwmodel.read_scalesim_config(path) == hwmodel.Array(**expected, dram_bandwidth=10.0)
    path.write_text(SCALESIM_CONFIG.replace("ArrayWidth:     24\n", ""))
    with pytest.raises(ValueError, match="no ArrayWidth"):
        hwmodel.read_scalesim_config(path)
    path.write_text("ArrayHeight: 16")
    with pytest.raises(ValueError, match=r"scale\.cfg"):
        hwmodel.read_scalesim_config(path)
