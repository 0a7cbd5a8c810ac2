"""The help of ``python -m experiments.run``, in sections that fit a terminal of 80 × 24 characters.

``--help`` shows the options and the usual keys, ``--help SECTION`` the keys of a section.
"""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from experiments import configs
from experiments.config import Config, Key, choices, config_sections

# The keys that most runs change.
USUAL = ("data", "model", "seed", "terms_per_weight", "retrain_epochs")

_WIDTH = 80
_COLUMN = 28  # where descriptions begin, at least


def key_sections(config: type) -> dict[str, tuple[str, list[Key]]]:
    """Section → its heading and keys; a section's name is the first word of its heading.

    >>> list(key_sections(Config))[:4]
    ['data', 'model', 'training', 'schedule']
    """
    return {
        heading.partition(" ")[0].strip(".;:,").lower(): (heading, keys)
        for heading, keys in config_sections(config).items()
    }


def _value(value: Any) -> str:
    """A value as ``--set`` takes it."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return {"True": "true", "False": "false", "None": "none", "{}": ""}.get(text, text)


def _lines(config: Any, keys: list[Key]) -> str:
    """Keys with their values, the values that they admit, and their descriptions."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    settings = {key: f"  {key.name}={_value(getattr(config, key.name))}" for key in keys}
    fitting = [len(text) + 2 for text in settings.values() if len(text) <= _COLUMN + 4]
    column = max(_COLUMN, *fitting) if fitting else _COLUMN
    lines = []
    for key, setting in settings.items():
        named = " | ".join("none" if c is None else str(c) for c in choices(hints[key.name]))
        described = "; ".join(filter(None, (named, key.remark)))
        wrapped = textwrap.wrap(described, _WIDTH - column) or [""]
        if len(setting) > column - 2:  # a line of its own
            lines += textwrap.wrap(setting, _WIDTH, subsequent_indent=" " * 6) if setting else []
        else:
            lines.append(f"{setting:{column}}{wrapped.pop(0)}".rstrip())
        lines += [" " * column + text for text in wrapped if text]
    return "\n".join(lines)


def _config(exp: str | None) -> Any:
    return configs.load(exp).CONFIG if exp in configs.names() else Config()


def overview(exp: str | None, others: Mapping[str, argparse.ArgumentParser]) -> str:
    """The help below the options: the usual keys and the names of the sections.

    An experiment that is no training run has few keys, which are shown at once.
    """
    config = _config(exp)
    sections = key_sections(type(config))
    keys = {key.name: key for _, keys in sections.values() for key in keys}
    if not isinstance(config, Config):
        return f"keys of {exp}:\n" + _lines(config, list(keys.values()))
    names = textwrap.fill(
        ", ".join([*sections, *others]), _WIDTH, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join(
        (
            f"the usual keys{f' of {exp}' if exp else ''}:",
            _lines(config, [keys[name] for name in USUAL]),
            "",
            "all keys and options by section, as `--help budgets`:",
            names,
        )
    )


def section(name: str, exp: str | None, others: Mapping[str, argparse.ArgumentParser]) -> str:
    """The help of a section.

    Raises:
      KeyError: there is no such section; the message lists those there are.
    """
    if name in others:
        return others[name].format_help()
    config = _config(exp)
    sections = key_sections(type(config))
    if name not in sections:
        known = ", ".join(filter(None, [*sections, *others]))
        raise KeyError(f"no section {name!r} of the help; there are {known}")
    heading, keys = sections[name]
    return f"{heading}\n\n{_lines(config, keys)}\n"
