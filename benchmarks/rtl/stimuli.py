"""Stimuli: operands to port values, cycle by cycle, for each kind of processing element.

All follow the array's schedule. A fold first loads: the activations of all rows pass through
the PE on their way down and its own come last. Then its filters stream, without a gap. The partial
sum from above changes in the cycle in which the PE samples it, and stays until the next one, as the
register of the row above does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Operands, Stimulus
from stp_jax.hwmodel.rtl import images
from stp_jax.terms import slot_format

WIDTH = 8  # bits of activations and weights
PSUM = 32
RESET = 2  # cycles of reset before the first fold


def unsigned(values: npt.ArrayLike, bits: int) -> npt.NDArray[np.int64]:
    """Two's complement bits of signed values."""
    return np.asarray(values, np.int64) & ((1 << bits) - 1)


def pack(fields: npt.ArrayLike, bits: int) -> npt.NDArray:
    """Joins the last axis' fields of ``bits`` bits, element 0 lowest, into Python integers."""
    fields = unsigned(fields, bits).astype(object)
    shifts = np.array([1 << (bits * i) for i in range(fields.shape[-1])], object)
    return (fields * shifts).sum(axis=-1)


def terms(weights: npt.NDArray[np.integer], slots: int) -> dict[str, npt.NDArray[np.int64]]:
    """Terms of groups [..., g]: valid, sign, exponent and index, each [..., slots].

    Largest exponent first, then lowest index; empty slots last, all zero.
    """
    group = weights.shape[-1]
    words = images.wire_slots(weights, slots).astype(np.int64)
    form = slot_format(group, slots, images.BITS)
    above = form.index_bits + form.exponent_bits
    return {
        "valid": words >> (above + 1) & 1,
        "sign": words >> above & 1,
        "exponent": words >> form.index_bits & ((1 << form.exponent_bits) - 1),
        "index": words & ((1 << form.index_bits) - 1),
    }


class Schedule:
    """Cycles of reset, loads and streaming for folds of ``steps`` cycles; fills ports by fold."""

    def __init__(
        self, folds: int, steps: int | npt.NDArray[np.integer], *, rows: int, tail: int = 4
    ) -> None:
        """Folds of as many steps each, or of their own number: `stream` is then flat."""
        each = np.broadcast_to(steps, folds)
        ends = RESET + np.cumsum(rows + each)
        starts = ends - rows - each
        self.folds = folds
        self.cycles = int(ends[-1]) + tail
        self.measured = (RESET, int(ends[-1]))
        self.load = starts[:, None] + np.arange(rows)
        streams = [start + rows + np.arange(n) for start, n in zip(starts, each, strict=True)]
        self.stream = np.concatenate(streams)
        if np.ndim(steps) == 0:
            self.stream = self.stream.reshape(folds, -1)

    def port(self, values: npt.NDArray, cycles: npt.NDArray, *, hold: bool = False) -> npt.NDArray:
        """A port with ``values`` at ``cycles``; elsewhere zero, or what it was before."""
        flat_values, flat_cycles = values.reshape(-1), cycles.reshape(-1)
        port = np.zeros(self.cycles, flat_values.dtype)
        if not hold:
            port[flat_cycles] = flat_values
            return port
        since = np.searchsorted(flat_cycles, np.arange(self.cycles), side="right") - 1
        return np.where(since >= 0, flat_values[np.maximum(since, 0)], 0)

    def reset(self) -> npt.NDArray[np.int64]:
        """High for the first cycles."""
        return (np.arange(self.cycles) < RESET).astype(np.int64)

    def loads(self, words: npt.NDArray, *, bus: bool = False) -> dict[str, npt.NDArray]:
        """`load` and `activations_in` for one word a fold, among those of the other rows.

        They pass through the PE on their way down; or, with a ``bus`` down the column, each row
        takes its own, this PE the last.
        """
        rows = self.load.shape[1]
        passing = words[(np.arange(self.folds)[:, None] - np.arange(rows)[::-1]) % self.folds]
        high = np.zeros(self.load.shape, np.int64)
        high[:, -1 if bus else slice(None)] = 1
        return {
            "load": self.port(high, self.load),
            "activations_in": self.port(passing, self.load, hold=True),
        }


