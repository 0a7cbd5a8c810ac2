"""Memory images for the RTL test bench: term slots as on the wires, weights, activations, as hex.

A job is one matrix product on the input-stationary array of Huang et al. (IEEE TCAD 42(1), 2023):
weights [M, K] times activations [P, K], reduction K on the rows (``group_size`` a row), pixels P on
the columns, filters M in time. What does not fill a fold is padded with zero activations and empty
slots. Every file is plain ``$readmemh`` text, one word a line, and holds the jobs one by one:

=================== ============================================================================
``jobs.hex``        eight 32-bit words a job: row folds, column folds, filters M, slots of a
                    group in all filters together, pixels P, then the first word of the job in
                    weights.hex, in activations.hex and in the output buffer
``filters.hex``     two 32-bit words a filter, job by job: its slots k, and those of the
                    filters before it in the job
``bias.hex``        32 bits a filter, job by job: what the sum of its first fold starts from
``wire_slots.hex``  one wire slot (`stp_jax.terms.slots`) a line, ordered
                    [row fold][filter][row][slot]: {valid, sign, exponent, index}, valid on top;
                    a group's terms come largest exponent first, ties by index; 8 bits for
                    g = 8, and as many slots as the filter has
``weights.hex``     one group a line, ordered [row fold][filter][row]: g bytes in two's
                    complement, weight 0 lowest
``activations.hex`` one group a line, ordered [row fold][column fold][row][column]: g bytes
=================== ============================================================================

The test bench feeds the rows from `wire_slots.hex` as the edge would after it has decoded a stored
stream. The output buffer holds the sums as 32-bit words ordered [pixel][filter].

An array of several lanes takes a pass of ``lanes`` slots a cycle: then "slots" of the table are
passes, a line of ``wire_slots.hex`` holds a pass, lane 0 lowest, and its terms come added ones
first, subtracted ones last. Such an array works in offset form (gpe_lanes.v): signed activations
are stored plus 128, and the bias takes off what that and the complements of subtracted terms add.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np
import numpy.typing as npt

from stp_jax.terms import encode, slot_format
from stp_jax.terms.groups import GroupLayout

ENCODING = "naf"  # of the encoders at the edge, and so of the terms
BITS = 8
_LARGEST = (1 << BITS) - 1  # the largest magnitude that `encode` takes with bits=8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One matrix product for the array, activations [P, K] with weights [M, K].

    Attributes:
      weights: integers [M, K], already projected: at most the budget's NAF terms in each group of
        consecutive weights along K. Values whose terms stay below 2**8 are allowed, so a
        projection may round 127 up to 128.
      activations: integers [P, K] in [-128, 127].
      budget: slots k that every group takes, at least 1; or [M], those of each filter's groups.

    Raises:
      ValueError: shapes do not match, an axis is empty, or activations or budget are out of range.
    """

    weights: npt.NDArray[np.integer]
    activations: npt.NDArray[np.integer]
    budget: int | npt.NDArray[np.integer]

    def __post_init__(self) -> None:
        """Checks shapes and ranges."""
        for name in ("weights", "activations"):
            array = getattr(self, name)
            if array.ndim != 2 or 0 in array.shape:
                raise ValueError(f"{name} must be a non-empty matrix, got shape {array.shape}")
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name} must be integers, got dtype {array.dtype}")
        if self.weights.shape[1] != self.activations.shape[1]:
            raise ValueError(
                "weights [M, K] and activations [P, K] must share K, got "
                f"{self.weights.shape} and {self.activations.shape}"
            )
        _check_int8("activations", self.activations)
        if np.shape(self.budget) not in ((), self.weights.shape[:1]):
            raise ValueError(
                f"budget must be one or one for each of {len(self.weights)} filters, got shape "
                f"{np.shape(self.budget)}"
            )
        if np.min(self.budget) < 1:
            raise ValueError(f"budget must be at least one slot a group, got {self.budget}")

    @property
    def filter_budgets(self) -> npt.NDArray[np.int64]:
        """Slots of every filter's groups, int64 [M]."""
        return np.broadcast_to(np.asarray(self.budget, np.int64), self.weights.shape[:1])


def _check_int8(name: str, values: npt.NDArray[np.integer]) -> None:
    if values.min() < -128 or values.max() > 127:
        raise ValueError(f"{name} must fit int8, [-128, 127], got [{values.min()}, {values.max()}]")


@functools.cache
def _naf_digits() -> npt.NDArray[np.int32]:
    """Digits [511, 9] of every value from -255 to 255."""
    values = np.arange(-_LARGEST, _LARGEST + 1, dtype=np.int32)
    return np.asarray(encode(values, encoding=ENCODING, bits=BITS))


