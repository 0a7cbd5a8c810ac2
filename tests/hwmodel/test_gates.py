"""Energy by gates: events counted by hand, and what a measured table cannot price."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from stp_jax import hwmodel, terms
from stp_jax.hwmodel import gates

_ENTRIES = (*gates.MAC_EVENTS, *gates.GROUP_EVENTS, *gates.EDGE_EVENTS)
NETWORK = hwmodel.Network((hwmodel.dense("fc", 64, 16, rows=5),))
GROUP_ARRAY = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8))
MAC_ARRAY = hwmodel.Array(rows=4, cols=4)


def _technology(**energies):
    """All events cost next to nothing, save the given ones."""
    priced = dict.fromkeys(_ENTRIES, 1e-12) | energies
    priced |= dict.fromkeys(("sram_8kib_64b", "sram_32kib_64b", "sram_1mib_64b", "dram_64b"), 1.0)
    return hwmodel.Technology(
        name="counting",
        node_nm=45.0,
        energy_pj=priced,
        area_um2={},
        sources=tuple((f"energy_pj.{name}", "counts events") for name in priced),
        basis="gates",
    )


def _count(event, array=GROUP_ARRAY, component="array", **arguments):
    report = hwmodel.evaluate(NETWORK, array, technology=_technology(**{event: 1.0}), **arguments)
    return report.energy_pj[component].item()


@pytest.mark.parametrize(
    ("event", "per_group"),
    [
        ("group", 1),
        ("group_second_term", 1),
        ("group_third_term", 1),
        ("group_further_term", 2),
        ("group_live_term", 4 * 0.6),
        ("group_live_pair", 1 - 0.4**5 - 5 * 0.6 * 0.4**4),
    ],
)
def test_full_groups_have_an_event_for_each_of_their_terms(event, per_group):
    groups = 64 // 8 * 16 * 5
    assert _count(event, budgets=5) == pytest.approx(groups * per_group, rel=1e-6)


def test_loading_clocks_the_resident_registers_of_all_rows():
    folds = 2 * 2  # 8 groups on 4 rows, 5 pixels on 4 columns
    assert _count("group_load", budgets=5) == pytest.approx(folds * 4 * 4 * 4)
    folds = 16 * 2
    assert _count("mac_load", MAC_ARRAY) == pytest.approx(folds * 4 * 4 * 4)


def test_slots_without_a_term_are_empty():
    weights = np.zeros((64, 16), np.int64)
    weights[::8] = 5  # two terms, in one weight of every group
    groups = 64 // 8 * 16 * 5
    counted = {
        event: _count(event, budgets=6, weights={"fc": weights}) for event in gates.GROUP_EVENTS
    }
    assert counted["group"] == counted["group_second_term"] == pytest.approx(groups)
    assert counted["group_third_term"] == pytest.approx(0, abs=1e-3)
    assert counted["group_first_empty_slot"] == pytest.approx(groups)
    assert counted["group_further_empty_slot"] == pytest.approx(groups * 3)


def test_zeros_and_bits_are_those_of_the_activations():
    inputs = np.full((5, 64), 5)
    inputs[:, ::4] = 0
    macs, live = 64 * 16 * 5, 64 // 8 * 16 * 5
    assert _count("mac_bit", MAC_ARRAY) == pytest.approx(3.0 * macs)
    assert _count("mac_bit", MAC_ARRAY, activations={"fc": inputs}) == pytest.approx(2.25 * macs)
    given = {"activations": {"fc": inputs}, "budgets": 2}
    assert _count("group_live_term", **given) == pytest.approx(0.75 * live)


def test_the_edge_serialises_every_group_that_is_read():
    read = 64 // 8 * 16 * 2  # once for each of two column folds
    assert _count("edge_group", component="encoder", budgets=5) == pytest.approx(read)
    assert _count("edge_second_slot", component="encoder", budgets=5) == pytest.approx(read)
    further = _count("edge_further_slot", component="encoder", budgets=5)
    assert further == pytest.approx(3 * read)
    packed = dataclasses.replace(GROUP_ARRAY, pe=hwmodel.GroupPE(group_size=8, packed=True))
    assert _count("edge_group", packed, component="encoder", budgets=5) == 0.0


def test_the_edge_serialises_ragged_groups_as_the_whole_ones():
    network = hwmodel.Network(
        (hwmodel.conv("c", (4, 4), channels=3, filters=16, kernel=(3, 3), padding="SAME"),)
    )
    array = dataclasses.replace(GROUP_ARRAY, pe=hwmodel.GroupPE(group_size=8, grouping="channels"))
    technology = _technology(edge_group=1.0)
    report = hwmodel.evaluate(network, array, technology=technology, budgets=5)
    folds = 4 * 4 // 4  # of the output pixels onto four columns
    assert report.energy_pj["encoder"].item() == pytest.approx(9 * 16 * folds)


def test_a_group_without_a_budget_has_its_own_slot_only():
    groups = 64 // 8 * 16 * 5
    assert _count("group", budgets=0) == pytest.approx(groups)
    assert _count("group_further_empty_slot", budgets=0) == pytest.approx(0, abs=1e-6)


def test_the_least_int8_activation_does_not_halve_the_others():
    inputs = np.full((5, 64), 1)
    inputs[0, 0] = -128
    live = 64 // 8 * 16 * 5
    given = {"activations": {"fc": inputs}, "budgets": 2}
    assert _count("group_live_term", **given) == pytest.approx(live)


@pytest.mark.parametrize(
    "array",
    [
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=16)),
        hwmodel.Array(rows=4, cols=4, dataflow="ws", pe=hwmodel.GroupPE(group_size=8)),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.TermMac(group_size=8, data_terms=2)),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.Stripes()),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitWave(lanes=16)),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitVert(lanes=8, pruned_columns=2)),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.Bitlet()),
        hwmodel.Array(rows=4, cols=4, dataflow="os", pe=hwmodel.BitWave()),
        hwmodel.Array(rows=4, cols=4, pe=hwmodel.DotProduct(lanes=4)),
    ],
)
def test_what_was_not_measured_has_no_energy_by_gates(array):
    weights = {"fc": np.zeros((64, 16), np.int64)}
    inputs = {"fc": np.zeros((5, 64), np.int64)}
    with pytest.raises(ValueError, match="are those of netlists"):
        hwmodel.evaluate(
            NETWORK, array, weights=weights, activations=inputs, technology=_technology()
        )


def test_what_was_measured_is_said():
    for pe, known in (
        (hwmodel.Stripes(), "Stripes with lanes=8 and serial='weights', inputs resident"),
        (hwmodel.Laconic(), "BitParallel, DotProduct, Stripes"),
    ):
        array = hwmodel.Array(rows=4, cols=4, pe=pe)
        with pytest.raises(hwmodel.technology.MissingEntryError, match=known):
            hwmodel.evaluate(NETWORK, array, technology=hwmodel.NANGATE_45NM_GATES)


def test_energies_by_gates_and_by_the_table_are_not_compared():
    by_table = hwmodel.evaluate(NETWORK, MAC_ARRAY)
    by_gates = hwmodel.evaluate(NETWORK, GROUP_ARRAY, budgets=8, technology=_technology())
    assert (by_table.priced, by_gates.priced) == ("45 nm, by the table", "45 nm, by gates")
    with pytest.raises(ValueError, match="by gates"):
        hwmodel.computational_saving(by_table, by_gates)


def test_energy_by_gates_has_a_gradient_in_the_budget():
    technology = hwmodel.NANGATE_45NM_GATES

    def energy(k):
        report = hwmodel.evaluate(
            NETWORK, GROUP_ARRAY, budgets=k, technology=technology, smoothing=0.05
        )
        return report.energy_pj["array"].sum()

    for k in (1.5, 4.0, 8.0):
        slope = jax.grad(energy)(k)
        assert slope > 0
        assert slope == pytest.approx((energy(k + 0.5) - energy(k - 0.5)), rel=0.2)


def test_terms_are_sorted_into_the_events_exactly():
    """Against a count of the weights' own digits, group by group."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(64, 16)) * 30
    weights = np.array(terms.project(drawn, group_size=8, budget=4, axis=0))
    weights[:8] = 0
    held = np.asarray(terms.count(weights)).reshape(8, 8, 16).sum(axis=1)
    given = {"budgets": 4, "weights": {"fc": weights}}
    for event, expected in {
        "group_second_term": held >= 2,
        "group_third_term": held >= 3,
        "group_further_term": np.maximum(held - 3, 0),
        "group_first_empty_slot": (held > 0) & (held < 4),
        "group_further_empty_slot": np.where(held == 0, 3, np.maximum(3 - held, 0)),
    }.items():
        assert _count(event, **given) == pytest.approx(5 * expected.sum(), abs=1e-3), event


