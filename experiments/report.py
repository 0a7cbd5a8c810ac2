"""The report of a run: accelerator figures, the packed model, plots, and `results.json`.

``python -m experiments.report DIR`` prints a finished run again; with several folders, side by
side, and what differs in their configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import pandas as pd
from rich.console import Console

import stp_jax
from experiments.config import Config, ConfigError
from experiments.context import Context
from experiments.load import read_record
from experiments.runtime.log import write_json
from experiments.stages import Outcome, plain
from stp_jax import export, hwmodel
from stp_jax.export.card import table
from stp_jax.hwmodel import gates
from stp_jax.hwmodel.technology import MissingEntryError
from stp_jax.hwmodel.term_histogram import lookup
from stp_jax.quant.calibration import mean_terms

_STRONG_LANES = 4  # terms a cycle of the strongest group PE that the table by gates has
_STRONG_INT8 = hwmodel.DotProduct(lanes=8)  # the int8 PE of its throughput class
# Where results hold savings by gates, and what tables say of the PEs.
_GATES = {"by_gates": "", "by_gates_strongest": ", strongest PEs of a class"}
_PACKAGES = ("stp-jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain")


def _terms(outcome: Outcome) -> dict[str, Any]:
    """Terms per weight that the integer weights really hold, by layer and over those with k."""
    terms = stp_jax.weight_terms(outcome.model)
    return {
        "budgeted_layers": mean_terms(terms, outcome.budgets),
        "all_layers": mean_terms(terms, terms),
        "by_layer": {path: float(counts.mean()) for path, counts in terms.items()},
    }


def _hardware_results(report: hwmodel.Report) -> dict[str, Any]:
    return {
        "cycles": int(report.total_cycles),
        "cycles_by_layer": dict(
            zip(report.network.names, map(int, np.asarray(report.cycles)), strict=True)
        ),
        "energy_uj": {k: float(np.sum(v)) * 1e-6 for k, v in report.energy_pj.items()},
    }


def _by_gates(
    evaluate: Callable[..., stp_jax.ModelCost], lanes: int, int8: hwmodel.PE
) -> dict[str, Any] | None:
    """Savings and array energies by gates; None for group PEs that were not measured."""
    technology = hwmodel.NANGATE_45NM_GATES
    try:
        cost = evaluate(technology=technology, lanes=lanes, baseline=int8)
    except MissingEntryError:
        return None
    arrays = {"int8": cost.baseline, "group_pe": cost.report}
    return {
        "technology": technology.name,
        "int8_pe": str(int8),
        "terms_a_cycle": lanes,
        "array_uj": {key: float(np.sum(r.energy_pj["array"])) * 1e-6 for key, r in arrays.items()},
        "encoder_uj": float(np.sum(cost.report.energy_pj["encoder"])) * 1e-6,
        "cycles": {key: int(r.total_cycles) for key, r in arrays.items()},
        "saving": cost.saving,
        "saving_with_encoder": cost.saving_with_encoder,
    }


def layers_by_gates(cost: stp_jax.ModelCost, model: Any, config: Config) -> dict[str, Any]:
    """Array energies of the layers with budgets alone, on every measured PE that can run them.

    The others, in most models the first and the last layer, keep all terms or eight bits whatever
    the method, and need other PEs than the narrowest.
    """
    technology = hwmodel.NANGATE_45NM_GATES
    budgeted = (layer for layer in cost.network if lookup(cost.budgets, layer) is not None)
    network = hwmodel.Network(tuple(budgeted))
    weights = {name: cost.weights[name] for name in cost.budgets}
    array = hwmodel.Array(rows=config.rows, cols=config.cols)

    def energies(pe: hwmodel.PE, **operands: Any) -> tuple[float, float]:
        report = hwmodel.evaluate(
            network,
            dataclasses.replace(array, pe=pe),
            technology=technology,
            **operands,
        )
        kinds = ("array", "encoder")
        pj, encoder = (float(np.sum(report.energy_pj[kind])) for kind in kinds)
        return pj * 1e-6, encoder * 1e-6

    # As terms, weights of b bits reach 2**(b - 1), one more than two's complement holds.
    largest = max(int(np.maximum(w, ~w).max(initial=0)) for w in weights.values())
    held = (bits for bits in gates.NARROW_WEIGHTS if largest < 1 << (bits - 1))
    narrow = hwmodel.DotProduct(weight_bits=min(held, default=gates.BITS))
    pes: dict[str, tuple[hwmodel.PE, dict[str, Any]]] = {
        "dot_product": (narrow, {"weights": weights})
    }
    bits = min(bits for bits in gates.GROUP_BITS if bits >= config.weight_bits)
    group_pe = dataclasses.replace(stp_jax.group_pe(model), bits=bits)
    work = {
        "budgets": cost.budgets,
        "weights": hwmodel.measure_terms(network, weights, group_pe),
    }
    for lanes in (2, 4):
        pes[f"group_pe_of_{lanes}_lanes"] = dataclasses.replace(group_pe, lanes=lanes), work
    int8, _ = energies(_STRONG_INT8)
    found = {}
    for name, (chosen, operands) in pes.items():
        try:
            uj, encoder = energies(chosen, **operands)
        except MissingEntryError:  # groups of another size
            continue
        found[name] = {
            "pe": str(chosen),
            "array_uj": uj,
            "encoder_uj": encoder,
            "saving": int8 / uj,
            "saving_with_encoder": int8 / (uj + encoder),
        }
    return {
        "technology": technology.name,
        "int8_pe": str(_STRONG_INT8),
        "int8_uj": int8,
        "pes": found,
    }


def write_results(context: Context, outcome: Outcome, name: str) -> dict[str, Any]:
    """Writes `results.json`, `model.safetensors` and plots; returns what the first one holds."""
    config = context.config
    evaluate = functools.partial(
        stp_jax.evaluate_model,
        outcome.model,
        context.dataset.example_input(),
        rows=config.rows,
        cols=config.cols,
        activation_sram=config.activation_sram,
        name=config.model,
    )
    cost = evaluate()
    results = {
        "experiment": name,
        "dataset": context.dataset.description,
        "model": config.model,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "machine": platform.platform(),
        "seed": config.seed,
        "top1_percent": outcome.test or None,
        "validation_top1_percent": outcome.validation or None,
        "examples": {
            split: len(getattr(context.dataset, split)) for split in ("train", "validation", "test")
        },
        "terms_per_weight": _terms(outcome),
        # Terms per group; where each filter has its own, their mean, and below them all.
        "budgets": {
            path: budget if isinstance(budget, int) else float(np.mean(budget))
            for path, budget in outcome.budgets.items()
        },
        "budgets_by_filter": {
            path: plain(budget)
            for path, budget in outcome.budgets.items()
            if not isinstance(budget, int)
        }
        or None,
        "bytes": export.packed_sizes(outcome.model).total._asdict(),
        "accelerator": {
            "array": f"{config.rows}×{config.cols}, input-stationary",
            "technology": f"{hwmodel.HOROWITZ_45NM.node_nm:g} nm",
            "int8_bit_parallel": _hardware_results(cost.baseline),
            "group_pe": _hardware_results(cost.report),
        },
        # The simple PEs of the package's Verilog; then the strongest pair that was measured.
        "by_gates": _by_gates(evaluate, 1, hwmodel.BitParallel()),
        "by_gates_strongest": _by_gates(evaluate, _STRONG_LANES, _STRONG_INT8),
        "budgeted_layers_by_gates": layers_by_gates(cost, outcome.model, config),
        # By the table of arithmetic energies.
        "computational_energy_saving": cost.saving,
        "computational_energy_saving_with_encoder": cost.saving_with_encoder,
        "config": dataclasses.asdict(config),
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES}
        | {"python": platform.python_version()},
    }
    export.save_packed(outcome.model, context.workdir / "model.safetensors")
    (context.workdir / "model_card.md").write_text(_card(outcome.model, results))
    write_json(context.workdir / "results.json", results)
    _plot(context.workdir / "plots", results)
    _print(context.console, results, cost.report)
    return results


def best_pe_in_layers(results: Mapping[str, Any], *, on_group_pes: bool) -> dict[str, Any] | None:
    """The PE that takes least in the layers with budgets, of group PEs or of dot products.

    None where none was measured, or results are of a version that did not ask.
    """
    pes = results.get("budgeted_layers_by_gates", {}).get("pes", {})
    able = [pe for name, pe in pes.items() if name.startswith("group_pe") == on_group_pes]
    return max(able, key=lambda pe: pe["saving"], default=None)


def _savings(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Computational energy savings, without and with the encoders, by how they were priced."""
    found = {
        f"{priced['technology']}{which}": (priced["saving"], priced["saving_with_encoder"])
        for key, which in _GATES.items()
        if (priced := results.get(key)) is not None
    }
    if best := best_pe_in_layers(results, on_group_pes=True):
        technology = results["budgeted_layers_by_gates"]["technology"]
        savings = (best["saving"], best["saving_with_encoder"])
        found[f"{technology}, layers with budgets alone"] = savings
    table = f"{results['accelerator']['technology']} by the table"
    keys = ("computational_energy_saving", "computational_energy_saving_with_encoder")
    return found | {table: (results[keys[0]], results[keys[1]])}


