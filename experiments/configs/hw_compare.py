"""All processing elements on ResNet-18 at 224×224, beside the claims of their papers.

One input-stationary 32×32 array and one memory system; only the PE differs. Computational energy
comes first by gates, for the PEs whose netlists were measured, then by the 45 nm table for all.
The group PE and term revealing's tMAC run weights projected onto the budget (first and last layer
keep every term), every other PE runs them as they are, but PEs for narrower weights, which run all
layers in 4, 3 or 2 bits (by gates alone, and where arrays are not matched):

    python -m experiments.run --exp=hw_compare --set by=area

Weights are He-initialised or come from a PyTorch checkpoint (``--set init_from=resnet18.pth``);
activations are what the network computes for one image of noise. The output says which.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pandas as pd
from flax import nnx
from rich.console import Console

import stp_jax
from experiments.config import ConfigError, check_choices
from experiments.runtime.log import write_json
from stp_jax import hwmodel, models
from stp_jax.hwmodel import gates
from stp_jax.terms import max_budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Settings of the comparison."""

    by: Literal["area", "throughput"] | None = None  # what arrays are matched in; None: PE count
    budget: int = 8  # terms in a group of 8 weights
    image_size: int = 224
    activation_sram: int = 0  # bytes of a buffer for outputs until their last reader; 0: none
    activation_bits: int = 8  # of inputs and outputs in DRAM and buffers
    partial_sum_bits: int = 32  # in DRAM and buffers
    init_from: str | None = None  # PyTorch weights of torchvision's ResNet-18
    seed: int = 0

    def __post_init__(self) -> None:  # noqa: D105
        check_choices(self)
        if not 1 <= self.budget <= 32:
            raise ConfigError(f"budget must be from 1 to 32, got {self.budget}")
        if self.image_size < 32:
            raise ConfigError(f"image_size must be 32 or more, got {self.image_size}")
        if not 0 <= self.activation_sram < 2**53:
            raise ConfigError(
                f"activation_sram must be from 0 to below 2**53, got {self.activation_sram}"
            )
        for key in ("activation_bits", "partial_sum_bits"):
            if not 1 <= (bits := getattr(self, key)) <= 64:
                raise ConfigError(f"{key} must be from 1 to 64, got {bits}")
        if self.init_from is not None and not Path(self.init_from).expanduser().is_file():
            raise ConfigError(f"init_from must be an existing file, got {self.init_from!r}")


CONFIG = HardwareConfig()

# Headlines of the papers' abstracts; Laconic's is its preprint's (arXiv 1805.04513).
CLAIMS = {
    "Stripes": "1.92× its baseline's speed on average, 57 % more efficient, 32 % more area "
    "(Judd et al., MICRO 2016)",
    "BitPragmatic": "2.6× DaDianNao's speed, 28 % more efficient (Albericio et al., MICRO 2017)",
    "Laconic": "15.4× speed, 1.95× efficiency, with 1K wires to weights against 2K "
    "(Sharify et al., preprint arXiv 1805.04513, 2018)",
    "Bitlet": "up to 15× speed, 8× efficiency of fixed-point accelerators (Lu et al., MICRO 2021)",
    "BitWave": "up to 13.25× speed, 7.71× efficiency of sparse designs (Shi et al., HPCA 2024)",
    "BitVert": "up to 3.03× speed, 2.44× less energy (Chen et al., MICRO 2024)",
    "TermMac": "3 to 10× fewer term operations than quantisation (Kung et al., SC20)",
    "GroupPE": "2.35× less computational energy, ResNet-18 (Huang et al., IEEE TCAD 42(1), 2023)",
}

WHY_CLAIMS_DIFFER = (
    "The claims differ from these figures because the papers compare whole accelerators, with "
    "their own array, buffers and synchronisation, at their own node (65 nm for Pragmatic, 28 nm "
    "for Bitlet, 16 nm for BitWave), against baselines of 16 or 8 bits, on their own networks, "
    "with synthesised energies. Here one array, one memory and, each by itself, one table by gates "
    "and one of arithmetic serve all."
)