def drive_group(
    operands: Operands, budget: int, *, latency: int = 1, psum: int = PSUM, psum_delay: int = 0
) -> Stimulus:
    """A group PE that takes one term a cycle as valid, sign, exponent and index.

    Args:
      operands: the PE's work.
      budget: slots a group.
      latency: cycles from a group's last slot to its sum on ``psum``.
      psum: bits of partial sums.
      psum_delay: cycles from the last slot to that in which ``psum_in`` is sampled.
    """
    folds, filters, group = operands.weights.shape
    plan = Schedule(folds, filters * budget, rows=operands.rows)
    slots = terms(operands.weights, budget)
    last = np.zeros((folds, filters, budget), np.int64)
    last[..., -1] = 1
    closing = plan.stream.reshape(folds, filters, budget)[..., -1]
    inputs = {
        "reset": plan.reset(),
        **plan.loads(pack(operands.activations, WIDTH)),
        **{f"{name}_in": plan.port(values, plan.stream) for name, values in slots.items()},
        "last_in": plan.port(last, plan.stream),
        "psum_in": plan.port(unsigned(operands.psums, psum), closing + psum_delay, hold=True),
    }
    exponent_bits = (WIDTH - 1).bit_length()
    widths = dict.fromkeys(inputs, 1) | {
        "activations_in": group * WIDTH,
        "exponent_in": exponent_bits,
        "index_in": (group - 1).bit_length(),
        "psum_in": psum,
        "psum": psum,
    }
    return Stimulus(
        inputs=inputs,
        widths=widths,
        expected={"psum": (closing.ravel() + latency, unsigned(operands.sums, psum).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )


def drive_mac(operands: Operands, budget: int, *, latency: int = 1, psum: int = PSUM) -> Stimulus:
    """A MAC PE: one resident activation, one weight a cycle; the budget does not matter."""
    del budget
    single = split(operands, 1)
    plan = Schedule(*single.psums.shape, rows=operands.rows)
    loads = plan.loads(unsigned(single.activations[:, 0], WIDTH))
    inputs = {
        "load": loads["load"],
        "activation_in": loads["activations_in"],
        "weight_in": plan.port(unsigned(single.weights, WIDTH), plan.stream),
        "psum_in": plan.port(unsigned(single.psums, psum), plan.stream),
    }
    widths = {"load": 1, "activation_in": WIDTH, "weight_in": WIDTH, "psum_in": psum, "psum": psum}
    return Stimulus(
        inputs=inputs,
        widths=widths,
        expected={"psum": (plan.stream.ravel() + latency, unsigned(single.sums, psum).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiled:
    """Operands of a PE of several groups and columns.

    Attributes:
      activations: [folds, columns, groups * g], each column's own.
      weights: [folds, filters, groups * g], under which all columns work.
      psums: [folds, filters, columns].
    """

    activations: npt.NDArray[np.integer]
    weights: npt.NDArray[np.integer]
    psums: npt.NDArray[np.integer]

    @property
    def sums(self) -> npt.NDArray[np.int64]:
        """What leaves downwards: [folds, filters, columns]."""
        products = np.einsum("fnk,fck->fnc", self.weights.astype(np.int64), self.activations)
        return products + self.psums

    @property
    def multiplications(self) -> int:
        """Multiply-accumulates, all columns."""
        return self.weights.size * self.activations.shape[1]


def tile(operands: Operands, *, groups: int, columns: int) -> Tiled:
    """Folds side by side: ``groups`` that follow each other become one fold, and column c holds
    the activations of the c-th one from there.

    Raises:
      ValueError: the folds do not fill the groups.
    """
    folds, filters, group = operands.weights.shape
    if folds % groups:
        raise ValueError(f"{folds} folds do not fill PEs of {groups} groups")
    count = folds // groups
    weights = operands.weights.reshape(count, groups, filters, group).transpose(0, 2, 1, 3)
    across = (np.arange(count)[:, None] + np.arange(columns)) % count
    psums = operands.psums.reshape(count, groups, filters)[:, 0]
    return Tiled(
        activations=operands.activations.reshape(count, groups * group)[across],
        weights=weights.reshape(count, filters, groups * group),
        psums=psums[across].transpose(0, 2, 1),
    )


def drive_serial(
    operands: Operands,
    budget: int,
    *,
    late: bool = False,
    one_hot: bool = False,
    offset: bool = False,
    horner: bool = False,
    order: str = "exponent",
    joined: int = 1,
    psum: int = 28,
) -> Stimulus:
    """A group PE of one term a cycle with the options of verilog/serial_pe.v.

    Args:
      operands: the PE's work.
      budget: slots a group.
      late: sums leave a cycle later.
      one_hot: selects instead of valid and index.
      offset: unsigned activations; sums hold what depends on the weights alone.
      horner: amounts by which the sum moves up, instead of exponents.
      order: of a group's terms: by falling ``exponent``, or by ``index``.
      joined: groups that form a larger one, with the slots of all.
      psum: bits of a partial sum.
    """
    tiled = tile(operands, groups=joined, columns=1)
    operands = Operands(
        activations=tiled.activations[:, 0],
        weights=tiled.weights,
        psums=tiled.psums[..., 0],
        rows=operands.rows,
    )
    budget *= joined
    folds, filters, group = operands.weights.shape
    plan = Schedule(folds, filters * budget, rows=operands.rows)
    slots = _in_order(terms(operands.weights, budget), order)
    index_bits = (group - 1).bit_length()
    where = slots["valid"] << (slots["index"] if one_hot else index_bits)
    where = where if one_hot else where | slots["index"] * slots["valid"]
    exponent, rest = slots["exponent"], np.zeros_like(slots["exponent"])
    if horner:
        rest[..., -1] = exponent[..., -1]
        exponent = np.concatenate([rest[..., :1] * 0, exponent[..., :-1] - exponent[..., 1:]], -1)
    sums, resident = operands.sums, operands.activations
    if offset:
        zero_point = 128 if resident.min() < 0 else 0
        resident = resident + zero_point
        scale = slots["valid"] << slots["exponent"]
        added = 255 * scale * slots["sign"] + zero_point * scale * (1 - 2 * slots["sign"])
        sums = sums + added.sum(axis=-1)
    last = np.zeros((folds, filters, budget), np.int64)
    last[..., -1] = 1
    closing = plan.stream.reshape(folds, filters, budget)[..., -1]
    return Stimulus(
        inputs={
            "reset": plan.reset(),
            **plan.loads(pack(resident, WIDTH), bus=True),
            "where_in": plan.port(where, plan.stream),
            "sign_in": plan.port(slots["sign"], plan.stream),
            "exponent_in": plan.port(exponent, plan.stream),
            "rest_in": plan.port(rest, plan.stream),
            "last_in": plan.port(last, plan.stream),
            "psum_in": plan.port(unsigned(operands.psums, psum), closing + late, hold=True),
        },
        widths={
            **dict.fromkeys(("reset", "load", "sign_in", "last_in"), 1),
            "activations_in": group * WIDTH,
            "where_in": group if one_hot else index_bits + 1,
            "exponent_in": 3,
            "rest_in": 3 if horner else 1,
            "psum_in": psum,
            "psum": psum,
        },
        expected={"psum": (closing.ravel() + 1 + late, unsigned(sums, psum).ravel())},
        multiplications=operands.multiplications,
        measured=plan.measured,
    )


def _in_order(
    slots: dict[str, npt.NDArray[np.int64]], order: str
) -> dict[str, npt.NDArray[np.int64]]:
    """Terms of [..., slots] in this order, empty slots last; these keep the last exponent."""
    key = slots[order] * (-1 if order == "exponent" else 1) + 1000 * (1 - slots["valid"])
    by = np.argsort(key, axis=-1, kind="stable")
    slots = {name: np.take_along_axis(values, by, axis=-1) for name, values in slots.items()}
    terms_of = slots["valid"].sum(axis=-1, keepdims=True)
    where = np.minimum(np.arange(by.shape[-1]), np.maximum(terms_of - 1, 0))
    kept = np.take_along_axis(slots["exponent"], where, axis=-1)
    return slots | {"exponent": kept}


def split(operands: Operands, lanes: int) -> Operands:
    """Groups cut to ``lanes``: each part a fold of its own, whose row above is the part before.

    Raises:
      ValueError: the lanes do not divide the group.
    """
    folds, filters, group = operands.weights.shape
    if group % lanes:
        raise ValueError(f"{lanes} lanes do not divide a group of {group}")
    parts = group // lanes
    weights = operands.weights.reshape(folds, filters, parts, lanes)
    activations = operands.activations.reshape(folds, parts, lanes)
    products = np.einsum("fnpl,fpl->fnp", weights.astype(np.int64), activations)
    above = operands.psums[..., None] + np.cumsum(products, axis=-1) - products
    return Operands(
        activations=activations.reshape(folds * parts, lanes),
        weights=weights.transpose(0, 2, 1, 3).reshape(folds * parts, filters, lanes),
        psums=above.transpose(0, 2, 1).reshape(folds * parts, filters),
    )


def _tile_lanes(operands: Operands, lanes: int, columns: int) -> Tiled:
    """Operands of a PE of this many lanes, fewer or more than a group has."""
    group = operands.weights.shape[-1]
    if lanes < group:
        return tile(split(operands, lanes), groups=1, columns=columns)
    return tile(operands, groups=lanes // group, columns=columns)


# What carries the weights of a dot-product PE, and what its sums have too much: both [..., lanes].


def _twos_complement(weights: npt.NDArray[np.int64]) -> tuple[npt.NDArray, int]:
    return weights, WIDTH


def _sign_and_magnitude(weights: npt.NDArray[np.int64]) -> tuple[npt.NDArray, int]:
    if np.abs(weights).max() > 127:
        raise ValueError("sign and magnitude in 8 bits holds -127 to 127")
    return (weights < 0) << (WIDTH - 1) | np.abs(weights), WIDTH


def _booth_digits(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Radix-4 digits [..., 4] in -2 .. 2, least significant first."""
    bits = (weights[..., None] >> np.arange(WIDTH)) & 1
    below = np.concatenate([np.zeros_like(bits[..., :1]), bits[..., 1:-1:2]], axis=-1)
    return bits[..., 0::2] + below - 2 * bits[..., 1::2]


def _booth(weights: npt.NDArray[np.int64]) -> tuple[npt.NDArray, int]:
    digits = _booth_digits(weights)
    fields = (digits < 0) << 2 | (np.abs(digits) == 2) << 1 | (np.abs(digits) == 1)
    return (fields << 3 * np.arange(WIDTH // 2)).sum(axis=-1), 3 * WIDTH // 2


def _no_offset(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.zeros_like(weights)


def _complement_offset(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return 255 * np.maximum(-weights, 0)


def _booth_offset(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return (511 * (_booth_digits(weights) < 0) << 2 * np.arange(WIDTH // 2)).sum(axis=-1)


_MAC_FORMS = {
    "plain": (_twos_complement, _no_offset),
    "offset": (_sign_and_magnitude, _complement_offset),
    "booth": (_booth, _booth_offset),
    "quiet_booth": (_booth, _no_offset),
}


def drive_mac_dot(
    operands: Operands,
    budget: int,
    *,
    lanes: int,
    columns: int = 1,
    form: str = "plain",
    weight_bits: int = WIDTH,
    latency: int = 1,
    psum: int = 28,
) -> Stimulus:
    """A PE of ``lanes`` multiplications a cycle in each of its columns.

    Args:
      operands: the PE's work.
      budget: does not matter.
      lanes: of the PE.
      columns: that share the weights.
      form: ``plain``: two's complement; ``offset``: sign and magnitude; ``booth`` and
        ``quiet_booth``: radix-4 digits. ``offset`` and ``booth`` take unsigned activations and add
        what depends on the weights alone.
      weight_bits: of the ``plain`` form's weights.
      latency: cycles from the weights to their sum.
      psum: bits of a partial sum.
    """
    del budget
    tiled = _tile_lanes(operands, lanes, columns)
    folds, filters = tiled.weights.shape[:2]
    encode, offset = _MAC_FORMS[form]
    resident = tiled.activations.reshape(folds, columns * lanes)
    unsigned_form = form in ("offset", "booth")
    zero_point = 128 if unsigned_form and resident.min() < 0 else 0
    weights = tiled.weights.astype(np.int64)
    words, bits = encode(weights)
    if form == "plain":
        bits = weight_bits
    extra = (offset(weights) + zero_point * weights).sum(axis=-1)
    plan = Schedule(folds, filters, rows=operands.rows)
    return Stimulus(
        inputs={
            **plan.loads(pack(resident + zero_point, WIDTH), bus=True),
            "weights_in": plan.port(pack(words, bits), plan.stream),
            "psum_in": plan.port(pack(tiled.psums, psum), plan.stream, hold=True),
        },
        widths={
            "load": 1,
            "activations_in": columns * lanes * WIDTH,
            "weights_in": lanes * bits,
            "psum_in": columns * psum,
            "psum": columns * psum,
        },
        expected={
            "psum": (
                plan.stream.ravel() + latency,
                pack(tiled.sums + extra[..., None], psum).ravel(),
            )
        },
        multiplications=tiled.multiplications,
        measured=plan.measured,
    )


def passes(budget: int, lanes: int) -> int:
    """Passes of a group of ``budget`` terms through a PE of ``lanes`` term lanes a group."""
    return -(-budget // lanes)


def lane_terms(
    weights: npt.NDArray[np.integer], budget: int, lanes: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Terms of groups [..., g] by pass and lane: fields [..., passes, lanes].

    A group's terms are free in their order. They are spread evenly over the passes, so that lanes
    beyond those needed stay idle, and within a pass added terms fill the lanes from below and
    subtracted ones from above, so that a lane's sign seldom changes.
    """
    count = passes(budget, lanes)
    used = -(-budget // count)
    slots = terms(weights, count * used)
    slots = {
        name: np.swapaxes(values.reshape(*values.shape[:-1], used, count), -1, -2)
        for name, values in slots.items()
    }
    key = np.where(slots["valid"] == 0, 1, 2 * slots["sign"])
    order = np.argsort(key, axis=-1, kind="stable")
    idle = [(0, 0)] * (order.ndim - 1) + [(0, lanes - used)]
    return {
        name: np.pad(np.take_along_axis(values, order, axis=-1), idle)
        for name, values in slots.items()
    }


def drive_term_dot(
    operands: Operands,
    budget: int,
    *,
    lanes: int,
    groups: int = 1,
    columns: int = 1,
    indexed: bool = False,
    form: str = "plain",
    latency: int = 1,
    psum: int = 28,
) -> Stimulus:
    """A feed-forward group PE; each pass of a filter has a partial sum of its own.

    Args:
      operands: the PE's work.
      budget: terms a group.
      lanes: terms of a group that the PE takes in a cycle.
      groups: in the PE.
      columns: that share the terms.
      indexed: terms hold the index; else selects, one-hot.
      form: ``plain``; ``offset``: a subtracted term adds its complement; ``split``: sums of added
        and of subtracted terms. The latter two take unsigned activations, and their sums hold what
        depends on the weights alone.
      latency: cycles from a pass's terms to its sum.
      psum: bits of a partial sum.
    """
    group = operands.weights.shape[-1]
    tiled = tile(operands, groups=groups, columns=columns)
    folds, filters = tiled.weights.shape[:2]
    count = passes(budget, lanes)
    by_group = tiled.weights.reshape(folds, filters, groups, group)
    slots = lane_terms(by_group, budget, lanes)  # [folds, filters, groups, passes, lanes]
    slots = {name: np.moveaxis(values, 3, 2) for name, values in slots.items()}
    psums, sums = _pass_sums(tiled, slots, groups)
    resident = tiled.activations.reshape(folds, -1)
    if form != "plain":
        zero_point = 128 if resident.min() < 0 else 0
        resident = resident + zero_point
        sums = sums + _offsets(slots, zero_point, form)[..., None]
    words, bits = _term_words(slots, group, indexed=indexed)
    plan = Schedule(folds, filters * count, rows=operands.rows)
    return Stimulus(
        inputs={
            **plan.loads(pack(resident, WIDTH), bus=form != "plain"),
            "terms_in": plan.port(pack(words, bits), plan.stream),
            "psum_in": plan.port(pack(psums, psum), plan.stream, hold=True),
        },
        widths={
            "load": 1,
            "activations_in": columns * groups * group * WIDTH,
            "terms_in": groups * lanes * bits,
            "psum_in": columns * psum,
            "psum": columns * psum,
        },
        expected={"psum": (plan.stream.ravel() + latency, pack(sums, psum).ravel())},
        multiplications=tiled.multiplications,
        measured=plan.measured,
    )


def drive_lanes(
    operands: Operands, budget: int, *, lanes: int, weight_bits: int = WIDTH, psum: int = 28
) -> Stimulus:
    """The product's element of several lanes: as `drive_term_dot` in offset form, ports apart.

    Exponents of narrow weights have fewer bits.
    """
    joined = drive_term_dot(operands, budget, lanes=lanes, form="offset", psum=psum)
    group = operands.weights.shape[-1]
    fields = {"exponent": (WIDTH - 1).bit_length(), "negative": 1, "select": group}
    ported = fields | {"exponent": (weight_bits - 1).bit_length()}
    words = joined.inputs["terms_in"]
    ports = {f"{name}_in": np.zeros(len(words), object) for name in fields}
    for lane in range(lanes):
        low = lane * sum(fields.values())
        for name, bits in fields.items():
            ports[f"{name}_in"] += (words >> low & (1 << bits) - 1) << lane * ported[name]
            low += bits
    inputs = {n: v for n, v in joined.inputs.items() if n != "terms_in"} | ports
    widths = {n: w for n, w in joined.widths.items() if n != "terms_in"}
    widths |= {f"{name}_in": lanes * bits for name, bits in ported.items()}
    return dataclasses.replace(joined, inputs=inputs, widths=widths)


def _offsets(
    slots: dict[str, npt.NDArray[np.int64]], zero_point: int, form: str
) -> npt.NDArray[np.int64]:
    """What this form adds to each pass's sum: [folds, filters, passes]."""
    scale = slots["valid"] << slots["exponent"]
    signed = scale * (1 - 2 * slots["sign"])
    added = zero_point * signed.sum(axis=(-1, -2))
    if form == "offset":
        return added + (255 * scale * slots["sign"]).sum(axis=(-1, -2))
    lanes = slots["sign"].shape[-1] * slots["sign"].shape[-2]
    return added + 2 * ((1 << (2 * WIDTH - 1 + (lanes - 1).bit_length())) - 1)


def _pass_sums(
    tiled: Tiled, slots: dict[str, npt.NDArray[np.int64]], groups: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Partial sums that enter and leave with each pass: both [folds, filters, passes, columns].

    Only the first pass carries the operands' partial sum; the others start from half of it, values
    of the same kind.
    """
    folds, columns = tiled.activations.shape[:2]
    signed = (1 - 2 * slots["sign"]) * slots["valid"] << slots["exponent"]
    sums = np.empty((*slots["sign"].shape[:3], columns), np.int64)
    for fold in range(folds):
        resident = tiled.activations[fold].reshape(columns, groups, 1, -1)
        for column in range(columns):
            picked = resident[column, np.arange(groups)[:, None], 0, slots["index"][fold]]
            sums[fold, ..., column] = (picked * signed[fold]).sum(axis=(-1, -2))
    entering = np.broadcast_to(tiled.psums[:, :, None], sums.shape).copy()
    entering[:, :, 1:] //= 2
    return entering, sums + entering


def _term_words(
    slots: dict[str, npt.NDArray[np.int64]], group: int, *, indexed: bool
) -> tuple[npt.NDArray[np.int64], int]:
    """Words {select or valid and index, sign, exponent} [..., groups * lanes] and their bits."""
    index_bits = (group - 1).bit_length()
    exponent_bits = (WIDTH - 1).bit_length()
    if indexed:
        where = slots["valid"] << index_bits | slots["index"]
    else:
        where = slots["valid"] << slots["index"]
    words = (where << 1 | slots["sign"]) << exponent_bits | slots["exponent"]
    bits = exponent_bits + 1 + (index_bits + 1 if indexed else group)
    return words.reshape(*words.shape[:-2], -1), bits
