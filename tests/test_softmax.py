"""softmax of rows of several segments: its error, and what leaves its bits alone. By the reference model."""

import numpy as np
import pytest

from shared_specs.programs import softmax
from shared_specs.reference.rows import run_rows
from shared_specs.rows import ROW_CONTRACT
from tests.row_programs import uneven_rows

SEGMENT = ROW_CONTRACT.segment


def shares(x: np.ndarray) -> np.ndarray:
    return run_rows(softmax.SOFTMAX, {"x": np.asarray(x, np.float32)})["y"]


def error(x: np.ndarray) -> float:
    """The largest, in units in the last place of the float64 result, also where that is subnormal in float32."""
    terms = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    exact = terms / terms.sum(axis=1, keepdims=True)
    ulp = np.spacing(np.maximum(exact, 2.0**-126).astype(np.float32)).astype(np.float64)
    return float((np.abs(shares(x) - exact) / ulp).max())


def test_error_where_maxima_differ():
    """Differences between elements are exact; weights down to e^-104, some of them subnormal."""
    assert error(uneven_rows(20_000)[:4].numpy()) < 3
    rng = np.random.default_rng(0)
    near_underflow = rng.uniform(-104, -80, (8, 3)) + rng.permuted(np.tile([104.0, 0, 0], (8, 1)), axis=1)
    x = np.repeat(np.round(near_underflow * 8) / 8, SEGMENT, axis=1) + np.round(8 * rng.normal(size=(8, 3 * SEGMENT))) / 8
    y = shares(x)
    assert ((y > 0) & (y < 2.0**-126)).sum() > 1000
    assert error(x.astype(np.float32)) < 3


@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_segments_without_anything_are_neutral(before, behind):
    """The only segment that is not -inf throughout has the weight 1: its bits are those of the segment alone."""
    x = np.random.default_rng(before).normal(size=(2, SEGMENT)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (before * SEGMENT, behind * SEGMENT)), constant_values=-np.inf)
    y = shares(padded)
    np.testing.assert_array_equal(y[:, before * SEGMENT :][:, :SEGMENT].view(np.int32), shares(x).view(np.int32))
    assert not np.delete(y, np.s_[before * SEGMENT : (before + 1) * SEGMENT], axis=1).view(np.int32).any()


def test_rows_without_a_softmax_are_nan():
    assert np.isnan(shares(uneven_rows(20_000)[4:].numpy())).all()
