"""Diagrams of the pages, as SVG: what they show comes from the code, so that they cannot drift.

Text and lines take the page's colour (``currentColor``), so that both colour schemes work.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterator, Sequence

import numpy as np

# Colours that keep their contrast on a light and on a dark page.
_BLUE, _ORANGE, _GREY = "#5b7fde", "#d9822b", "#8888884d"

# One group of weights; the page on the method projects the same one.
GROUP, BUDGET = (47, 23, 11, 5), 4


# --- SVG ------------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, *, size: float = 13, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
        f'fill="currentColor">{html.escape(text)}</text>'
    )


def _box(
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    fill: str = "none",
    dashed: bool = False,
    **data: object,
) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    named = "".join(f' data-{key}="{html.escape(str(value))}"' for key, value in data.items())
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" '
        f'stroke="currentColor" stroke-opacity="0.5"{dashes}{named}/>'
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A horizontal or vertical arrow."""
    along = np.sign([x2 - x1, y2 - y1]) * 6
    across = np.array([along[1], along[0]]) / 2
    back = np.array([x2, y2]) - along
    points = [(x2, y2), tuple(back + across), tuple(back - across)]
    tip = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="currentColor" fill="none"/>'
        f'<polygon points="{tip}" fill="currentColor"/>'
    )