def test_pes_of_several_lanes_are_priced_by_passes():
    lanes = 4
    entries = dict.fromkeys(gates.lane_event_names(lanes), 1e-12)
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8, lanes=lanes))
    groups, read = 64 // 8 * 16 * 5, 64 // 8 * 16 * 2
    sparse = np.zeros((64, 16), np.int64)
    sparse[::8] = 5  # two terms, in one weight of every group

    def count(event, component="array", **arguments):
        technology = _technology(**{**entries, event: 1.0})
        report = hwmodel.evaluate(NETWORK, array, technology=technology, **arguments)
        return report.energy_pj[component].item()

    full, few = {"budgets": 6}, {"budgets": 6, "weights": {"fc": sparse}}
    for given, expected in (
        (full, {"": 2, "_moved_lane": 6, "_bit": 3.0 * 6}),
        # Three lanes of each of two passes, a third of which hold a term.
        (few, {"": 2, "_moved_lane": 6 * (1 - (2 / 3) ** 2), "_bit": 3.0 * 2}),
        ({"budgets": 7}, {"": 2, "_moved_lane": 8 * (1 - (1 / 8) ** 2), "_bit": 3.0 * 7}),
    ):
        for part, each in expected.items():
            assert count(f"pass_4{part}", **given) == pytest.approx(each * groups), part
    for given, expected in (
        (full, {"second_term": 1, "third_term": 1, "early_term": 4, "vacant_lane": 2}),
        (few, {"second_term": 1, "third_term": 0, "early_term": 2, "vacant_lane": 4}),
    ):
        for part, each in {"group": 1, "further_pass": 1, **expected}.items():
            counted = count(f"edge_4_{part}", "encoder", **given)
            assert counted == pytest.approx(each * read, abs=1e-6), part
    with pytest.raises(ValueError, match="pass_4"):
        hwmodel.evaluate(NETWORK, array, budgets=6, technology=_technology())


