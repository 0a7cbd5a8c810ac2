import itertools

import numpy as np
import pytest

from stp_jax import hwmodel

LAYER = hwmodel.conv("c", (5, 6), channels=6, filters=10, kernel=(3, 3), groups=2)
NETWORK = hwmodel.Network((LAYER, hwmodel.dense("d", 11, 7, rows=3)))


ALL = (
    hwmodel.Stripes(lanes=4),
    hwmodel.BitPragmatic(lanes=4),
    hwmodel.Laconic(lanes=4),
    hwmodel.Bitlet(lanes=4),
    hwmodel.BitWave(lanes=4),
    hwmodel.BitVert(lanes=4),
)


def operands(seed=0):
    rng = np.random.default_rng(seed)
    weights = {"c": rng.integers(-127, 128, (3, 3, 3, 10)), "d": rng.integers(-127, 128, (11, 7))}
    activations = {"c": rng.integers(0, 200, (1, 5, 6, 6)), "d": rng.integers(0, 16, (3, 11))}
    return weights, activations


def patch(group, position):
    """Inputs under the window of one output pixel, (K,), by definition of the convolution."""
    row, col = divmod(position, 6)
    padded = np.pad(operands()[1]["c"][0], ((1, 1), (1, 1), (0, 0)))
    return padded[row : row + 3, col : col + 3, 3 * group : 3 * group + 3].reshape(-1)


def ones(x):
    return bin(abs(int(x))).count("1")


def booth_terms(x):
    """Non-zero radix-4 Booth digits -2 b[2i+1] + b[2i] + b[2i-1] of a two's complement."""
    bit = [0, *((int(x) >> e & 1) for e in range(10))]
    return sum(-2 * bit[i + 2] + bit[i + 1] + bit[i] != 0 for i in range(0, 10, 2))


RULES = {
    "BitPragmatic": lambda w, a: max(ones(x) for x in a),
    "Bitlet": lambda w, a: max(sum(abs(int(x)) >> e & 1 for x in w) for e in range(8)),
    "BitWave": lambda w, a: sum(any(abs(int(x)) >> e & 1 for x in w) for e in range(8)),
    "BitVert": lambda w, a: 8,
}


def brute_force(rule, dataflow, rows, cols, lanes):
    """Walks over every fold and step of the grouped convolution, and waits for the slowest PE."""
    weights = operands()[0]["c"].reshape(27, 2, 5)
    K, P, M = 27, 30, 5
    cuts = [range(start, min(start + lanes, K)) for start in range(0, K, lanes)]
    total = 0
    for group in range(2):
        patches = np.stack([patch(group, p) for p in range(P)], axis=1)

        def pe_cycles(cut, m, p, group=group, patches=patches):
            return max(rule(weights[list(cut), group, m], patches[list(cut), p]), 1)

        places = {"is": (cuts, range(P)), "ws": (cuts, range(M)), "os": (range(P), range(M))}
        row_places, col_places = places[dataflow]
        steps = {"is": range(M), "ws": range(P), "os": cuts}[dataflow]
        for r, c in itertools.product(
            range(0, len(row_places), rows), range(0, len(col_places), cols)
        ):
            held = list(itertools.product(row_places[r : r + rows], col_places[c : c + cols]))
            for step in steps:
                order = {
                    "is": lambda row, col, s: (row, s, col),
                    "ws": lambda row, col, s: (row, col, s),
                    "os": lambda row, col, s: (s, col, row),
                }[dataflow]
                total += max(pe_cycles(*order(row, col, step)) for row, col in held)
    return total


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
@pytest.mark.parametrize("name", RULES)
def test_slowest_lane_cycles_are_those_of_a_walk_over_all_steps(name, dataflow):
    pe = next(pe for pe in ALL if type(pe).__name__ == name)
    weights, activations = operands()
    array = hwmodel.Array(rows=3, cols=4, dataflow=dataflow, pe=pe)
    kwargs = {"weights": weights, "activations": activations}
    report = hwmodel.evaluate(
        hwmodel.Network((LAYER,)),
        array,
        **{what: {"c": given["c"]} for what, given in kwargs.items()},
    )
    fill = hwmodel.arrays.fold(hwmodel.Network((LAYER,)), array).fill_cycles
    expected = brute_force(RULES[name], dataflow, 3, 4, 4)
    np.testing.assert_array_equal(report.cycles - fill, [expected])


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
def test_laconic_takes_the_product_of_both_term_counts(dataflow):
    weights, activations = operands()
    pe = hwmodel.Laconic(lanes=4)
    network = hwmodel.Network((LAYER,))
    array = hwmodel.Array(rows=3, cols=4, dataflow=dataflow, pe=pe)
    report = hwmodel.evaluate(
        network, array, weights={"c": weights["c"]}, activations={"c": activations["c"]}
    )

    def pairs(w, a):
        return max(booth_terms(x) * booth_terms(y) for x, y in zip(w, a, strict=True))

    fill = hwmodel.arrays.fold(network, array).fill_cycles
    np.testing.assert_array_equal(report.cycles - fill, [brute_force(pairs, dataflow, 3, 4, 4)])


