"""Runs every notebook from clean: the paired script is its source, the .ipynb keeps its outputs.

    python notebooks/execute.py            # fails on the first error, or where a pair differs
    python notebooks/execute.py --write    # also stores the outputs

A new notebook starts as a script in jupytext's percent format; ``--write`` makes its pair.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
TIMEOUT = 300  # seconds for a cell


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a pair must share: each cell's kind and text."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def from_script(script: Path) -> nbformat.NotebookNode:
    """The notebook of a percent script, with cell ids that do not change from run to run."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(script: Path, *, write: bool) -> str | None:
    """Runs one notebook in a fresh kernel; returns what is wrong, if anything."""
    notebook, pair = from_script(script), script.with_suffix(".ipynb")
    if not write:
        if not pair.exists():
            return f"{pair.name} is missing; run with --write"
        if sources(nbformat.read(pair, as_version=4)) != sources(notebook):
            return f"{pair.name} differs from {script.name}; run with --write"
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)
    if write:
        # Which interpreter ran it is no part of the notebook.
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, pair)
    return None


def main() -> int:
    """Runs the notebooks named, or all; 0 if all pass, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="scripts; all by default")
    parser.add_argument("--write", action="store_true", help="store the outputs in the .ipynb")
    arguments = parser.parse_args()
    scripts = arguments.notebooks or sorted(FOLDER.glob("[0-9]*.py"))
    failed = False
    for script in scripts:
        started = time.monotonic()
        wrong = execute(script, write=arguments.write)
        failed |= wrong is not None
        print(f"{script.name}: {wrong or 'passed'} ({time.monotonic() - started:.0f} s)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
