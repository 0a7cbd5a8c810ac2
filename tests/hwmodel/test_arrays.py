import numpy as np
import pytest
from networks import SMALL

from stp_jax import hwmodel


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(0, 4), (4, 2.5), (-1, 4), (np.inf, 4), (4, np.nan), (4, 2**53), (2**70, 4)],
)
def test_sizes_must_be_positive_integers(rows, cols):
    with pytest.raises(ValueError, match="positive integer"):
        hwmodel.Array(rows=rows, cols=cols)


def test_an_unknown_dataflow_is_refused():
    with pytest.raises(ValueError, match="dataflow"):
        hwmodel.Array(rows=4, cols=4, dataflow="rs")


@pytest.mark.parametrize(
    ("dataflow", "row_extent", "col_extent", "steps"),
    [("is", "K", "P", "M"), ("ws", "K", "M", "P"), ("os", "P", "M", "K")],
)
def test_what_exceeds_the_array_is_folded(dataflow, row_extent, col_extent, steps):
    folding = hwmodel.arrays.fold(SMALL, hwmodel.Array(rows=8, cols=12, dataflow=dataflow))
    np.testing.assert_array_equal(folding.row_folds, np.ceil(SMALL.extents(row_extent) / 8))
    np.testing.assert_array_equal(folding.col_folds, np.ceil(SMALL.extents(col_extent) / 12))
    np.testing.assert_array_equal(folding.steps, SMALL.extents(steps))
