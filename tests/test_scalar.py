"""The scalar programs on NumPy: error bounds, special values, and the arithmetic below them."""

from fractions import Fraction

import numpy as np
import pytest

from benchmarks import scalar_error
from shared_specs import scalar
from shared_specs.reference import NumpyArithmetic
from tests.row_programs import pow_inputs

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


INF, NAN = np.inf, np.nan

TINY = 2.0**-149
ZEROS = [(0.0, 0.0), (-0.0, -0.0)]
INFINITIES_AS_SILU = [(INF, INF), (-INF, -0.0), (3e38, 3e38), (-3e38, -0.0)]

SPECIAL = {
    "exp": [(0.0, 1), (-0.0, 1), (INF, INF), (-INF, 0), (88.73, INF), (3e38, INF), (-104, 0), (-3e38, 0), (-103.9, TINY)],
    "exp_nonpositive": [(0.0, 1), (-0.0, 1), (-INF, 0), (-104, 0), (-3e38, 0), (-103.9, TINY)],
    "log": [(0.0, -INF), (-0.0, -INF), (1, 0), (INF, INF), (-INF, NAN), (-1, NAN), (-TINY, NAN)],
    "exp2": [(0.0, 1), (INF, INF), (-INF, 0), (128, INF), (127, 2.0**127), (-149, TINY), (-150, 0), (3e38, INF), (-3e38, 0)],
    "expm1": [*ZEROS, (INF, INF), (-INF, -1), (88.73, INF), (-104, -1), (3e38, INF), (-3e38, -1), (TINY, TINY), (-TINY, -TINY)],
    "log2": [(0.0, -INF), (-0.0, -INF), (1, 0), (8, 3), (TINY, -149), (INF, INF), (-INF, NAN), (-1, NAN), (-TINY, NAN)],
    "log1p": [*ZEROS, (-1, -INF), (INF, INF), (-INF, NAN), (-1.5, NAN), (TINY, TINY), (-TINY, -TINY)],
    "erfc": [(0.0, 1), (-0.0, 1), (INF, 0), (-INF, 2), (3e38, 0), (-3e38, 2), (TINY, 1), (10.05, TINY)],
    "erf": [*ZEROS, (INF, 1), (-INF, -1), (4, 1), (-3e38, -1), (TINY, TINY)],
    "tanh": [*ZEROS, (INF, 1), (-INF, -1), (10, 1), (-3e38, -1), (TINY, TINY)],
    "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (INF, 1), (-INF, 0), (3e38, 1), (-3e38, 0), (-103.9, TINY)],
    "rsqrt": [
        *((0.0, INF), (-0.0, -INF), (INF, 0), (-INF, NAN), (-1, NAN), (-TINY, NAN), (-3e38, NAN)),
        *((1, 1), (4, 0.5), (2.0**-148, 2.0**74), (2.0**126, 2.0**-63)),
    ],
    "sin": [*ZEROS, (INF, NAN), (-INF, NAN), (TINY, TINY), (-TINY, -TINY)],
    "cos": [(0.0, 1), (-0.0, 1), (INF, NAN), (-INF, NAN), (TINY, 1)],
    "silu": [*ZEROS, *INFINITIES_AS_SILU],
    "gelu": [*ZEROS, *INFINITIES_AS_SILU],
    "gelu_tanh": [*ZEROS, *INFINITIES_AS_SILU],
}
"""Arguments and values of each program."""


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name):
    program = getattr(scalar, name)
    x, want = np.array(SPECIAL[name], np.float32).T
    got = program(F, x)
    assert got.dtype == np.float32
    assert np.array_equal(got, want, equal_nan=True)
    ordinary = ~np.isnan(want)
    assert np.array_equal(np.signbit(got[ordinary]), np.signbit(want[ordinary]))
    nans = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFC00001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(program(F, nans)).all()


BOUNDS = {
    "exp": 0.95,
    "log": 1.0,
    "exp2": 0.95,
    "expm1": 1.6,
    "log2": 1.8,
    "log1p": 1.6,
    "erf": 2.0,
    "erfc": 4.0,
    "tanh": 2.0,
    "sigmoid": 1.7,
    "rsqrt": 0.9,
    "sin": 1.5,
    "cos": 1.5,
    "silu": 2.0,
    "gelu": 2.0,
    "gelu_tanh": 2.0,
}


@pytest.fixture(scope="module")
def sample():
    """Patterns of every exponent, all sizes of arguments that matter, and the neighbours of multiples of pi/2."""
    rng = np.random.default_rng(4)
    middle = np.exp2(rng.uniform(-12, 8, 1 << 17)) * rng.choice([-1, 1], 1 << 17)
    quadrants = rng.integers(1, 1 << 20, 1 << 14) * (np.pi / 2)
    return np.concatenate([patterns(1 << 17, 5), floats(*middle, *quadrants, *-quadrants)])


