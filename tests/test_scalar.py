"""The scalar programs on NumPy: error bounds, special values, and the arithmetic below them."""

from fractions import Fraction

import numpy as np
import pytest

from shared_specs.reference import NumpyArithmetic

F = NumpyArithmetic()


def patterns(count: int, seed: int) -> np.ndarray:
    """float32 values of random bit patterns: every exponent, subnormals, infinities and NaN."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    return bits.view(np.float32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def round_to_float32(exact: Fraction) -> np.float32:
    """The nearest float32, ties to even; by integers alone."""
    if exact == 0:
        return np.float32(0)
    magnitude = abs(exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, -126)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    steps = round(magnitude / Fraction(2) ** (exponent - 23))  # Python rounds ties to even
    with np.errstate(over="ignore"):
        return np.float32(np.copysign(np.ldexp(float(steps), exponent - 23), float(np.sign(exact.numerator))))


def fma_triples() -> np.ndarray:
    """[n, 3]: random patterns, near cancellation, sums half way between two floats, and subnormal results."""
    rng = np.random.default_rng(1)
    anything = patterns(3 * 3000, 2).reshape(-1, 3)
    x, y = (1 + rng.random((2, 2000), np.float32)) * np.exp2(rng.integers(-70, 60, (2, 2000))).astype(np.float32)
    near = -(x * y) * np.exp2(rng.integers(-30, 31, 2000)).astype(np.float32)
    cancelling = np.stack([x, y, near], 1)
    # 1 + 2^-24 is half way: a product just above or below 2^-24 must decide.
    step = floats(-(2.0**-12), 0, 2.0**-12)
    a, b = np.meshgrid(1 + step, 2.0**-24 * (1 + step))
    half = np.stack([a.ravel(), b.ravel(), np.ones(9, np.float32)], 1)
    tiny = half * floats(1, 2.0**-126, 2.0**-126)
    y, z = np.exp2(rng.uniform(-149, -120, (2, 2000))).astype(np.float32)
    small = np.stack([1 + rng.random(2000, np.float32), y, z], 1)
    return np.concatenate([anything, cancelling, half, tiny, small])


def test_fma_is_rounded_once():
    with np.errstate(all="ignore"):
        triples = fma_triples()
    triples = triples[np.isfinite(triples).all(1)]
    got = F.fma(*triples.T)
    want = [round_to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in triples]
    assert len(triples) > 6000
    assert np.array_equal(got, np.array(want))
    assert (np.abs(got[got != 0]) < 2.0**-126).sum() > 200


def test_fma_special_values():
    inf, nan = np.inf, np.nan
    x = floats(inf, inf, 0, inf, nan, -0.0, -0.0, 1, 2.0**127, -(2.0**127))
    y = floats(1, 1, inf, -1, 1, 1, 1, -1, 2, 4)
    z = floats(1, -inf, 1, -1, 1, -0.0, 0, 1, 1, inf)
    want = floats(inf, nan, nan, -inf, nan, -0.0, 0, 0, inf, inf)
    got = F.fma(x, y, z)
    assert np.array_equal(got, want, equal_nan=True)
    zero = want == 0
    assert np.array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


def test_max_and_min_order_zeros_and_keep_nan():
    x = floats(0, -0.0, -0.0, np.nan, 1, -np.inf, np.nan)
    y = floats(-0.0, 0, -0.0, 1, np.nan, 3, np.nan)
    assert F.max(x, y).view(np.int32)[:3].tolist() == floats(0, 0, -0.0).view(np.int32).tolist()
    assert F.min(x, y).view(np.int32)[:3].tolist() == floats(-0.0, -0.0, -0.0).view(np.int32).tolist()
    assert np.array_equal(F.max(x, y)[3:], floats(np.nan, np.nan, 3, np.nan), equal_nan=True)
    assert np.array_equal(F.min(x, y)[3:], floats(np.nan, np.nan, -np.inf, np.nan), equal_nan=True)


def test_integers_wrap_and_shift():
    i = np.array([-1, 1 << 30, -(1 << 31), 7], np.int32)
    assert F.int_add(i, i).tolist() == [-2, -(1 << 31), 0, 14]
    assert F.int_mul(i, 3).tolist() == [-3, 3 * (1 << 30) - (1 << 32), -(1 << 31), 21]
    assert F.mul_high(i, -1).tolist() == [-2, (1 << 30) - 1, (1 << 31) - 1, 6]
    assert F.shift_right(i, 4).tolist() == [-1, 1 << 26, -(1 << 27), 0]
    assert F.shift_right_logical(i, 4).tolist() == [(1 << 28) - 1, 1 << 26, 1 << 27, 0]
    assert F.shift_left(i, 1).tolist() == [-2, -(1 << 31), 0, 14]


def test_constants_must_be_float32():
    with pytest.raises(ValueError, match="not a float32"):
        F.mul(floats(1), 0.1)
    with pytest.raises(TypeError, match="select"):
        F.select(np.array([True]), floats(1), 1)


def test_narrow_rounds_to_the_format():
    x = floats(1 + 2.0**-9, 1 + 3 * 2.0**-9, 70000, 2.0**-25, -0.0)
    assert F.narrow(x, "bfloat16").tolist() == [1, 1 + 2.0**-7, 70144, 2.0**-25, 0]
    assert F.narrow(x, "float16").tolist() == [1 + 2.0**-9, 1 + 3 * 2.0**-9, np.inf, 0, 0]
    assert F.narrow(x, "float32").tolist() == x.tolist()
