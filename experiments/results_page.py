"""The documentation's results page, written from the comparisons' `results.json`.

    python -m experiments.results_page runs/compare_methods runs/compare_projections

copies the results of the runs to ``docs/results/EXPERIMENT.json``, without the paths of the machine
they ran on, and writes ``docs/results.md`` and its plot from what lies there. No number on the page
is typed by hand; a test writes it again and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import pandas as pd

from experiments.comparison import summary

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "results" / "compare_methods.json"
PROJECTIONS = DATA.with_name("compare_projections.json")
COMMAND = "python -m experiments.results_page"


def _number(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def _top1(row: Mapping[str, Any]) -> str:
    spread = "" if pd.isna(row["spread"]) else f" ± {row['spread']:.2f}"
    return f"{row['top1']:.2f}{spread} ({int(row['seeds'])})"


def _portable(results: Mapping[str, Any]) -> str:
    """The results as JSON, with files' names in the place of their paths on that machine."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    for key in ("data_dir", "init_from"):
        path = results["config"][key]
        if path:
            text = text.replace(path, Path(path).name)
    return text


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


def _projections(study: Mapping[str, Any]) -> list[str]:
    points = list(next(iter(study["top1"].values())))
    rows = [
        [way, *(f"{top1[point]:.2f}" for point in points)] for way, top1 in study["top1"].items()
    ]
    reference = study["reference"]
    return [
        "## Before any retraining",
        f"What each way of projecting {study['model']} leaves of float's "
        f"{reference['float']:.2f} % and int8's {reference['int8']:.2f} % (top-1, %, by terms per "
        f"weight, the same in every layer) on {study['dataset']}:",
        _table(["projection", *points], rows),
    ]


def _caveats(base: Mapping[str, Any]) -> list[str]:
    """What the reader of older results must know."""
    if "stages" in base or base["data"] != "folder":
        return []
    return [
        "!!! warning",
        "    These runs calibrated on the first training examples of a folder in the order of its "
        "classes: images of one class. Input scales, allocated budgets, compensation and bias "
        "correction rest on them. Runs draw these examples at random now; these were not "
        "repeated yet. Settings were tried on the test images, and only STP learned from soft "
        "labels: with soft labels for all, uniform budgets are within half a point of STP's.",
    ]


def page(results: Mapping[str, Any], study: Mapping[str, Any] | None = None) -> str:
    """The page in Markdown.

    Args:
      results: what `experiments.comparison.gather` wrote.
      study: what the experiment ``compare_projections`` wrote, if it was run.
    """
    config, base = results["comparison"], results["config"]
    methods, changed = summary(results), summary(results, ablation=True)
    plain = methods[methods["terms"].isna()].set_index("method")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    start = results["start"]
    float_row, int8_row = plain.loc["float"], plain.loc["int8"]
    text = [
        "# Results",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        f"{results['model']} on {results['dataset']}. One float model is the start of every row: "
        f"{base['float_epochs']:g} epoch(s) from "
        + (f"`{Path(base['init_from']).name}`" if base["init_from"] else "random weights")
        + f", {start['float']:.2f} % in float and {start['int8']:.2f} % in int8. From there every "
        f"method, the float baseline included, trains {config['steps']} steps of "
        f"{config['batch_size']} images; only seeds and methods differ. All but STP learn from the "
        "labels alone, as their papers do; STP also from the float model's soft labels. Groups "
        f"hold {base['group_size']} weights; first and last layer keep all terms of int8. "
        f"Device: {results['device']}.",
        *_caveats(base),
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
    text += _projections(study) if study else []
    if results["missing"]:
        count = len(results["missing"])
        text += [f"{count} of {count + len(results['rows'])} runs of the comparison were not made."]
    text += [f"Versions: {versions}."]
    return "\n\n".join(text) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The accuracy–energy front of every method as a PNG."""
    table = summary(results)
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
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
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def stored_study() -> Any:
    """The stored results of ``compare_projections``; None if there are none."""
    return json.loads(PROJECTIONS.read_text()) if PROJECTIONS.exists() else None


def main(arguments: list[str]) -> int:
    """Writes the page from runs' folders, or again from the stored results."""
    for argument in arguments:
        source = Path(argument) / "results.json"
        results = json.loads(source.read_text()) if source.is_file() else {}
        if results.get("experiment") not in (DATA.stem, PROJECTIONS.stem):
            print(f"error: {source} is not the result of --exp={DATA.stem} or {PROJECTIONS.stem}")
            return 2
        DATA.parent.mkdir(exist_ok=True)
        DATA.with_stem(results["experiment"]).write_text(_portable(results))
    if not DATA.exists():
        print(f"error: there are no results of --exp={DATA.stem} yet; name that run's folder")
        return 2
    results = json.loads(DATA.read_text())
    (DOCS / "results.md").write_text(page(results, stored_study()))
    plot(results, DOCS / "images" / "results_pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