def test_bits_of_several_lanes_are_those_of_stored_activations():
    signed = {"fc": np.array([[-128, -127, 0, 127]])}  # stored as 0, 1, 128 and 255
    assert gates.stored_bits(NETWORK, signed) == pytest.approx((0 + 1 + 8 + 8) / 4)
    unsigned = {"fc": np.array([[0, 1, 100, 254]])}  # halved, to 0, 0, 50 and 127
    assert gates.stored_bits(NETWORK, unsigned) == pytest.approx((0 + 0 + 6 + 7) / 4)
    assert gates.stored_bits(NETWORK, None) == pytest.approx(gates.MEAN_BITS)


RAGGED = hwmodel.Network((hwmodel.dense("fc", 11, 5, rows=3),))  # groups of 8 and of 3 weights


def _counted(pe, **operands):
    """Every event of a PE on RAGGED, on an array of 2 rows and 2 columns."""
    network = RAGGED
    work = hwmodel.pes.Workload(
        network=network,
        folding=hwmodel.arrays.fold(network, hwmodel.Array(rows=2, cols=2, pe=pe)),
        basis="gates",
        **operands,
    )
    counted = pe.activity(work).gates
    return {name.partition("_")[2]: np.ravel(count).item() for name, count in counted.items()}


def test_dot_products_are_priced_by_steps_and_bits():
    inputs = {"fc": np.full((3, 11), 5)}
    for lanes, steps, row_folds in ((8, 2, 1), (1, 11, 6)):
        counted = _counted(hwmodel.DotProduct(lanes=lanes), activations=inputs)
        folds = row_folds * 2
        assert counted == {
            f"{lanes}_step": steps * 5 * 3,
            f"{lanes}_bit": 3 * 11 * 5 * 3,
            f"{lanes}_load": folds * 2 * 2,
            f"{lanes}_bus": folds * 2 * 2 * 2,
        }


