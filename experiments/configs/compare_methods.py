"""STP, term revealing, term caps and uniform budgets from one float model, with equal training.

Every member, the float baseline included, trains for the same number of steps from the same float
model; all but STP on the labels alone, as published. The paper: Huang et al., IEEE TCAD 42(1),
2023; term revealing: Kung et al., SC20.

    python -m experiments.run --exp=compare_methods \\
        --set jobs=2 "settings=data=folder data_dir=cifar10 init_from=resnet20.safetensors"

Run it again to continue; more seeds or points add members, more steps need another --workdir. On
two CPU cores a pair of members of 300 steps takes two and a half minutes, all of them two hours.
What came of it is on the documentation's results page: no loss at 1.0 terms per weight, 0.4 points
at 0.5.
"""

from pathlib import Path

from rich.console import Console

from experiments.comparison import ComparisonConfig, parse_base, run_comparison, summary

CONFIG = ComparisonConfig()


def run(config: ComparisonConfig, workdir: Path, console: Console) -> None:
    """Runs the comparison and prints its two tables."""
    base = parse_base(config)
    results = run_comparison(config, base, workdir, "compare_methods", console)
    for title, ablation in (("methods", False), ("STP with one thing changed", True)):
        table = summary(results, ablation=ablation)
        if len(table):
            console.print(f"\n{title}, {config.steps} steps of {config.batch_size}:")
            print(table.round(2).to_string(index=False))
    console.print(f"results: {workdir / 'results.json'}")