def _accuracies(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Top-1 by stage of each split that was evaluated, in percent."""
    found = {"validation": "validation_top1_percent", "test": "top1_percent"}
    return {split: results[key] for split, key in found.items() if results[key]}


def _card(model: Any, results: dict[str, Any]) -> str:
    """The card of the retrained model: its data, accuracy, cost and limits."""
    accuracies, examples = _accuracies(results), results["examples"]
    stages = list(next(iter(accuracies.values()), {}))
    top1 = table(
        ("top-1, %", *stages),
        (
            [f"{split} ({examples[split]})", *(f"{top1[s]:.2f}" for s in stages)]
            for split, top1 in accuracies.items()
        ),
    )
    savings = table(
        ("energies", "saving", "with encoders"),
        ([basis, *(f"{x:.2f}×" for x in pair)] for basis, pair in _savings(results).items()),
    )
    return export.model_card(
        model,
        name=f"{results['model']}, {results['experiment']}",
        sections={
            "Data": f"{results['dataset']}.",
            "Accuracy": f"By stage of the run, with the number of examples.\n\n{top1}",
            "Accelerator": "Array energy of int8 multiply-accumulate PEs over that of group PEs, "
            f"{results['accelerator']['array']}.\n\n{savings}",
            "Limits": "Accuracy holds for data like those above. The license of the data and of "
            "weights that training started from applies.",
        },
    )


def _print(console: Console, results: dict[str, Any], ours: hwmodel.Report) -> None:
    terms = results["terms_per_weight"]
    console.print(f"\n{results['dataset']}; {results['device']}", highlight=False)
    console.print(ours.table(), highlight=False, soft_wrap=True)
    accuracies = pd.DataFrame(_accuracies(results)).T.rename_axis(columns="top-1, %")
    console.print(
        f"\n{accuracies.to_string(float_format='{:.2f}'.format, line_width=80)}"
        f"\n\nterms per weight: {terms['budgeted_layers']:.3f} over the layers with budgets, "
        f"{terms['all_layers']:.3f} over all"
        + "\nkB: "
        + ", ".join(f"{form} {size / 1e3:.1f}" for form, size in results["bytes"].items())
        + "\ncomputational energy saving over the int8 bit-parallel array:"
        + "".join(
            f"\n  {basis}: {saving:.2f}× ({with_encoder:.2f}× with the encoders)"
            for basis, (saving, with_encoder) in _savings(results).items()
        ),
        highlight=False,
        soft_wrap=True,
    )


def _figure() -> tuple[matplotlib.figure.Figure, Any]:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _plot(folder: Path, results: dict[str, Any]) -> None:
    """Accuracy by stage, terms per layer, energy by component; one PNG each."""
    folder.mkdir(exist_ok=True)

    figure, axes = _figure()
    accuracies = _accuracies(results)
    width, lowest = 0.8 / len(accuracies), 100.0
    for i, (split, top1) in enumerate(accuracies.items()):
        bars = axes.bar(np.arange(len(top1)) + i * width, list(top1.values()), width, label=split)
        axes.bar_label(bars, fmt="%.1f", fontsize="small")
        axes.set_xticks(np.arange(len(top1)) + width / 2 * (len(accuracies) - 1), list(top1))
        lowest = min(lowest, *top1.values())
    axes.set(ylabel="top-1 accuracy (%)", title=results["dataset"])
    axes.title.set_fontsize("small")
    axes.legend(loc="lower left")
    axes.set_ylim(max(0, lowest - 5), 101)
    figure.savefig(folder / "accuracy_by_stage.png", dpi=150)

    figure, axes = _figure()
    by_layer = results["terms_per_weight"]["by_layer"]
    group_size = results["config"]["group_size"]
    axes.bar(list(by_layer), list(by_layer.values()), label="held by the weights")
    budgets = results["budgets"]
    axes.plot(
        list(budgets), [k / group_size for k in budgets.values()], "k_", ms=12, label="budget"
    )
    axes.set(ylabel="terms per weight", title=f"{results['model']}: terms by layer")
    axes.tick_params(axis="x", rotation=90)
    axes.legend()
    figure.savefig(folder / "terms_by_layer.png", dpi=150)

    figure, axes = _figure()
    arrays = {"int8 bit-parallel": "int8_bit_parallel", "group PE": "group_pe"}
    bottom = np.zeros(len(arrays))
    energies = [results["accelerator"][key]["energy_uj"] for key in arrays.values()]
    for component in energies[0]:
        heights = np.array([energy[component] for energy in energies])
        axes.bar(list(arrays), heights, bottom=bottom, label=component)
        bottom += heights
    axes.set(
        ylabel="energy per image (µJ)",
        title=f"{results['model']}, {results['accelerator']['technology']}",
    )
    axes.legend()
    figure.savefig(folder / "energy_by_component.png", dpi=150)


# --- Finished runs --------------------------------------------------------------------------------


def comparison_table(runs: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The main figures of several runs side by side, a column each.

    Args:
      runs: name → what the run's `results.json` holds.
    """
    return pd.DataFrame({name: _figures(results) for name, results in runs.items()}).fillna("")


def _figures(results: dict[str, Any]) -> dict[str, str]:
    figures = {"model": results["model"], "seed": str(results["seed"])}
    for split, top1 in _accuracies(results).items():
        figures |= {f"{split} {stage}, %": f"{value:.2f}" for stage, value in top1.items()}
    terms, array = results["terms_per_weight"], results["accelerator"]["group_pe"]
    return (
        figures
        | {
            "terms per weight": f"{terms['budgeted_layers']:.3f}",
            "cycles": f"{array['cycles']:,}",
            "array energy, µJ": f"{array['energy_uj']['array']:.3f}",
        }
        | {
            f"saving, {basis}": f"{saving:.2f}× ({with_encoder:.2f}×)"
            for basis, (saving, with_encoder) in _savings(results).items()
        }
    )


def differing_keys(runs: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Keys of the configurations that are not the same in all runs, a column for each run."""
    configs = {name: results["config"] for name, results in runs.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = {key: [config.get(key, "not there") for config in configs.values()] for key in keys}
    different = {k: list(map(str, v)) for k, v in rows.items() if any(x != v[0] for x in v)}
    return pd.DataFrame.from_dict(different, orient="index", columns=list(configs))


def _read(folder: str) -> dict[str, Any]:
    path = Path(folder) / "results.json"
    try:
        results = read_record(path)
    except OSError as error:
        raise ConfigError(f"{folder} holds no finished run: {path}: {error.strerror}") from error
    if "terms_per_weight" not in results:
        raise ConfigError(f"{folder} holds results of {results.get('experiment')}, no training run")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a finished run again, or several side by side; 2 if a folder holds none."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=(main.__doc__ or "").partition(";")[0]
    )
    parser.add_argument("folder", nargs="+", help="work folders of finished training runs")
    folders = parser.parse_args(arguments).folder
    try:
        runs = {folder: _read(folder) for folder in dict.fromkeys(folders)}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for results in {r["dataset"]: r for r in runs.values()}.values():
        print(f"{results['dataset']}; {results['device']}")
    print(comparison_table(runs).to_string())
    if len(runs) > 1:
        different = differing_keys(runs)
        print("\nconfigurations: " + (f"\n{different.to_string()}" if len(different) else "equal"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