def wire_slots(groups: npt.NDArray[np.integer], slots: int) -> npt.NDArray[np.uint32]:
    """Groups of weights as slots on the wires, largest exponent first, then lowest index.

    Args:
      groups: integers [..., g].
      slots: slots of each group; one without a term is zero, as its valid bit is.

    Returns:
      uint32 [..., slots], laid out as in the module's table.

    Raises:
      ValueError: a value needs the term 2**8 or more, or a group has more terms than slots.

    >>> [f"{word:08b}" for word in wire_slots(np.array([7, 0, 0, -8, 0, 0, 0, 0]), 4)]
    ['10011000', '11011011', '11000000', '00000000']
    """
    groups = np.asarray(groups)
    if groups.size and np.abs(groups.astype(np.int64)).max() > _LARGEST:
        raise ValueError(f"weights must be within ±{_LARGEST} to be encoded, project them to int8")
    digits = _naf_digits()[groups + _LARGEST]
    if np.any(digits[..., BITS:]):
        raise ValueError(f"a weight needs the term 2**{BITS}, but exponents have 3 bits (0 to 7)")
    group_size = groups.shape[-1]
    # [..., g, exponent] → [..., position], position = (7 - exponent) * g + index.
    by_position = np.swapaxes(digits[..., BITS - 1 :: -1], -1, -2).reshape(*groups.shape[:-1], -1)
    most = int(np.max(np.count_nonzero(by_position, axis=-1), initial=0))
    if most > slots:
        raise ValueError(
            f"a group has {most} terms but only {slots} slots: project it to k={slots}"
        )
    order = np.argsort(by_position == 0, axis=-1, kind="stable")[..., :slots]
    digit = np.take_along_axis(by_position, order, axis=-1)
    exponent, index = BITS - 1 - order // group_size, order % group_size
    form = slot_format(group_size, slots, BITS)
    valid_and_sign = 2 + (digit < 0)
    words = ((valid_and_sign << form.exponent_bits | exponent) << form.index_bits) | index
    words = np.where(digit == 0, 0, words).astype(np.uint32)
    padding = [(0, 0)] * (groups.ndim - 1) + [(0, slots - words.shape[-1])]
    return np.pad(words, padding)


def filter_slots(
    by_fold: npt.NDArray[np.integer], budgets: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.uint32]]:
    """Wire slots [row fold, rows, k] of each filter of [row fold, M, rows, g]."""
    found: dict[int, npt.NDArray[np.uint32]] = {}
    for k in np.unique(budgets).tolist():
        mine = np.flatnonzero(budgets == k)
        found |= zip(mine.tolist(), wire_slots(by_fold[:, mine], k).swapaxes(0, 1), strict=True)
    return [found[m] for m in range(len(budgets))]


def passes(budgets: npt.NDArray[np.integer], lanes: int) -> npt.NDArray[np.integer]:
    """Passes of ``lanes`` slots that groups with these budgets take."""
    return -(-budgets // lanes)


def _pass_words(
    words: npt.NDArray[np.uint32], lanes: int, *, slot_bits: int
) -> npt.NDArray[np.object_]:
    """Wire slots [..., k] as passes [..., n] of ``lanes`` slots, Python integers, lane 0 lowest.

    The terms spread evenly over the passes, the largest first. Within a pass added terms fill the
    lanes from below and subtracted ones from above, which keeps the lanes' signs still.
    """
    slots = words.shape[-1]
    count = int(passes(np.asarray(slots), lanes))
    used = int(passes(np.asarray(slots), count))
    spread = np.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, count * used - slots)])
    spread = spread.reshape(*words.shape[:-1], count, used)
    valid_and_sign = spread >> np.uint32(slot_bits - 2)
    key = np.array([1, 1, 0, 2])[valid_and_sign]  # empty slots between added and subtracted terms
    ordered = np.take_along_axis(spread, np.argsort(key, axis=-1, kind="stable"), axis=-1)
    shifts = np.array([1 << (slot_bits * lane) for lane in range(used)], np.object_)
    return (ordered.astype(np.object_) * shifts).sum(axis=-1)


def _zero_point(job: Job, lanes: int) -> int:
    """The offset that an array of several lanes adds to the job's activations."""
    return 128 if lanes > 1 and job.activations.min() < 0 else 0


def _biases(job: Job, lanes: int) -> npt.NDArray[np.int64]:
    """Initial values of the filters' sums [M], which cancel the additions of offset form."""
    weights = job.weights.astype(np.int64)
    if lanes == 1:
        return np.zeros(len(weights), np.int64)
    digits = _naf_digits()[weights + _LARGEST]
    subtracted = ((digits < 0).astype(np.int64) << np.arange(digits.shape[-1])).sum(axis=-1)
    added = _LARGEST * subtracted + _zero_point(job, lanes) * weights
    return -added.sum(axis=-1)


def _tile(matrix: npt.NDArray[np.integer], rows: int, group_size: int) -> npt.NDArray[np.integer]:
    """Splits [N, K] along K: [row fold, row, N, g], the ragged end padded with zeros."""
    by_fold = GroupLayout(rows * group_size, axes=(1,)).split(matrix)
    return GroupLayout(group_size, axes=(2,)).split(by_fold).transpose(1, 2, 0, 3)


