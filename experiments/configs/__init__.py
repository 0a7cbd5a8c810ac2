"""One module an experiment: its docstring says what it shows, its ``CONFIG`` how."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import types

from experiments.config import ConfigError


def names() -> list[str]:
    """The experiments that exist, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def summary(name: str) -> str:
    """The first line of an experiment's docstring."""
    return (importlib.import_module(f"{__name__}.{name}").__doc__ or "").strip().splitlines()[0]


def load(name: str) -> types.ModuleType:
    """The module of an experiment: its `CONFIG`, and its `run` unless it is a training run.

    Raises:
      ConfigError: no experiment has this name; the message lists those that exist.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no experiment {name!r}{hint} There are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