def test_stripes_serves_the_layers_precision():
    activations = operands()[1]
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.Stripes(lanes=4))
    report = hwmodel.evaluate(NETWORK, array, activations=activations)
    folding = hwmodel.arrays.fold(NETWORK, array)
    # Activations below 200 need 8 bits, below 16 four.
    assert activations["d"].max() == 15
    np.testing.assert_array_equal(
        report.cycles, folding.fill_cycles + folding.folds * folding.steps * [8, 4]
    )


def test_bitvert_adds_at_most_half_of_each_column():
    weights, _ = operands()
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.BitVert(lanes=4))
    known = hwmodel.evaluate(NETWORK, array, weights=weights)
    bound = hwmodel.evaluate(NETWORK, array)
    assert (known.operations["terms"] <= bound.operations["terms"]).all()
    np.testing.assert_array_equal(known.cycles, bound.cycles)
    pruned = hwmodel.Array(rows=3, cols=4, pe=hwmodel.BitVert(lanes=4, pruned_columns=4))
    fill = hwmodel.arrays.fold(NETWORK, array).fill_cycles
    halved = hwmodel.evaluate(NETWORK, pruned)
    np.testing.assert_array_equal(2 * (halved.cycles - fill), bound.cycles - fill)


@pytest.mark.parametrize("pe", ALL, ids=lambda pe: type(pe).__name__)
def test_arithmetic_does_not_depend_on_the_arrays_size(pe):
    weights, activations = operands()
    energies = [
        hwmodel.evaluate(
            NETWORK,
            hwmodel.Array(rows=rows, cols=cols, pe=pe),
            weights=weights,
            activations=activations,
        ).energy_pj["array"]
        for rows, cols in ((1, 1), (3, 4), (16, 2))
    ]
    np.testing.assert_allclose(energies[1], energies[0])
    np.testing.assert_allclose(energies[2], energies[0])


@pytest.mark.parametrize("pe", ALL, ids=lambda pe: type(pe).__name__)
def test_zero_operands_still_take_a_cycle_a_step_and_add_nothing(pe):
    weights, activations = operands()
    zeros = [{name: 0 * x for name, x in given.items()} for given in (weights, activations)]
    array = hwmodel.Array(rows=3, cols=4, pe=pe)
    report = hwmodel.evaluate(NETWORK, array, weights=zeros[0], activations=zeros[1])
    folding = hwmodel.arrays.fold(NETWORK, array)
    least = 8 if isinstance(pe, hwmodel.BitVert) else 1
    np.testing.assert_array_equal(
        report.cycles, folding.fill_cycles + least * folding.folds * folding.steps
    )
    if not isinstance(pe, hwmodel.Stripes):
        assert report.operations["terms"].sum() == 0


def test_patches_may_be_given_instead_of_the_input():
    weights, activations = operands()
    patches = np.stack([np.concatenate([patch(g, p) for g in range(2)]) for p in range(30)], axis=0)
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.Laconic(lanes=4))
    reports = [
        hwmodel.evaluate(NETWORK, array, weights=weights, activations=activations | {"c": given})
        for given in (activations["c"], patches)
    ]
    np.testing.assert_array_equal(reports[0].cycles, reports[1].cycles)


@pytest.mark.parametrize("pe", ALL[1:5], ids=lambda pe: type(pe).__name__)
def test_missing_operands_are_named(pe):
    with pytest.raises(ValueError, match=f"{type(pe).__name__} takes depends on the digits"):
        hwmodel.evaluate(NETWORK, hwmodel.Array(rows=3, cols=4, pe=pe))


def test_bad_operands_and_lanes_are_refused():
    activations = operands()[1]
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.BitPragmatic(lanes=4))
    for bad, error in (
        ({"c": activations["c"][:, :4], "d": activations["d"]}, ValueError),
        ({"c": activations["c"] + 100, "d": activations["d"]}, ValueError),
        ({"c": activations["c"] / 2, "d": activations["d"]}, TypeError),
        (activations | {"e": activations["d"]}, ValueError),
    ):
        with pytest.raises(error):
            hwmodel.evaluate(NETWORK, array, activations=bad)
    with pytest.raises(ValueError, match="no budgets"):
        hwmodel.evaluate(NETWORK, array, budgets=3, activations=activations)
    with pytest.raises(ValueError, match="positive integer"):
        hwmodel.Stripes(lanes=0)
    with pytest.raises(ValueError, match="0 to 6"):
        hwmodel.BitVert(pruned_columns=7)


def test_bitlet_counts_beyond_a_byte():
    network = hwmodel.Network((hwmodel.dense("d", 512, 3),))
    array = hwmodel.Array(rows=1, cols=1, pe=hwmodel.Bitlet(lanes=512))
    report = hwmodel.evaluate(network, array, weights={"d": np.ones((512, 3), np.int32)})
    fill = hwmodel.arrays.fold(network, array).fill_cycles
    np.testing.assert_array_equal(report.cycles - fill, [3 * 512])