def weight_groups(job: Job, *, rows: int, group_size: int) -> npt.NDArray[np.integer]:
    """The job's weights in the order in which the rows fetch them: [row fold, M, rows, g]."""
    return _tile(job.weights, rows, group_size).transpose(0, 2, 1, 3)


def activation_groups(
    job: Job, *, rows: int, cols: int, group_size: int
) -> npt.NDArray[np.integer]:
    """The job's resident activations by fold: [row fold, column fold, rows, cols, g]."""
    tiled = _tile(job.activations, rows, group_size)
    return GroupLayout(cols, axes=(2,)).split(tiled).transpose(0, 2, 1, 3, 4)


def byte_lines(groups: npt.NDArray[np.integer]) -> list[str]:
    """One hex line a group, element 0 in the lowest byte."""
    raw = np.ascontiguousarray(groups.reshape(-1, groups.shape[-1])[:, ::-1].astype(np.uint8))
    return [row.tobytes().hex() for row in raw]


def _word_lines(words: npt.NDArray[np.uint32] | npt.NDArray[np.object_], bits: int) -> list[str]:
    digits = (bits + 3) // 4
    return [f"{word:0{digits}x}" for word in words.ravel().tolist()]


def write_weights(path: pathlib.Path, groups: npt.NDArray[np.integer]) -> int:
    """Writes groups [..., g] of int8 weights as ``weights.hex``; returns the number of words.

    Raises:
      ValueError: a weight does not fit int8 (as a projection's 128 does not).
    """
    _check_int8("stored weights", groups)
    return write_lines(path, byte_lines(groups))


def write_lines(path: pathlib.Path, lines: list[str]) -> int:
    """Writes an image; returns the number of its words."""
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


def write_images(
    directory: pathlib.Path,
    jobs: list[Job],
    *,
    rows: int,
    cols: int,
    group_size: int,
    encode_at_edge: bool,
    lanes: int = 1,
) -> dict[str, int]:
    """Writes the images of all jobs for an array of ``rows`` × ``cols`` group PEs.

    Args:
      directory: an existing folder.
      jobs: what to compute, in order.
      rows: R, rows of the array.
      cols: C, columns of the array.
      group_size: g, activations resident in a PE.
      encode_at_edge: False writes ``wire_slots.hex``, True ``weights.hex`` for the encoders at the
        edge.
      lanes: terms that a PE takes in a cycle.

    Returns:
      The number of words in each image and in the output buffer, under the names of the test
      bench's parameters.

    Raises:
      ValueError: as `wire_slots` and `write_weights` do.
    """
    headers: list[int] = []
    filter_words: list[int] = []
    biases: list[int] = []
    slots: list[str] = []
    slot_bits = slot_format(group_size, 2, BITS).wire_bits
    weights: list[str] = []
    activations: list[str] = []
    group_base = output_base = 0
    for job in jobs:
        by_fold = weight_groups(job, rows=rows, group_size=group_size)
        resident = activation_groups(job, rows=rows, cols=cols, group_size=group_size)
        filters, pixels = job.weights.shape[0], job.activations.shape[0]
        budgets = job.filter_budgets
        steps = passes(budgets, lanes)  # in cycles; slots where there is one lane
        headers += [*resident.shape[:2], filters, int(steps.sum()), pixels]
        headers += [group_base, len(activations), output_base]
        filter_words += np.stack([steps, np.cumsum(steps) - steps], axis=1).ravel().tolist()
        biases += _biases(job, lanes).tolist()
        by_filter = filter_slots(by_fold, budgets)  # also what refuses a group over its budget
        words = [_pass_words(w, lanes, slot_bits=slot_bits) for w in by_filter]
        if encode_at_edge:
            _check_int8("stored weights", by_fold)
            weights += byte_lines(by_fold)
        else:
            for fold in range(len(by_fold)):
                slots += _word_lines(
                    np.concatenate([w[fold].ravel() for w in words]), lanes * slot_bits
                )
        activations += byte_lines(resident + _zero_point(job, lanes))
        group_base += by_fold[..., 0].size
        output_base += filters * pixels
    write_lines(directory / "jobs.hex", _word_lines(np.array(headers, np.uint32), 32))
    write_lines(directory / "filters.hex", _word_lines(np.array(filter_words, np.uint32), 32))
    write_lines(
        directory / "bias.hex", _word_lines(np.array(biases, np.int64).astype(np.uint32), 32)
    )
    write_lines(directory / "activations.hex", activations)
    write_lines(
        directory / ("weights.hex" if encode_at_edge else "wire_slots.hex"),
        weights if encode_at_edge else slots,
    )
    return {
        "JOBS": len(jobs),
        "FILTERS": len(filter_words) // 2,
        "SLOT_WORDS": max(len(slots), 1),
        "WEIGHT_WORDS": max(len(weights), 1),
        "ACTIVATION_WORDS": len(activations),
        "OUTPUT_WORDS": output_base,
    }