@pytest.mark.parametrize("name", BOUNDS)
def test_error_bounds(name, sample):
    error = scalar_error.errors(name, sample)
    i = int(np.argmax(error))
    assert error[i] <= BOUNDS[name], f"{name}({sample[i]!r})"


def test_sine_and_cosine_of_large_arguments():
    # The float32 nearest to a multiple of pi/2 is 16367173 * 2^72; the others are ordinary.
    x = floats(16367173 * 2.0**72, 2.0**127, 3.4028235e38, 1e22)
    for name in ("sin", "cos"):
        assert scalar_error.errors(name, x).max() <= BOUNDS[name]


def test_bounded_functions_stay_in_bounds(sample):
    finite = sample[np.isfinite(sample)]
    for name in ("sin", "cos", "tanh", "erf", "sigmoid"):
        assert np.abs(getattr(scalar, name)(F, finite)).max() <= 1


@pytest.mark.parametrize("name", ["exp", "log", "erf", "tanh", "sigmoid"])
def test_monotone_over_distant_arguments(name):
    x = np.exp2(np.arange(-149, 127.9, 0.03)).astype(np.float32)
    x = x if name == "log" else np.concatenate([-x[::-1], x])
    y = getattr(scalar, name)(F, x)
    assert (y[1:] >= y[:-1]).all()


def test_odd_and_even(sample):
    finite = sample[np.isfinite(sample)]
    for name, sign in (("sin", -1), ("tanh", -1), ("erf", -1), ("cos", 1)):
        program = getattr(scalar, name)
        assert np.array_equal(program(F, -finite), np.float32(sign) * program(F, finite))


def test_exp_of_nonpositive_arguments_is_exp():
    x = np.concatenate([-np.abs(patterns(1 << 16, 6)), floats(*-np.exp2(np.linspace(-30, 7, 1 << 16)))])
    assert np.array_equal(scalar.exp(F, x), scalar.exp_nonpositive(F, x), equal_nan=True)


def test_exp_of_the_terms_of_a_softmax():
    x = -np.exp2(np.random.default_rng(7).uniform(-30, np.log2(104), 1 << 18)).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(np.maximum(exact, 2.0**-126).astype(np.float32)).astype(np.float64)
    error = np.abs(scalar.exp_of_term(F, x) - exact) / ulp
    assert error.max() <= 4.75
    assert error[x > -16].max() <= 2.32
    near = x[(x > scalar.NEAR) & (x <= 0)]
    np.testing.assert_array_equal(scalar.exp_of_near_term(F, near), scalar.exp_of_term(F, near))
    got = scalar.exp_of_term(F, floats(0, -0.0, -103.9, -104, -3e38, -INF))
    assert np.array_equal(got.view(np.int32), floats(1, 1, TINY, 0, 0, 0).view(np.int32))


def test_power():
    n = np.array([0, 1, 2, 3, 31, 1000, 100_000, (1 << 31) - 1], np.int32)
    beta = np.float32(0.999)
    exact = np.float64(beta) ** n
    got = scalar.power(F, beta, n)
    assert got[:2].tolist() == [1, beta]
    assert got[-1] == 0
    normal = exact > 2.0**-126
    assert (np.abs(got[normal] / exact[normal] - 1) <= n[normal] * 2.0**-24).all()
    assert scalar.power(F, np.float32(-2), np.array([127, 128], np.int32)).tolist() == [-(2.0**127), INF]


def test_pow():
    rng = np.random.default_rng(7)
    with np.errstate(all="ignore"):
        x = np.exp(rng.normal(size=1 << 17) * np.repeat([0.01, 0.3, 3, 30], 1 << 15)).astype(np.float32)
        y = np.where(rng.random(x.size) < 0.5, rng.uniform(-105, 90, x.size) / np.log(np.float64(x)), rng.normal(size=x.size))
        y = y.astype(np.float32)
        got = scalar.pow(F, x, y)
        error = scalar_error.ulp_error(got, np.float64(x) ** np.float64(y))
    assert error.max() <= 1.1


def test_special_values_of_pow():
    x, y = (v.numpy()[0] for v in pow_inputs().values())
    with np.errstate(all="ignore"):
        exact = np.float64(x) ** np.float64(y)
        got = scalar.pow(F, x, y)
        assert scalar_error.ulp_error(got, exact).max() <= 1.1
        signed = ~np.isnan(exact)
        assert np.array_equal(np.signbit(got[signed]), np.signbit(exact[signed].astype(np.float32)))