def test_bitlet_writes_its_sum_once_a_step():
    network = hwmodel.Network((hwmodel.dense("d", 64, 3, rows=5),))
    bits = []
    for weight in (1, 127):  # 64 cycles a step either way; 1 or 7 additions a weight
        weights = {"d": np.full((64, 3), weight)}
        array = hwmodel.Array(rows=1, cols=1, pe=hwmodel.Bitlet())
        report = hwmodel.evaluate(network, array, weights=weights)
        per_bit = hwmodel.HOROWITZ_45NM.energy_pj["register_bit"]
        bits.append(report.energy_pj["registers"].item() / per_bit)
    additions = 64 * 3 * 5
    operands = bits[0] - 16 * additions - 32 * 3 * 5
    assert bits[1] - 16 * 7 * additions - 32 * 3 * 5 == pytest.approx(operands)
    stream, store = 64 * 3 * 5 * 8, 64 * 5 * 8
    assert operands == pytest.approx(stream + store)


def test_laconics_nominal_rate_is_that_of_the_busiest_digits():
    most = max(booth_terms(w) for w in range(-128, 128)) * max(booth_terms(a) for a in range(256))
    assert hwmodel.Laconic(lanes=40).nominal_macs() == 40 / most


def test_stripes_takes_the_precisions_given():
    activations = operands()[1]
    pe = hwmodel.Stripes(lanes=4, precisions={"c": 5, "d": 3})
    array = hwmodel.Array(rows=3, cols=4, pe=pe)
    folding = hwmodel.arrays.fold(NETWORK, array)
    for given in (None, activations):
        report = hwmodel.evaluate(NETWORK, array, activations=given)
        np.testing.assert_array_equal(
            report.cycles, folding.fill_cycles + folding.folds * folding.steps * [5, 3]
        )
    assert hash(pe) == hash(hwmodel.Stripes(lanes=4, precisions={"d": 3, "c": 5}))
    with pytest.raises(ValueError, match="precisions name no layer: e"):
        hwmodel.evaluate(
            NETWORK, hwmodel.Array(rows=3, cols=4, pe=hwmodel.Stripes(precisions={"e": 3}))
        )
    with pytest.raises(ValueError, match="positive integer"):
        hwmodel.Stripes(precisions={"c": 0})


def test_stripes_counts_the_sign_and_checks_shapes():
    network = hwmodel.Network((hwmodel.dense("d", 4, 3),))
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.Stripes(lanes=4))
    folding = hwmodel.arrays.fold(network, array)
    for extreme, bits in ((127, 7), (-1, 1), (-64, 7), (-127, 8), (255, 8)):
        given = {"d": np.array([[extreme, 0, 0, 0]])}
        report = hwmodel.evaluate(network, array, activations=given)
        streaming = report.cycles - folding.fill_cycles
        np.testing.assert_array_equal(streaming, bits * folding.folds * folding.steps)
    with pytest.raises(ValueError, match="neither the input"):
        hwmodel.evaluate(network, array, activations={"d": np.ones((1, 5), np.int32)})


def test_a_layers_patches_are_made_once(monkeypatch):
    made = []
    original = hwmodel.bitserial.layer_patches
    monkeypatch.setattr(
        hwmodel.bitserial, "layer_patches", lambda *args: made.append(1) or original(*args)
    )
    weights, activations = operands()
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.Laconic(lanes=4))
    hwmodel.evaluate(NETWORK, array, weights=weights, activations=activations)
    assert len(made) == len(NETWORK)


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
def test_bit_pragmatic_takes_the_ones_of_its_serial_operand(dataflow):
    weights, _ = operands()
    network = hwmodel.Network((LAYER,))
    pe = hwmodel.BitPragmatic(lanes=4, serial="weights")
    array = hwmodel.Array(rows=3, cols=4, dataflow=dataflow, pe=pe)
    report = hwmodel.evaluate(network, array, weights={"c": weights["c"]})
    fill = hwmodel.arrays.fold(network, array).fill_cycles
    expected = brute_force(lambda w, a: max(map(ones, w)), dataflow, 3, 4, 4)
    np.testing.assert_array_equal(report.cycles - fill, [expected])
    added = 30 * sum(map(ones, weights["c"].flat))
    np.testing.assert_array_equal(report.operations["terms"], [added])


def test_stripes_serves_the_precision_of_its_serial_operand():
    network = hwmodel.Network((hwmodel.dense("d", 4, 3),))
    array = hwmodel.Array(rows=3, cols=4, pe=hwmodel.Stripes(lanes=4, serial="weights"))
    folding = hwmodel.arrays.fold(network, array)
    activations = {"d": np.array([[255, 0, 0, 0]])}
    for weights, bits in ((None, 8), ({"d": np.full((4, 3), -20)}, 6)):
        report = hwmodel.evaluate(network, array, weights=weights, activations=activations)
        np.testing.assert_array_equal(
            report.cycles, folding.fill_cycles + bits * folding.folds * folding.steps
        )
    for pe in (hwmodel.Stripes, hwmodel.BitPragmatic):
        with pytest.raises(ValueError, match="serial must be one of"):
            pe(serial="inputs")
