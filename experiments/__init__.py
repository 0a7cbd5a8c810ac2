"""Experiments: ``python -m experiments.run --exp=NAME``; `load_run` reads what a run left."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_run":  # not on the way of the command line, which starts light
        from experiments.load import load_run

        return load_run
    raise AttributeError(f"module 'experiments' has no attribute {name!r}")
