"""The page of results on ImageNet images, written from that experiment's ``results.json``.

    python -m experiments.imagenet_page runs/stp_efficientnet_lite0_imagenet

copies the results to ``docs/results`` and writes ``docs/imagenet.md`` from what lies there; without
a folder it writes the page again. Results that lie there stay, for points that the run did not
measure, if nothing but the points differs. No number on the page is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stp_jax.export.card import table as markdown_table

DOCS = Path(__file__).parents[1] / "docs"
EXPERIMENT = "stp_efficientnet_lite0_imagenet"
DATA = DOCS / "results" / f"{EXPERIMENT}.json"
PAGE = DOCS / "imagenet.md"
COMMAND = "python -m experiments.imagenet_page"
GREEDY = "term revealing"
FITTED = "reconstructed"

# Kung, McDanel and Zhang, "Term Quantization" (SC20): top-1 in percent on ImageNet's validation set
# after training only the float network, by terms per weight.
PUBLISHED = {
    "ResNet-18": (69.76, {2.0: 69.59, 1.5: 69.50, 1.25: 69.00, 1.0: 67.92}),
    "MobileNetV2": (71.88, {3.0: 71.40, 2.0: 70.83}),
}


def _difference(found: Mapping[str, Any]) -> str:
    return f"{found['points']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def _points(results: Mapping[str, Any]) -> list[float]:
    return sorted({row["terms"] for row in results["rows"]}, reverse=True)


def _ways(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in results["rows"]))


def _by_point(results: Mapping[str, Any], images: str, against: str) -> str:
    """A row for each way: its difference at every point."""
    found = {(row["way"], row["terms"]): row for row in results["rows"]}
    points = _points(results)
    rows = [
        [way, *(_difference(found[way, t][images][against]) for t in points)]
        for way in _ways(results)
    ]
    return markdown_table(["points, by terms per weight", *(f"{t:g}" for t in points)], rows)


def _losses(results: Mapping[str, Any]) -> str:
    """Points lost to int8, over the best of term revealing's."""
    gained = {(row["way"], row["terms"]): row["all"]["minus_int8"] for row in results["rows"]}
    ways = [way for way in _ways(results) if not way.startswith(GREEDY)]
    rivals = [way for way in _ways(results) if way.startswith(GREEDY)]
    rows = []
    for way in ways:
        cells = []
        for t in _points(results):
            rival = max((gained[name, t] for name in rivals), key=lambda gain: gain["points"])
            lost = max(0.0, -gained[way, t]["points"])
            cells.append("–" if rival["high"] >= 0 else f"{lost / -rival['points']:.2f}")
        rows.append([way, *cells])
    return markdown_table(["share of the loss", *(f"{t:g}" for t in _points(results))], rows)


def _layers(results: Mapping[str, Any]) -> str:
    found = {row["terms"]: row["layers"] for row in results["rows"] if row["way"] == FITTED}
    points = [t for t in _points(results) if found.get(t)]
    paths = found[points[0]] if points else {}
    rows = [[path, *(f"{100 * found[t][path]:.2f}" for t in points)] for path in paths]
    return markdown_table(["layer", *(f"{t:g}" for t in points)], rows)


def _published() -> str:
    rows = []
    for network, (whole, top1) in PUBLISHED.items():
        cells = ", ".join(f"{value - whole:+.2f} at {t:g}" for t, value in top1.items())
        rows.append([network, f"{whole:.2f}", cells])
    return markdown_table(["network", "float, %", "points, at terms per weight"], rows)


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown, from what the experiment wrote."""
    config = results["config"]
    number = len(results["calibrated_on"])
    rest = results["reference"]["float"]
    seconds = [row["seconds"] for row in results["rows"] if row["way"] == FITTED]
    text = [
        "# Results without training, on ImageNet images",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        f"{results['model']} with the weights `{results['weights']}`, on {results['dataset']}. "
        "Whether the network was trained on these images is not known, so absolute accuracies say "
        "nothing and only paired differences on the same images count. "
        f"{number} of them, drawn at random with seed {config['seed']}, calibrate input scales and "
        "are what compensation and reconstruction see, without their labels. No network was "
        "trained or fine-tuned.",
        f"Top-1 of float is {rest['all']:.1f} % on all images and {rest['not calibrated on']:.1f} "
        "% on those not calibrated on; int8 minus float is "
        f"{_difference(results['int8_minus_float']['all'])} and "
        f"{_difference(results['int8_minus_float']['not calibrated on'])} points. In brackets: 95 "
        "% bootstrap intervals over the images. Groups hold "
        f"{config['group_size']} weights; terms per weight are the mean over the layers with "
        "budgets, while stem, depthwise convolutions and classifier keep every term of int8.",
        "## Differences from int8, all images",
        _by_point(results, "all", "minus_int8"),
        "## Differences from int8, images not calibrated on",
        _by_point(results, "not calibrated on", "minus_int8"),
        "## Differences from float, all images",
        _by_point(results, "all", "minus_float"),
        "## Share of term revealing's loss",
        "Points lost to int8 over those that term revealing loses, with or without its scales "
        "searched, whichever loses less (all images; – where its loss is within noise). It sees "
        "the calibration images for input scales only:",
        _losses(results),
        "*Term revealing* is the greedy truncation of int8 weights in the encoding `hese`, as "
        "published. Its authors report, after training in float only:",
        _published(),
        "(Kung, McDanel and Zhang, SC20; another network and other images, so a mark and not a "
        "comparison.)",
        "## Loss by layer",
        "Squared error of each layer's outputs over their variance in the float model, in percent, "
        f"on the calibration images, by terms per weight (`{FITTED}`). Inputs are those of the "
        "projected model, so what earlier layers lost is part of it.",
        _layers(results),
        f"Reconstructing took {min(seconds):.0f} to {max(seconds):.0f} s, evaluation included, on "
        f"{results['device']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        f"```bash\npython -m experiments.run --exp={EXPERIMENT} --set data_dir=IMAGES\n```",
    ]
    return "\n\n".join(text) + "\n"


def merged(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new results, with the stored rows of other points if nothing but the points differs."""

    def rest(results: Mapping[str, Any]) -> dict[str, Any]:
        config = {k: v for k, v in results["config"].items() if k != "points"}
        return {k: v for k, v in results.items() if k != "rows"} | {"config": config}

    if not stored or rest(stored) != rest(new):
        return dict(new)
    measured = _points(new)
    points = sorted({*_points(stored), *measured}, reverse=True)
    rows = [*new["rows"], *(row for row in stored["rows"] if row["terms"] not in measured)]
    rows.sort(key=lambda row: -row["terms"])
    return {**new, "rows": rows, "config": {**new["config"], "points": points}}


def main(arguments: list[str]) -> int:
    """Writes the page from a run's folder, or again from the stored results."""
    if arguments:
        source = Path(arguments[0]) / "results.json"
        results = json.loads(source.read_text()) if source.is_file() else {}
        if results.get("experiment") != EXPERIMENT:
            print(f"error: {source} is not the result of --exp={EXPERIMENT}")
            return 2
        for key in ("data_dir", "weights"):  # names in the place of that machine's paths
            if results["config"][key]:
                results["config"][key] = Path(results["config"][key]).name
        DATA.parent.mkdir(exist_ok=True)
        results = merged(json.loads(DATA.read_text()) if DATA.exists() else {}, results)
        DATA.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if not DATA.exists():
        print(f"error: there are no results of --exp={EXPERIMENT} yet; name that run's folder")
        return 2
    PAGE.write_text(page(json.loads(DATA.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