def _float_model(config: HardwareConfig) -> Any:
    """The network with its weights in float."""
    model: Any = models.create("resnet18", num_classes=1000, rngs=nnx.Rngs(config.seed))
    if config.init_from is not None:
        try:
            models.load_torch(model, Path(config.init_from).expanduser())
        except ValueError as error:
            raise ConfigError(f"init_from={config.init_from}: {error}") from error
    model.eval()
    return model


def _workload(config: HardwareConfig, float_model: Any) -> tuple[Any, hwmodel.Network, Any, Any]:
    """The projected model, its network, its weights before in int8, and its int8 activations."""
    shape = (1, config.image_size, config.image_size, 3)
    image = jax.random.normal(jax.random.key(config.seed), shape, jnp.float32)
    rules = [
        stp_jax.Rule(path="conv1|fc", weight_scale="max"),
        stp_jax.Rule(path=".*", budget=32, weight_scale="max"),
    ]
    model = stp_jax.quantize(float_model, stp_jax.Policy(rules))
    stp_jax.calibrate(model, [image])
    network = hwmodel.trace(model, image, name="ResNet-18")
    activations = hwmodel.record_activations(model, image)
    weights = stp_jax.integer_weights(model)
    stp_jax.set_budgets(model, dict.fromkeys(stp_jax.budgets(model), config.budget))
    return model, network, weights, activations


def _array(config: HardwareConfig, pe: hwmodel.PE) -> hwmodel.Array:
    stored = hwmodel.Widths(
        inputs=config.activation_bits,
        outputs=config.activation_bits,
        partial_sums=config.partial_sum_bits,
    )
    return hwmodel.Array(
        rows=32,
        cols=32,
        pe=pe,
        activation_sram=config.activation_sram,
        dram_bits=stored,
        sram_bits=stored,
    )


def _designs(config: HardwareConfig, model: Any, weights, activations) -> dict[str, Any]:
    array = functools.partial(_array, config)

    int8_pes: dict[str, hwmodel.PE] = {
        "BitParallel": hwmodel.BitParallel(bits=8),
        "DotProduct of 1": hwmodel.DotProduct(lanes=1),
        "DotProduct of 8": hwmodel.DotProduct(lanes=8),
        "Stripes": hwmodel.Stripes(),
        "Stripes, serial weights": hwmodel.Stripes(lanes=8, serial="weights"),
        "BitPragmatic": hwmodel.BitPragmatic(),
        "BitPragmatic, serial weights": hwmodel.BitPragmatic(lanes=8, serial="weights"),
        "Laconic": hwmodel.Laconic(),
        "Bitlet": hwmodel.Bitlet(),
        "BitWave": hwmodel.BitWave(),
        "BitVert": hwmodel.BitVert(lanes=8),
    }
    designs = {
        name: hwmodel.Design(array=array(pe), weights=weights, activations=activations)
        for name, pe in int8_pes.items()
    }
    group_pe, pruned = stp_jax.group_pe(model), stp_jax.integer_weights(model)
    term_pes = {
        "TermMac": hwmodel.TermMac(group_size=group_pe.group_size, grouping=group_pe.grouping),
        "GroupPE": group_pe,
        "GroupPE packed": stp_jax.group_pe(model, packed=True),
        "GroupPE of 2 lanes": dataclasses.replace(group_pe, lanes=2),
        "GroupPE of 4 lanes": dataclasses.replace(group_pe, lanes=4),
    }
    for name, term_pe in term_pes.items():
        designs[name] = hwmodel.Design(
            array=array(term_pe),
            budgets=stp_jax.budgets(model),
            weights=pruned,
            activations=activations,
        )
    return designs


