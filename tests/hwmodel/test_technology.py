import json

import numpy as np
import pytest
from networks import SMALL

from stp_jax import hwmodel


def test_energies_need_a_table_of_one_node(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(
        'name = "x"\nnode_nm = 28\n[energy_pj]\n'
        'int32_add = {value = 0.05, source = "s"}\nint8_multiply = {value = 0.1, source = "s"}\n'
    )
    table = hwmodel.read_technology(path)
    with pytest.raises(ValueError, match="dram_64b, register_bit"):
        hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12), technology=table)
    path.write_text(path.read_text().replace("add = {", "add = {node_nm = 45, "))
    with pytest.raises(ValueError, match="45 nm in a 28 nm table"):
        hwmodel.read_technology(path)


def test_sram_energy_interpolates_horowitz():
    capacities = np.array([8, 32, 1024]) * 1024.0
    energy = hwmodel.HOROWITZ_45NM.sram_pj_per_byte(capacities)
    np.testing.assert_allclose(8 * energy, [10, 20, 100])
    between = 8 * hwmodel.HOROWITZ_45NM.sram_pj_per_byte(np.float64(256 << 10))
    assert 20 < between < 100


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
