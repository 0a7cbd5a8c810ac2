"""Groups of an array: cutting, its inverses, counts and sums, against plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax.terms.groups import GroupLayout, group_count, ragged_size


@st.composite
def cuts(draw):
    """An array of positive numbers and a layout of its groups."""
    extents = st.lists(st.sampled_from([1, 2, 3, 5, 8, 40]), min_size=1, max_size=4)
    shape = tuple(draw(extents.filter(lambda shape: np.prod(shape) <= 4096)))  # for plain loops
    first = draw(st.integers(0, len(shape) - 1))
    axes = tuple(range(first, draw(st.integers(first, len(shape) - 1)) + 1))
    signs = draw(st.booleans())
    axes = tuple(axis - len(shape) for axis in axes) if signs else axes
    x = np.arange(1, np.prod(shape) + 1).reshape(shape)
    return x, GroupLayout(draw(st.integers(1, 9)), axes)


def groups_one_by_one(x, layout):
    """Every group as a list, in the order of the other axes, then along the reduction."""
    axes = sorted(axis % x.ndim for axis in layout.axes)
    rows = np.moveaxis(x, axes, range(-len(axes), 0))
    rows = rows.reshape(-1, np.prod(rows.shape[x.ndim - len(axes) :]))
    return [
        row[start : start + layout.size].tolist()
        for row in rows
        for start in range(0, len(row), layout.size)
    ]


def members(groups, axis, size):
    """The groups along an axis as sorted lists, their padding left out."""
    rows = np.moveaxis(np.asarray(groups), axis, -1).reshape(-1, size)
    return sorted([value for value in row if value] for row in rows.tolist())


@given(cuts())
def test_groups_are_those_of_a_plain_loop(problem):
    x, layout = problem
    expected = sorted(groups_one_by_one(x, layout))
    _, axis = layout.merged(x.shape)
    assert members(layout.split(x), axis + 1, layout.size) == expected
    assert layout.count(x.shape) == len(expected)
    sums = layout.sums(x)
    assert sorted(sums.ravel().tolist()) == sorted(map(sum, expected))
    joined = layout.join(layout.split(x), x.shape)
    assert isinstance(joined, np.ndarray)
    chex.assert_trees_all_equal(joined, x)


@settings(max_examples=25)  # each compiles a program
@given(cuts())
def test_jax_cuts_the_same_groups_and_joins_them(problem):
    x, layout = problem

    @jax.jit
    def there_and_back(x):
        cut, split = layout.cut(x), layout.split(x)
        return cut, layout.uncut(cut, x.shape), layout.join(split, x.shape)

    cut, *back = there_and_back(x)
    assert members(cut, 1, layout.size) == sorted(groups_one_by_one(x, layout))
    for found in back:
        chex.assert_trees_all_equal(found, jnp.asarray(x))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)])
def test_empty_arrays_have_no_groups_or_none_but_empty_ones(shape):
    layout, x = GroupLayout(4, (1,)), np.zeros(shape)
    assert layout.count(shape) == 0
    assert layout.join(layout.split(x), shape).shape == shape


@pytest.mark.parametrize("shape", [(3, 3, 16, 2), (40, 40), (8,)])
def test_a_cut_has_a_long_last_axis_wherever_the_groups_lie(shape):
    for axis in range(len(shape)):
        lanes = GroupLayout(8, (axis,)).cut(jnp.zeros(shape)).shape[2]
        assert lanes >= min(32, np.prod(shape) // shape[axis])


def test_anew_at_each_window_position_or_flat():
    kernel = np.ones((3, 3, 5, 2), int)
    anew, flat = GroupLayout(4, axes=(2,)), GroupLayout(4, axes=(0, 1, 2))
    assert anew.sums(kernel)[..., 0].ravel().tolist() == [4, 1] * 9
    assert flat.sums(kernel)[:, 0].tolist() == [4] * 11 + [1]
    assert (anew.count(kernel.shape), flat.count(kernel.shape)) == (36, 24)


@pytest.mark.parametrize("array", [int, np.asarray, jnp.asarray])
def test_counts_of_any_kind_of_extent(array):
    assert group_count(array(20), array(8)) == 3
    assert ragged_size(array(20), array(8)) == 4
    assert ragged_size(array(16), array(8)) == 0
    assert jax.jit(group_count)(jnp.int32(17), jnp.int32(8)) == 3


@pytest.mark.parametrize(
    ("shape", "axes", "merged"),
    [
        ((2, 3, 4, 5), (1, 2), ((2, 12, 5), 1)),
        ((2, 3, 4, 5), (2, 1), ((2, 12, 5), 1)),
        ((2, 3, 4, 5), (-1,), ((2, 3, 4, 5), 3)),
    ],
)
def test_merged_axes(shape, axes, merged):
    assert GroupLayout(8, axes).merged(shape) == merged


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="positive integer"):
        GroupLayout(0, (0,))
    for axes in ((), (0, 2)):
        with pytest.raises(ValueError, match="adjacent and at least one"):
            GroupLayout(8, axes).merged((2, 3, 4))