@pytest.mark.parametrize("bits", gates.NARROW_WEIGHTS)
def test_dot_products_of_narrow_weights_are_priced_by_the_bits_that_change(bits):
    largest = (1 << (bits - 1)) - 1
    weights = np.random.default_rng(bits).integers(-largest, largest + 1, (11, 5))
    inputs = {"fc": np.full((3, 11), 5)}
    pe = hwmodel.DotProduct(lanes=8, weight_bits=bits)
    counted = _counted(pe, activations=inputs, weights={"fc": weights})
    changed = 0
    for lane in weights.tolist():
        before = [0] * bits
        for weight in lane:
            now = _bits(weight, bits)
            changed += sum(a != b for a, b in zip(before, now, strict=True))
            before = now
    name = f"8_w{bits}"
    expected = {"step": 2 * 5 * 3, "bit": changed * 3 * 3, "load": 2 * 4, "bus": 2 * 4 * 2}
    assert counted == {f"{name}_{event}": count for event, count in expected.items()}


def test_narrow_weights_are_checked_and_not_priced_by_the_table():
    array = hwmodel.Array(rows=2, cols=2, pe=hwmodel.DotProduct(lanes=8, weight_bits=4))
    by_gates = {"technology": hwmodel.NANGATE_45NM_GATES}
    for weights, message in (
        (None, "pass weights="),
        ({"fc": np.full((11, 5), 8)}, "weight 8 exceeds int4"),
        ({"fc": np.full((11, 5), 9)}, "weight 9 in magnitude exceeds 4 bits"),
        ({"fc": np.ones((11, 5), int), "gone": np.ones(1, int)}, "gone"),
    ):
        with pytest.raises(ValueError, match=message):
            hwmodel.evaluate(RAGGED, array, weights=weights, **by_gates)
    lowest = {"fc": np.full((11, 5), -8)}
    assert hwmodel.evaluate(RAGGED, array, weights=lowest, **by_gates).energy_pj["array"] > 0
    with pytest.raises(hwmodel.technology.MissingEntryError, match="int8_by_int4_multiply"):
        hwmodel.evaluate(RAGGED, array, weights=lowest)
    with pytest.raises(ValueError, match="from 2 to 8, got 9"):
        hwmodel.DotProduct(weight_bits=9)
    for pe in (hwmodel.DotProduct(lanes=4, weight_bits=4), hwmodel.DotProduct(weight_bits=5)):
        with pytest.raises(hwmodel.technology.MissingEntryError, match="weight_bits=4, 3 or 2"):
            hwmodel.evaluate(
                RAGGED, hwmodel.Array(rows=2, cols=2, pe=pe), weights=lowest, **by_gates
            )


def _bits(weight, precision=8):
    """Two's complement, sign first."""
    return [weight >> e & 1 for e in range(precision - 1, -1, -1)]


def _groups(weights):
    return [weights[:8], np.pad(weights[8:], ((0, 5), (0, 0)))]


def _column_sequences(weights, precision):
    """What the lanes of each group see, one column a cycle: lists of 8 bits."""
    for group in _groups(weights):
        lanes = [[b for w in lane for b in _bits(int(w), precision)] for lane in group]
        yield [[0] * 8, *map(list, zip(*lanes, strict=True))]


