"""The documentation's results page, written from a comparison's `results.json`.

    python -m experiments.results_page runs/compare_methods

copies the results to ``docs/results/compare_methods.json`` and writes ``docs/results.md`` and its
plots from that copy. No number on the page is typed by hand; a test writes it again and compares.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import pandas as pd

from experiments.comparison import summary

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "results" / "compare_methods.json"
COMMAND = "python -m experiments.results_page runs/compare_methods"


def _number(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def _top1(row: Mapping[str, Any]) -> str:
    spread = "" if pd.isna(row["spread"]) else f" ± {row['spread']:.2f}"
    return f"{row['top1']:.2f}{spread} ({int(row['seeds'])})"


def _dataset(results: Mapping[str, Any]) -> str:
    """What it ran on, with a folder's name in the place of its path on that machine."""
    folder = results["config"]["data_dir"]
    return results["dataset"].replace(folder, Path(folder).name) if folder else results["dataset"]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _methods(table: pd.DataFrame) -> str:
    header = [
        "terms per weight",
        "method",
        "top-1, % (seeds)",
        "points below float",
        "before retraining, %",
        "terms held",
        "energy saving",
        "with encoders",
    ]
    rows = []
    for row in table.sort_values("terms", ascending=False, kind="stable").to_dict("records"):
        rows.append(
            [
                _number(row["terms"], "g"),
                row["method"],
                _top1(row),
                _number(row["loss"], ".2f"),
                _number(row["projected"], ".2f"),
                _number(row["terms_held"], ".3f"),
                _number(row["saving"], ".2f") + "×",
                _number(row["saving_with_encoder"], ".2f") + "×",
            ]
        )
    return _table(header, rows)


def _ablation(table: pd.DataFrame, reference: Mapping[str, Any]) -> str:
    rows = [["STP", f"{reference['top1']:.2f}", "", f"{reference['projected']:.2f}"]]
    for row in table.to_dict("records"):
        change = row["top1"] - reference["top1"]
        rows.append(
            [row["method"], f"{row['top1']:.2f}", f"{change:+.2f}", f"{row['projected']:.2f}"]
        )
    return _table(["one thing changed", "top-1, %", "change", "before retraining, %"], rows)


def _budgets(results: Mapping[str, Any]) -> str:
    rows = [
        r for r in results["rows"] if r["method"] == "STP" and not r["ablation"] and r["seed"] == 0
    ]
    rows.sort(key=lambda row: -row["terms"])
    header = ["layer", *(f"{row['terms']:g}" for row in rows)]
    return _table(
        header,
        [[path, *(str(row["budgets"][path]) for row in rows)] for path in rows[0]["budgets"]],
    )


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown, from what `experiments.comparison.gather` wrote."""
    config, base = results["comparison"], results["config"]
    methods, changed = summary(results), summary(results, ablation=True)
    plain = methods[methods["terms"].isna()].set_index("method")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    start = results["start"]
    float_row, int8_row = plain.loc["float"], plain.loc["int8"]
    text = [
        "# Results",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        f"{results['model']} on {_dataset(results)}. One float model is the start of every row: "
        f"{base['float_epochs']:g} epoch(s) from "
        + (f"`{Path(base['init_from']).name}`" if base["init_from"] else "random weights")
        + f", {start['float']:.2f} % in float and {start['int8']:.2f} % in int8. From there every "
        f"method, the float baseline included, trains {config['steps']} steps of "
        f"{config['batch_size']} images; only seeds and methods differ. Groups hold "
        f"{base['group_size']} weights; first and last layer keep all terms of int8. "
        f"Device: {results['device']}.",
        f"Float after these steps: **{_top1(float_row)} %**. Int8: {_top1(int8_row)} %.",
        "## Methods at equal terms per weight",
        "*Points below float* compares equal seeds. *Energy saving* is the int8 bit-parallel "
        "array's computational energy over the group PE's, same network, "
        f"{results['array']}, {results['technology']}; memory is apart, and the same for all. "
        "*Terms held* are those of the trained integers, at most the budget.",
        _methods(methods[methods["terms"].notna()]),
        "![Top-1 over computational energy saving](images/results_pareto.png)",
    ]
    ours = methods[(methods["method"] == "STP") & (methods["terms"] == config["ablation"])]
    if len(changed) and len(ours):
        reference = next(
            row
            for row in results["rows"]
            if row["method"] == "STP" and row["terms"] == config["ablation"] and row["seed"] == 0
        )
        text += [
            f"## What each part is worth, at {config['ablation']:g} terms per weight",
            "One seed; differences below half a point are within the noise of a seed.",
            _ablation(changed, reference),
        ]
    text += [
        "## Budgets by layer",
        "Terms per group that the allocator gives each layer, by terms per weight:",
        _budgets(results),
    ]
    if results["missing"]:
        count = len(results["missing"])
        text += [f"{count} of {count + len(results['rows'])} runs of the comparison were not made."]
    text += [f"Versions: {versions}."]
    return "\n\n".join(text) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The accuracy–energy front of every method as a PNG."""
    table = summary(results)
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, rows in table[table["terms"].notna()].groupby("method", sort=False):
        rows = rows.sort_values("saving")
        axes.errorbar(
            rows["saving"], rows["top1"], yerr=rows["spread"].fillna(0), marker="o", label=method
        )
    baseline = float(table.loc[table["method"] == "float", "top1"].iloc[0])
    axes.axhline(baseline, color="gray", linestyle="--", label="float")
    lowest = table.loc[~table["method"].str.contains("not retrained"), "top1"].min()
    axes.set_ylim(lowest - 1, baseline + 1)
    axes.set(
        xlabel="computational energy saving over int8 bit-parallel (×)",
        ylabel="top-1 accuracy (%)",
        title=f"{results['model']}, {results['technology']}",
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> int:
    """Writes the page from a run's folder, or again from the stored results."""
    if arguments:
        source = Path(arguments[0]) / "results.json"
        if not source.is_file():
            print(f"error: {source} does not exist; run --exp=compare_methods first")
            return 2
        DATA.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, DATA)
    results = json.loads(DATA.read_text())
    (DOCS / "results.md").write_text(page(results))
    plot(results, DOCS / "images" / "results_pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