def _figure(parts: Sequence[str], width: float, height: float, title: str, caption: str) -> str:
    """A figure as one block of HTML, which Markdown passes on as it is."""
    drawing = "".join(parts)
    return (
        f'<figure class="diagram"><svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"><title>{html.escape(title)}</title>'
        f"{drawing}</svg><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


# --- The projection of one group ------------------------------------------------------------------


def _terms(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """The terms of a group as (sign, exponent, index), in the order of the array's stream."""
    from stp_jax import terms

    digits = np.asarray(terms.encode(np.asarray(values)))
    found = [
        (int(digits[index, exponent]), int(exponent), int(index))
        for index, exponent in np.argwhere(digits)
    ]
    return sorted(found, key=lambda term: (-term[1], term[2]))


def projection() -> str:
    """A group of weights, its terms, and the terms of its projection."""
    from stp_jax import terms

    kept = np.asarray(terms.project(np.asarray(GROUP), group_size=4, budget=BUDGET, axis=0))
    exponents = range(6, -1, -1)
    cell, top, row = 30, 48, 30
    parts: list[str] = []

    def half(left: float, heading: str, values: Sequence[int], fill: str) -> None:
        parts.append(_text(left + 60 + 3.5 * cell, 18, heading, size=14))
        for column, exponent in enumerate(exponents):
            x = left + 60 + (column + 0.5) * cell
            parts.append(_text(x, 40, f"{2**exponent}", size=11))
        held = {(index, exponent): sign for sign, exponent, index in _terms(values)}
        for index, value in enumerate(values):
            y = top + index * row
            parts.append(_text(left + 50, y + 20, f"{value} =", anchor="end"))
            for column, exponent in enumerate(exponents):
                sign = held.get((index, exponent))
                x, data = left + 60 + column * cell, {"term": f"{heading}: {index},{exponent}"}
                parts.append(
                    _box(x, y, cell, row, fill=fill, **data) if sign else _box(x, y, cell, row)
                )
                if sign:
                    parts.append(_text(x + cell / 2, y + 20, "+" if sign > 0 else "−", size=15))

    before, after = len(_terms(GROUP)), len(_terms(kept.tolist()))
    half(0, f"a group of weights: {before} terms", GROUP, _GREY)
    parts.append(_arrow(285, top + 2 * row, 325, top + 2 * row))
    parts.append(_text(305, top + 2 * row - 10, f"k = {BUDGET}"))
    half(330, f"its projection: {after} terms", kept.tolist(), _BLUE)
    return _figure(
        parts,
        610,
        top + 4 * row + 6,
        "The projection of one group onto its budget",
        f"A group of g = 4 weights and its projection onto a budget of k = {BUDGET} terms: of all "
        "groups of integers with so few terms, the one with the least squared error. Each row is "
        "a sum of the powers of two that are marked + or −.",
    )


# --- The array, cycle by cycle --------------------------------------------------------------------

ROWS, COLS = 2, 3
# [filters, reduction]: two filters of two groups each, one group a row.
FILTERS = np.array([[47, 23, 11, 5, 9, -3, 30, 2], [-20, 6, 1, 12, 0, 64, 0, -16]])


def stream() -> Iterator[tuple[int, int, int, str]]:
    """Each slot that a row of the array takes: row, filter, slot, and its term or ``empty``."""
    from stp_jax import terms

    projected = np.asarray(
        terms.project(FILTERS, group_size=FILTERS.shape[1] // ROWS, budget=BUDGET, axis=1)
    )
    for row in range(ROWS):
        for index, groups in enumerate(projected.reshape(len(FILTERS), ROWS, -1)):
            found = _terms(groups[row].tolist())
            for slot in range(BUDGET):
                if slot < len(found):
                    sign, exponent, member = found[slot]
                    member += row * groups.shape[1]
                    yield row, index, slot, f"{'+' if sign > 0 else '−'}{2**exponent}·x{member}"
                else:
                    yield row, index, slot, "empty"


def array() -> str:
    """The input-stationary array of group PEs, and what each PE does in every cycle of a fold."""
    cycles = 2 * ROWS + COLS - 2 + len(FILTERS) * BUDGET
    parts: list[str] = []
    size = FILTERS.shape[1] // ROWS
    # The array.
    left, top, width, height, gap = 150, 34, 130, 38, 40
    for r in range(ROWS):
        y = top + r * (height + gap)
        parts.append(_text(left - 92, y + 17, "terms of", size=12))
        parts.append(_text(left - 92, y + 32, f"the filters, row {r}", size=12))
        parts.append(_arrow(left - 34, y + height / 2, left - 4, y + height / 2))
        for c in range(COLS):
            x = left + c * (width + gap)
            parts.append(_box(x, y, width, height, fill=_GREY))
            parts.append(_text(x + width / 2, y + 16, f"PE {r},{c}", size=12))
            held = f"x{r * size} … x{(r + 1) * size - 1}, pixel {c}"
            parts.append(_text(x + width / 2, y + 31, held, size=11))
            if c < COLS - 1:
                x2 = x + width + gap - 4
                parts.append(_arrow(x + width + 4, y + height / 2, x2, y + height / 2))
            parts.append(_arrow(x + width / 2, y + height + 4, x + width / 2, y + height + gap - 6))
    below = top + ROWS * (height + gap) + 8
    parts.append(
        _text(left + 1.5 * width + gap, below, "sums of the outputs, one per column", size=12)
    )
    # The cycles.
    start, cell, line = 62, 49, 26
    base = below + 38
    for cycle in range(cycles):
        parts.append(_text(start + (cycle + 0.5) * cell, base - 8, str(cycle + 1), size=11))
    parts.append(_text(start - 10, base - 8, "cycle", size=11, anchor="end"))
    slots = list(stream())
    for r in range(ROWS):
        for c in range(COLS):
            y = base + (r * COLS + c) * line
            parts.append(_text(start - 10, y + 17, f"PE {r},{c}", size=12, anchor="end"))
            parts.append(_box(start, y, ROWS * cell, line - 3, fill=_GREY))
            parts.append(_text(start + ROWS * cell / 2, y + 16, "load inputs", size=11))
            for row, index, slot, term in slots:
                if row != r:
                    continue
                # One cycle of skew for each row and column.
                cycle = ROWS + r + c + index * BUDGET + slot
                x, fill = start + cycle * cell, (_BLUE, _ORANGE)[index % 2]
                parts.append(
                    _box(x, y, cell, line - 3, fill=fill, cycle=cycle + 1, pe=f"{r},{c}", term=term)
                )
                parts.append(_text(x + cell / 2, y + 16, term, size=10.5))
    bottom = base + ROWS * COLS * line
    return _figure(
        parts,
        start + cycles * cell + 4,
        bottom + 4,
        "The array of group PEs, cycle by cycle",
        f"An input-stationary array of R = {ROWS} rows and C = {COLS} columns of group PEs with "
        f"g = {size}. Each PE holds {size} inputs of one output pixel. Two filters (blue, then "
        f"orange) with k = {BUDGET} terms per group stream through the rows; in each cycle a PE "
        "adds one shifted input to its sum, and passes the term on to its right neighbour. The "
        f"fold takes 2R + C − 2 + 2k = {cycles} cycles.",
    )


# --- The stages of a run --------------------------------------------------------------------------


def stages() -> str:
    """The stages of a training run in their order; which train, and which report an accuracy."""
    from experiments.config import STAGE_NAMES, Config
    from experiments.stages import STAGES

    per_row, width, height, gap, line = 4, 138, 40, 44, 78
    parts: list[str] = []
    for place, name in enumerate(STAGE_NAMES):
        row, column = divmod(place, per_row)
        x, y = 4 + column * (width + gap), 6 + row * line
        action = STAGES[name].action
        trains = ".train(" in inspect.getsource(action)
        reports = "Module" in inspect.get_annotations(action)["return"]
        off = getattr(Config(), f"{name}_epochs", 1) == 0
        fill = _BLUE if trains else "none"
        parts.append(
            _box(x, y, width, height, fill=fill, dashed=off, stage=name, reports=int(reports))
        )
        parts.append(_text(x + width / 2, y + 25, name + (" ✓" if reports else ""), size=14))
        if column < per_row - 1 and place < len(STAGE_NAMES) - 1:
            parts.append(_arrow(x + width + 4, y + height / 2, x + width + gap - 4, y + height / 2))
        elif place < len(STAGE_NAMES) - 1:  # on to the next row
            middle, right, start = y + height + 19, x + width / 2, 4 + width / 2
            parts.append(
                f'<path d="M{right:g} {y + height + 3:g}V{middle:g}H{start:g}" '
                'stroke="currentColor" fill="none"/>'
            )
            parts.append(_arrow(start, middle, start, y + line - 3))
    rows = -(-len(STAGE_NAMES) // per_row)
    return _figure(
        parts,
        8 + per_row * width + (per_row - 1) * gap,
        rows * line - (line - height) + 14,
        "The stages of a run",
        "The stages of a run. Blue ones train; ✓ marks those whose accuracy is reported; a dashed "
        "one is off by default.",
    )


DIAGRAMS = {"projection": projection, "array": array, "stages": stages}