def test_digit_serial_pes_are_priced_by_what_their_lanes_see():
    rng = np.random.default_rng(3)
    weights = rng.integers(-60, 61, (11, 5))
    weights[:8, 2] = 0
    operands = {"weights": {"fc": weights}, "activations": {"fc": np.full((3, 11), 5)}}
    bits, pixels, groups, loads = 3, 3, 2 * 5, {"load": 2 * 4, "bus": 2 * 8}

    def changes(precision):
        pairs = [
            (before, now)
            for sequence in _column_sequences(weights, precision)
            for before, now in itertools.pairwise(sequence)
        ]
        each = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs]
        return pixels * sum(each), pixels * sum(n > 0 for n in each)

    changed, _ = changes(7)
    stripes = hwmodel.Stripes(lanes=8, serial="weights")
    assert _counted(stripes, **operands) == loads | {
        "group": groups * pixels,
        "cycle": groups * 7 * pixels,
        "bit": changed * bits,
    }
    changed, columns = changes(8)
    assert _counted(hwmodel.BitVert(lanes=8), **operands) == loads | {
        "group": groups * pixels,
        "changed_column": columns,
        "bit": changed * bits,
    }
    each = [group[:, m] for group in _groups(weights) for m in range(5)]
    slowest = [max(1, max(int(abs(w)).bit_count() for w in group)) for group in each]
    ones = sum(int(abs(w)).bit_count() for w in weights.flat)
    pragmatic = hwmodel.BitPragmatic(lanes=8, serial="weights")
    assert _counted(pragmatic, **operands) == loads | {
        "group": groups * pixels,
        "cycle": sum(slowest) * pixels,
        "term": ones * pixels,
        "bit": ones * bits * pixels,
    }
    columns = [max(1, int(np.bitwise_or.reduce(np.abs(g))).bit_count()) for g in each]
    seen = sum(columns[:5]) * 8 + sum(columns[5:]) * 3
    assert _counted(hwmodel.BitWave(), **operands) == loads | {
        "group": groups * pixels,
        "cycle": sum(columns) * pixels,
        "bit": seen * bits * pixels,
    }


def test_tmac_is_priced_by_slots_and_pairs():
    weights = np.zeros((11, 5), np.int64)
    weights[::8] = 5  # two terms in each group
    inputs = np.zeros((3, 11), np.int64)
    inputs[:, :5] = 85  # four terms, of which it holds three
    counted = _counted(
        hwmodel.TermMac(group_size=8),
        budgets=4,
        weights={"fc": weights},
        activations={"fc": inputs},
    )
    groups = 2 * 5 * 3
    assert counted == pytest.approx(
        {
            "mac_group": groups,
            "mac_slot": groups * 4 * 3,
            "mac_pair": groups * 2 * 3 * 5 / 11,
            "mac_load": 2 * 4,
            "mac_bus": 2 * 8,
        }
    )


def test_the_measured_table_prices_every_measured_pe():
    rng = np.random.default_rng(0)
    operands = {
        "weights": {"fc": rng.normal(scale=36, size=(64, 16)).round().clip(-127, 127).astype(int)},
        "activations": {"fc": rng.integers(0, 128, (5, 64))},
    }

    def array_pj(pe, **more):
        array = hwmodel.Array(rows=4, cols=4, pe=pe)
        report = hwmodel.evaluate(
            NETWORK, array, technology=hwmodel.NANGATE_45NM_GATES, **operands, **more
        )
        assert pe.area_um2(hwmodel.NANGATE_45NM_GATES) > 0
        return report.energy_pj["array"].item() / NETWORK.macs

    mac, one, eight = map(
        array_pj, (hwmodel.BitParallel(), hwmodel.DotProduct(lanes=1), hwmodel.DotProduct(lanes=8))
    )
    assert eight < one < mac
    for pe in (
        hwmodel.Stripes(lanes=8, serial="weights"),
        hwmodel.BitPragmatic(lanes=8, serial="weights"),
        hwmodel.BitWave(),
        hwmodel.BitVert(lanes=8),
        hwmodel.TermMac(group_size=8),
    ):
        assert array_pj(pe) > eight


def test_a_layer_has_one_precision_in_all_its_products():
    layer = hwmodel.conv("c", (2, 2), channels=4, filters=4, kernel=(1, 1), groups=2)
    weights = np.array([[-3, 3, 100, 100], [1, 1, 1, -1]])[None, None]  # 3 bits and 8 bits
    pe = hwmodel.Stripes(lanes=8, serial="weights")
    network = hwmodel.Network((layer,))
    folding = hwmodel.arrays.fold(network, hwmodel.Array(rows=1, cols=1, pe=pe))
    work = hwmodel.pes.Workload(
        network=network, folding=folding, weights={"c": weights}, basis="gates"
    )
    activity = pe.activity(work)
    assert activity.gates["stripes_cycle"].item() == 8 * 4 * layer.P
    assert activity.cycles.item() == 8 * 4 * layer.P
