"""MkDocs hooks: what the pages say about the code is generated from the code, and equations set.

A line ``<!-- generate: NAME ARGUMENT … -->`` in a page is replaced by the Markdown that the
function of this name in `GENERATORS` returns, so that no table differs from what the package does.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stp_jax.export.card import table

_EQUATION = re.compile(
    r'<(?:span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</(?:span|div)>',
    re.DOTALL,
)
_MARK = re.compile(r"^<!-- generate: (.+?) -->$", re.MULTILINE)

# Of the Gaussian weights in the encodings' table: the largest of a few thousand weights lies near
# four standard deviations, and a scale without clipping brings it to 127.
SIGMA = 127 / 4


# --- Encodings ------------------------------------------------------------------------------------


def gaussian_weights(sigma: float = SIGMA) -> np.ndarray:
    """Probabilities of the integers -127 … 127 for a rounded and clipped normal variable."""
    edges = np.arange(-127, 127) + 0.5
    below = np.array([0.0, *(0.5 + 0.5 * math.erf(e / sigma / math.sqrt(2)) for e in edges), 1.0])
    return np.diff(below)


def encoding_costs() -> dict[str, dict[str, float]]:
    """Terms and encoder area (µm², 45 nm) of each encoding at 8 bits."""
    from stp_jax import hwmodel, terms

    area = hwmodel.HOROWITZ_45NM.area_um2
    costs = {}
    for encoding in terms.ENCODINGS:
        unsigned = np.asarray(terms.count(np.arange(256), encoding))
        signed = np.asarray(terms.count(np.arange(-127, 128), encoding))
        costs[encoding] = {
            "uint8": unsigned.mean(),
            "int8": signed.mean(),
            "gaussian": float(signed @ gaussian_weights()),
            "most": terms.max_terms(encoding, 8),
            "area": area.get(f"encode_{encoding}", 0.0),
        }
    return costs


def encodings() -> str:
    """What each encoding costs."""
    header = ("encoding", "0 … 255", "−127 … 127", "Gaussian int8", "most", "encoder, µm²")
    rows = (
        (
            f"`{name}`",
            *(f"{c[k]:.3f}" for k in ("uint8", "int8", "gaussian")),
            c["most"],
            c["area"] or "none needed",
        )
        for name, c in encoding_costs().items()
    )
    return table(header, rows)


# --- Technology -----------------------------------------------------------------------------------


def technology(kind: str, name: str = "HOROWITZ_45NM") -> str:
    """A technology's ``energy_pj`` or ``area_um2`` with its sources."""
    from stp_jax import hwmodel

    entries = getattr(getattr(hwmodel, name), kind)
    sources = dict(getattr(hwmodel, name).sources)
    unit = {"energy_pj": "pJ", "area_um2": "µm²"}[kind]
    rows = (
        (f"`{entry}`", f"{value:.4g}", sources[f"{kind}.{entry}"])
        for entry, value in entries.items()
    )
    return table(("entry", unit, "source"), rows)


# --- Experiments ----------------------------------------------------------------------------------


def config(module: str, name: str) -> str:
    """Every key of ``--set key=value`` that a configuration class has."""
    return _keys(getattr(importlib.import_module(module), name))


def _keys(described: type) -> str:
    from experiments.config import Key, config_sections

    def code(text: str) -> str:
        return f"`{text}`".replace("|", "\\|")

    def rows(keys: list[Key]) -> Iterable[tuple[str, ...]]:
        return ((code(k.name), code(k.type), code(k.default), k.remark) for k in keys)

    header = ("key", "type", "default", "what it is")
    return "\n\n".join(
        f"{heading and f'**{heading}**'}\n\n{table(header, rows(keys))}"
        for heading, keys in config_sections(described).items()
    )


def other_configs() -> str:
    """The keys of each experiment that is not a training run."""
    from experiments import configs
    from experiments.config import Config

    kinds = ((name, type(configs.load(name).CONFIG)) for name in configs.names())
    return "\n\n".join(
        f"### `{name}`\n\n{_keys(kind)}" for name, kind in kinds if not issubclass(kind, Config)
    )


def bookkeeping() -> str:
    """The keys that may change when a run resumes."""
    from experiments.config import Config

    return ", ".join(f"`{key}`" for key in Config.BOOKKEEPING) + "."


def experiments() -> str:
    """The experiments that exist."""
    from experiments import configs

    return table(("experiment", "what"), ((f"`{n}`", configs.summary(n)) for n in configs.names()))


def models() -> str:
    """The models by name."""
    from stp_jax.models import MODELS

    def first_line(factory: Callable) -> str:
        return (inspect.getdoc(factory) or "").splitlines()[0].partition(";")[0].rstrip(".")

    return table(("`model=`", "what"), ((f"`{n}`", first_line(f)) for n, f in MODELS.items()))


def perplexities() -> str:
    """The rows that `benchmarks/lm_perplexity.py` stored."""
    stored = json.loads((Path(__file__).parent / "results" / "lm_perplexity.json").read_text())
    rows = (
        (
            name,
            f"{row['bits_per_weight']:.2f}",
            "" if row["terms_per_weight"] is None else f"{row['terms_per_weight']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['divergence']:.4f} ({row['low']:.4f} to {row['high']:.4f})",
        )
        for name, row in stored["rows"].items()
    )
    header = ("weights", "bits a weight", "terms a weight", "perplexity", "divergence from float")
    return table(header, rows)


# --- Diagrams -------------------------------------------------------------------------------------


def _beside(name: str) -> Any:
    """The module of this name in the folder of this file, which is no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def diagram(name: str) -> str:
    """A figure that is drawn from the code."""
    return _beside("diagrams").DIAGRAMS[name]()


# --- API ------------------------------------------------------------------------------------------


def public_names(package: str) -> dict[str, str]:
    """Name → where it is defined, for everything that a package's ``__init__`` offers.

    Packages below it have pages of their own.
    """
    source = Path(inspect.getfile(importlib.import_module(package))).read_text()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module != package:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def api(package: str) -> str:
    """An entry for every public name of a package."""
    return "\n\n".join(
        f"::: {path}\n    options:\n      heading: {package}.{name}\n      toc_label: {name}"
        for name, path in public_names(package).items()
    )


# --- Equations ------------------------------------------------------------------------------------


def equations(content: str) -> str:
    """The page's HTML with its equations as MathML, which browsers set without a script."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["kind"] == "[" else "inline"
        return convert(html.unescape(match["tex"]).strip(), display=display)

    return _EQUATION.sub(mathml, content)


GENERATORS: dict[str, Callable[..., str]] = {
    "encodings": encodings,
    "technology": technology,
    "config": config,
    "other_configs": other_configs,
    "bookkeeping": bookkeeping,
    "experiments": experiments,
    "models": models,
    "diagram": diagram,
    "perplexities": perplexities,
    "api": api,
}


def generate(markdown: str) -> str:
    """The page with every mark replaced.

    Raises:
      KeyError: a mark names no generator.
    """

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return GENERATORS[name](*arguments)

    return _MARK.sub(replace, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the site's files: adds the data of the design explorer."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "javascripts/designs.js", content=_designs()))
    return files


@functools.cache  # `mkdocs serve` builds the site again at every change of a page
def _designs() -> str:
    return _beside("explorer").script()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page's source."""
    return generate(markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with each page's HTML."""
    return equations(content)
