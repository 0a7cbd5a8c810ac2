"""STP, term revealing, term caps and uniform budgets from one float model, with equal training.

Every member, the float baseline included, trains for the same number of steps from the same float
model, with the same rates and the same soft labels of that model; only the method differs. The
paper: Huang et al., IEEE TCAD 42(1), 2023; term revealing: Kung et al., SC20.

    python -m experiments.run --exp=compare_methods \\
        --set jobs=2 "settings=data=folder data_dir=cifar10 init_from=resnet20.safetensors"

Choose on the validation examples (``test=false``, in a folder of its own); the command without it
reads the test examples. Run it again to continue, or with other ``methods``, ``points``, ``steps``
or ``seeds`` to add members. A member of 300 steps takes about two minutes of one CPU core. What
came of it is on the documentation's results page.
"""

from pathlib import Path

from rich.console import Console

from experiments.comparison import ComparisonConfig, Method, choose, run_comparison, summary
from stp_jax.terms import max_budget

CONFIG = ComparisonConfig()

_OURS = "terms_per_weight={terms} allocate_for=energy"
_SLACK = "scale_slack=0.03"  # weights of few bits: scales that leave room to grow
_EVEN = "budget_step=2"  # for PEs of two lanes, which run even budgets without idle slots

METHODS: dict[str, Method] = {
    # The float model and its int8 version, trained on by the recipe of all others.
    "float": Method(
        title="float",
        kind="baseline",
        settings="stages=float,float_retrained,int8,allocated budget=32",
        stage="float_retrained",
    ),
    "int8": Method(title="int8", kind="baseline", settings="budget=32"),
    # Dense weights of few bits with learned scales (LSQ; Esser et al., ICLR 2020), for arrays of
    # dot products of that width; first and last layer keep int8, as everywhere.
    **{
        f"int{bits}": Method(
            title=f"int{bits}, learned scales",
            kind="rival",
            settings=f"weight_bits={bits} budget={max_budget(8, bits=bits)}",
            on_group_pes=False,
        )
        for bits in (4, 3, 2)
    },
    # Term revealing (Kung et al., SC20): greedy, HESE, one budget; as published and retrained.
    "tr-ptq": Method(
        title="term revealing, not retrained",
        kind="rival",
        settings="budget={budget} method=greedy encoding=hese",
        trained=False,
        stage="projected",
    ),
    "tr": Method(
        title="term revealing, retrained",
        kind="rival",
        settings="budget={budget} method=greedy encoding=hese",
        reference="filter",
    ),
    # Every weight by itself, as in shift-add networks: one term is a power of two, two are the
    # range of sums of two powers.
    "cap": Method(
        title="term cap per weight",
        kind="rival",
        settings="group_size=1 budget={budget}",
        reference="filter",
    ),
    "uniform": Method(
        title="uniform group budgets",
        kind="rival",
        settings="budget={budget}",
        reference="filter",
    ),
    "filter": Method(title="STP, budgets by filter", kind="ours", settings=_OURS),
    # Weights of fewer bits, for narrower group PEs.
    "filter-4": Method(
        title="STP, budgets by filter, weights of 4 bits",
        kind="ours",
        settings=f"{_OURS} weight_bits=4 {_SLACK}",
        reference="filter",
    ),
    "filter-even": Method(
        title="STP, even budgets by filter", kind="ours", settings=f"{_OURS} {_EVEN}"
    ),
    **{
        f"filter-{bits}-even": Method(
            title=f"STP, even budgets by filter, weights of {bits} bits",
            kind="ours",
            settings=f"{_OURS} {_EVEN} weight_bits={bits} {_SLACK}",
        )
        for bits in (4, 3)
    },
    "layer": Method(
        title="STP, budgets by layer",
        kind="ours",
        settings=f"{_OURS} budgets_by=layer",
        reference="filter",
    ),
    "reconstructed": Method(
        title="STP, budgets by filter, reconstructed first",
        kind="ours",
        settings=f"{_OURS} fit=reconstruct",
        reference="filter",
    ),
}
PARTS: dict[str, Method] = {
    name: Method(title=title, kind="part", settings=f"{_OURS} {changes}", reference="filter")
    for name, (title, changes) in {
        "no-distill": ("without soft labels", "distill=0"),
        "plain": ("STP, budgets by filter, plain errors", "error_weighting=none"),
        "gradients": ("errors weighted by squared gradients", "error_weighting=gradients"),
        "compensate": ("with compensation", "fit=compensate"),
        "groups-16": ("groups of 16", "group_size=16"),
    }.items()
}
PARTS["guided"] = Method(
    title="with guidance for 30 % of the steps",
    kind="part",
    settings=_OURS,
    shares={"guided": 0.3},
    reference="filter",
)


def run(config: ComparisonConfig, workdir: Path, console: Console) -> None:
    """Runs the comparison and prints its table."""
    methods = METHODS | PARTS
    choose(config, methods)
    results = run_comparison(config, methods, workdir, "compare_methods", console)
    table = summary(results, "test" if config.test else "validation")
    print(table.round(2).to_string(index=False))
    if results["missing"]:
        console.print(f"{len(results['missing'])} members failed; run the same command again")
    console.print(f"results: {workdir / 'results.json'}")
