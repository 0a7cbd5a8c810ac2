"""The design explorer: its data are the accelerator model's, and the page shows them."""

import html
import itertools
import json
import re
import shutil
import subprocess

import pytest

from stp_jax import hwmodel

TITLE = "ResNet-20, 32×32"  # the smallest


@pytest.fixture(scope="module")
def explorer(hooks):
    return hooks._beside("explorer")


@pytest.fixture(scope="module")
def designs(explorer):
    return [dict(zip(explorer.FIELDS, row, strict=True)) for row in explorer.designs(TITLE)]


def test_every_combination_is_there_once(explorer, designs):
    arrays = set(itertools.product(explorer.SIZES, explorer.SIZES))
    kinds = {(0, 0)} | {
        (g, g * mean) for g in explorer.GROUP_SIZES for mean in explorer.TERMS_PER_WEIGHT
    }
    found = [(d["rows"], d["cols"], d["g"], d["k"]) for d in designs]
    assert len(found) == len(set(found)) == len(arrays) * len(kinds)
    assert set(found) == {(*array, *kind) for array in arrays for kind in kinds}


def test_designs_are_what_the_model_evaluates(explorer, designs):
    network = explorer.network(TITLE)
    for design in designs[::37]:
        g = design["g"]
        pe = hwmodel.GroupPE(group_size=g) if g else hwmodel.BitParallel()
        array = hwmodel.Array(
            rows=design["rows"], cols=design["cols"], pe=pe, dram_bandwidth=explorer.DRAM_BANDWIDTH
        )
        budgets = design["k"] if g else None
        for basis in ("table", "gates"):
            energies = [design[f"{basis}_{name}"] for name in explorer.COMPONENTS]
            if basis == "gates" and g not in (0, 8):
                assert energies == [None] * 5
                continue
            technology = explorer.GATES if basis == "gates" else explorer.TABLE
            report = hwmodel.evaluate(network, array, budgets=budgets, technology=technology)
            expected = [1e-6 * report.energy_pj[name].sum() for name in explorer.COMPONENTS]
            assert energies == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert design["cycles"] == pytest.approx(report.total_cycles, rel=1e-3)
        assert design["dram_bytes"] == pytest.approx(report.dram_bytes.sum(), rel=1e-3)
        area = sum(hwmodel.array_area_um2(array).values()) * 1e-6
        assert design["area_mm2"] == pytest.approx(area, rel=1e-3)


# Chooses a design and a limit as a reader does, and writes down what the page then shows.
READER = """
const select = (name, value) => {
  const control = document.querySelector(`[name=${name}]`);
  control.value = value;
  control.dispatchEvent(new Event(name === "area" ? "input" : "change"));
};
const shown = () => ({
  summary: document.querySelector(".summary").textContent,
  table: [...document.querySelectorAll(".explorer tr")].map((row) =>
    [...row.children].map((cell) => cell.textContent)),
  dots: document.querySelectorAll(".dot").length,
  chosen: document.querySelectorAll(".chosen").length,
  roofline: document.querySelectorAll(".roofline").length,
  fronts: [...document.querySelectorAll("[data-front]")].map((line) =>
    line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number))),
});
const results = [];
select("rows", 16); select("cols", 64); select("g", 8); select("terms", 0.5);
select("basis", "table");
results.push(shown());
select("area", 0.5); results.push(shown());
select("area", 1e-9); results.push(shown());
select("area", ""); select("basis", "gates"); select("g", 16); results.push(shown());
document.querySelector(".dot").dispatchEvent(new Event("click")); results.push(shown());
document.body.innerHTML = "";
document.body.append(JSON.stringify(results));
"""


@pytest.fixture(scope="module")
def pages(explorer, designs, tmp_path_factory):
    """What the page shows after each of the reader's choices, in a real browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium")
    folder = tmp_path_factory.mktemp("explorer")
    rows = [[design[name] for name in explorer.FIELDS] for design in designs]
    data = {
        "fields": explorer.FIELDS,
        "bandwidth": explorer.DRAM_BANDWIDTH,
        "networks": {TITLE: {"macs": int(explorer.network(TITLE).macs), "designs": rows}},
    }
    source = (explorer.__file__).replace("explorer.py", "javascripts/explorer.js")
    script = f"const EXPLORER = {json.dumps(data)};"
    page = folder / "page.html"
    page.write_text(
        f'<meta charset="utf-8"><div id="explorer" class="explorer"></div><script>{script}</script>'
        f'<script src="{source}"></script><script>{READER}</script>'
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile")
    command = [browser, *options, "--dump-dom", page.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    body = re.search(r"<body>(.*)</body>", out, re.DOTALL)
    return json.loads(html.unescape(body[1]))


def value(text):
    return float(text.replace(",", "")) if text != "–" else None


def test_the_page_shows_the_chosen_design(pages, explorer, designs):
    def find(**wanted):
        return next(d for d in designs if all(d[k] == v for k, v in wanted.items()))

    ours, int8 = find(rows=16, cols=64, g=8, k=4), find(rows=16, cols=64, g=0)
    header, *rows = pages[0]["table"]
    assert header == ["16×64, groups of 8, k = 4", "by gates", "by the table"]
    for name, (_, gates, table) in zip(explorer.COMPONENTS, rows[:5], strict=True):
        assert value(gates) == pytest.approx(ours[f"gates_{name}"], rel=0.01)
        assert value(table) == pytest.approx(ours[f"table_{name}"], rel=0.01)
    savings = [int8[f"{basis}_array"] / ours[f"{basis}_array"] for basis in ("gates", "table")]
    assert [float(cell.rstrip("×")) for cell in rows[5][1:]] == pytest.approx(savings, abs=0.01)
    speed = re.search(r"\(([\d.]+)× the speed of int8", pages[0]["summary"])[1]
    assert float(speed) == pytest.approx(int8["cycles"] / ours["cycles"], abs=0.01)
    assert pages[0]["dots"] == len(designs) and pages[0]["chosen"] == 1
    assert pages[0]["roofline"] == 2  # this design and int8


def test_fronts_and_limits(pages, designs):
    # The int8 array's energy is by the table that of its products, whatever its size.
    assert [len(front) > 1 for front in pages[0]["fronts"]] == [False, True]
    for front in pages[0]["fronts"]:  # to the right: more cycles; down: less energy
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(front))
    assert pages[1]["dots"] == sum(d["area_mm2"] <= 0.5 for d in designs)
    assert pages[2]["dots"] == 0 and len(pages[2]["table"]) == 9
    # Groups of 16 have no energy by gates: no number, and no dot.
    assert {row[1] for row in pages[3]["table"][1:]} == {"–"} and pages[3]["chosen"] == 0
    assert pages[3]["dots"] == sum(d["gates_array"] is not None for d in designs)
    assert pages[4]["chosen"] == 1