def _narrow_designs(config: HardwareConfig, float_model: Any, activations: Any) -> dict[str, Any]:
    """PEs for weights of few bits in all layers, the first and the last as well."""

    def quantized(bits: int, budget: int | None) -> Any:
        inner = stp_jax.Rule(path=".*", bits=bits, budget=budget, weight_scale="search")
        outer = dataclasses.replace(inner, path="conv1|fc", budget=None)
        return stp_jax.quantize(float_model, stp_jax.Policy([outer, inner]))

    designs = {}
    for bits in gates.NARROW_WEIGHTS:
        designs[f"DotProduct of 8, int{bits}"] = hwmodel.Design(
            array=_array(config, hwmodel.DotProduct(lanes=8, weight_bits=bits)),
            weights=stp_jax.integer_weights(quantized(bits, None)),
            activations=activations,
        )
    for bits in gates.GROUP_BITS[1:]:
        if config.budget > max_budget(8, bits=bits):
            continue
        model = quantized(bits, config.budget)
        weights = stp_jax.integer_weights(model)
        for lanes in (2, 4):
            designs[f"GroupPE of {lanes} lanes, {bits} bits"] = hwmodel.Design(
                array=_array(config, stp_jax.group_pe(model, lanes=lanes)),
                budgets=stp_jax.budgets(model),
                weights=weights,
                activations=activations,
            )
    return designs


def _gates_table(network: hwmodel.Network, designs: dict[str, Any], inner: Any) -> pd.DataFrame:
    """The comparison by gates, of all layers and of the inner ones alone."""
    layers = hwmodel.Network(tuple(layer for layer in network if layer.name in inner))
    alone = {
        name: dataclasses.replace(
            design,
            **{
                operand: {layer: value for layer, value in given.items() if layer in inner}
                for operand in ("budgets", "weights", "activations")
                if (given := getattr(design, operand)) is not None
            },
        )
        for name, design in designs.items()
    }
    of_inner = hwmodel.compare_by_gates(layers, alone)
    figures = ["pj_per_mac", "saving_over_dot_8", "um2_per_mac"]
    table = hwmodel.compare_by_gates(network, designs).drop(columns="um2_per_mac")
    table = table.join(of_inner[figures].add_prefix("inner_"))
    return table[[*table.columns.drop("reason"), "reason"]]


def _without_nan(frame: pd.DataFrame) -> pd.DataFrame:
    """None where a figure is missing, as JSON has it."""
    return frame.astype(object).where(frame.notna(), None)


def run(config: HardwareConfig, workdir: Path, console: Console) -> None:
    """Prints the comparison, by gates and by the table, and writes it to `results.json`."""
    float_model = _float_model(config)
    model, network, weights, activations = _workload(config, float_model)
    source = config.init_from or "He-initialised, untrained"
    designs = _designs(config, model, weights, activations)
    reference = next(iter(designs.values()))
    if config.by is not None:
        for name, design in list(designs.items())[1:]:
            designs[name] = hwmodel.match(design, reference, network, by=config.by)
    narrow = {} if config.by else _narrow_designs(config, float_model, activations)
    by_gates = _gates_table(network, designs | narrow, stp_jax.budgets(model))
    frame = hwmodel.compare(network, designs).drop(columns="pe")
    print(f"weights: {source}; activations: one image of noise; first and last layer int8")
    print("\narray energy by gates, 45 nm; saving over the int8 dot product of the same class;")
    print("inner: in all layers but the first and the last; um2: of PEs and edge, at this budget")
    print(by_gates.drop(columns="reason").to_string(float_format="{:.2f}".format, na_rep="-"))
    for name, reason in by_gates["reason"].items():
        if reason:
            console.print(f"{name}: {reason}", highlight=False, markup=False)
    print("\nby the 45 nm table of arithmetic:")
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(frame.round(2).to_string())
    print("\nclaims of the papers:")
    for name, claim in CLAIMS.items():
        print(f"  {name}: {claim}")
    console.print(WHY_CLAIMS_DIFFER, highlight=False)
    results = {
        "experiment": "hw_compare",
        "config": dataclasses.asdict(config),
        "weights": source,
        "activations": "one image of Gaussian noise",
        "designs_by_gates": _without_nan(by_gates).to_dict(orient="index"),
        "designs": frame.to_dict(orient="index"),
        "claims": CLAIMS,
    }
    write_json(workdir / "results.json", results)
