"""exp, log, pow, erf, tanh, sigmoid, rsqrt, sin, cos and their like, as straight-line programs over `Arithmetic`.

Libraries disagree on the last bits of these functions. A program fixes them, since IEEE 754 fixes each of its steps. It
takes any float32, subnormals included, and gives the special values that C's function gives.

Coefficients are minimax, found by linear programming on 700 Chebyshev points in extended precision: one after the other,
the constant first, is rounded to float32, and those that remain are fitted again. Errors are the largest found by
`python -m benchmarks.scalar_error`, in units in the last place (ulp) of the exact result, also where that is subnormal.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from shared_specs.arithmetic import Arithmetic, Value


def float32(value: float) -> float:
    """The float32 nearest to `value`."""
    return float(np.float32(value))


INF = float("inf")
NAN = float("nan")

SIGN = -(1 << 31)
"""The pattern of a float32's sign."""

TO_INTEGER = 1.5 * 2.0**23
"""Added to a float below 2^22, it leaves the nearest integer in the low bits of the sum's pattern."""

TO_INTEGER_PATTERN = 0x4B400000

TO_POWER = TO_INTEGER + 127
"""The same with the bias of the exponent: the pattern shifted left by 23 is that of a power of two."""

TO_POWERS = TO_INTEGER + 2 * 127
"""The same for two powers of two, whose exponents are halves of the integer."""

LOG2_E = float32(1.4426950408889634)
LOG2_E_REST = float32(1.4426950408889634 - LOG2_E)
LN_2 = float32(0.6931471805599453)
LN_2_REST = float32(0.6931471805599453 - LN_2)
SQRT_HALF = float32(0.7071067811865476)

TWO_THIRDS_PATTERN = 0x3F2AAAAB
SQRT_HALF_PATTERN = 0x3F3504F3

NEAR = -86.0
"""Above it, e^x and all that it is made of are normal numbers."""

LN_2_SHORT = float.fromhex("0x1.62e4p-1")
"""Times an integer below 2^9, it is exact."""
LN_2_SHORT_REST = float32(0.6931471805599453 - LN_2_SHORT)

MINUS_THIRD = float32(-1 / 3)
TWO_THIRDS = float32(2 / 3)
TWO_THIRDS_REST = float32(2 / 3 - TWO_THIRDS)

TWO_OVER_ROOT_PI = float32(1.1283791670955126)

HALF_PI = float32(1.5707963267948966)
HALF_PI_REST = float32(1.5707963267948966 - HALF_PI)

TWO_OVER_PI = (0, 0x517CC1B7, 0x27220A94, 0xFE13ABE8 - (1 << 32), 0xFA9A6EE0 - (1 << 32), 0x6DB14ACC, 0x9E21C820 - (1 << 32))
"""The bits of 2/pi behind the point, after 33 zeros, as int32 words."""

GELU_SCALE = float32(0.7978845608028654)
"""sqrt(2 / pi)."""

GELU_CUBIC = float32(0.044715)

EXP = (0.4999999701976776, 0.1666654646396637, 0.04166744649410248, 0.008366248570382595, 0.0013869671383872628)
"""q(r) = (e^r - 1 - r) / r^2 for |r| <= (ln 2) / 2; the relative error of e^r - 1 is 1.4e-8, that of e^r 4e-9."""

EXP_SHORT = (0.9999997019767761, 0.4999915063381195, 0.16667647659778595, 0.041897837072610855, 0.00828971154987812)
"""q(r) = (e^r - 1) / r for |r| <= (ln 2) / 2; the relative error of e^r is 9.2e-8."""

LOG1P = (
    -0.5,
    0.3333321511745453,
    -0.2499980628490448,
    0.2001042664051056,
    -0.16680197417736053,
    0.14005734026432037,
    -0.12187448889017105,
    0.13984593749046326,
    -0.12880195677280426,
)
"""(log(1 + r) - r) / r^2 for |r| <= 1/3; the relative error of log(1 + r) is 5e-9."""

ATANH = (0.40000152587890625, 0.2854709029197693, 0.23419633507728577)
"""(2 atanh(s) - 2 s - 2/3 s^3) / s^5 in powers of s^2, for |s| <= 3 - sqrt 8; the relative error of atanh s is 9e-12."""

ERFC_LOG = (
    0.12837916612625122,
    0.6366195678710938,
    0.10277630388736725,
    -0.019147826358675957,
    -0.00016948452685028315,
    0.00167563883587718,
    -0.0006373306969180703,
    0.00011884810373885557,
    -9.385960765939672e-06,
)
"""-log(1 - erf(z)) / z - 1 for 0 <= z <= 4; the relative error of erf is 5e-9."""

ERFC_TAIL = (
    0.18803581595420837,
    0.18868401646614075,
    0.1714477688074112,
    0.19202467799186707,
    -0.0015587973175570369,
    0.4028235077857971,
    -0.4403483271598816,
    0.5351093411445618,
    -0.29188820719718933,
    0.055670201778411865,
)
"""e^(z^2) (1 - erf z) / t in powers of t = 3 / (3 + z), for z >= 0; the relative error is 3e-9."""

SIN = (-0.1666666716337204, 0.008333354257047176, -0.00019842384790536016, 2.7262710773356957e-06)
"""(sin r - r) / r^3 in powers of r^2, for |r| <= 1; the relative error of sin is 4e-10."""

COS = (0.04166657477617264, -0.001388469710946083, 2.4201613996410742e-05)
"""(cos r - 1 + r^2 / 2) / r^4 in powers of r^2, for |r| <= 1; the relative error of cos is 2e-9."""


def exp(f: Arithmetic, x: Value) -> Value:
    """e^x. Error 0.93 ulp, at 5.199918.

    e^x = e^r 2^n with |r| <= (ln 2) / 2. Two powers of two, of nearly n/2 each, reach every exponent, and only multiplying by
    the second one rounds, where the result is subnormal. Where x is clamped, the result is 0 or infinite already.
    """
    return _exp(f, f.max(f.min(x, 89.0), -104.0), None)


def exp_nonpositive(f: Arithmetic, x: Value) -> Value:
    """e^x for x <= 40, unspecified beyond: the bits of `exp` in 14 operations instead of 18.

    2^(n + 64) is in range, so the second power of two is a constant.
    """
    x = f.max(x, -104.0)
    shifted = f.fma(x, LOG2_E, TO_POWER + 64)
    p = _exp_of_remainder(f, x, f.sub(shifted, TO_POWER + 64))
    return f.mul(f.mul(p, f.from_bits(f.shift_left(f.bits(shifted), 23))), 2.0**-64)


def exp_of_term(f: Arithmetic, x: Value) -> Value:
    """e^x for x <= 0, unspecified for x > 40 and for NaN: what a softmax sums. Error 4.74 ulp, at -86.94186.

    It is 2.31 ulp above -16. There are 12 operations: as `exp_nonpositive`, but one step reduces x, the polynomial is shorter,
    and n + 64 is added to the exponent of e^r.
    """
    x = f.max(x, -104.0)
    shifted = f.fma(x, LOG2_E, TO_INTEGER + 64)
    r = f.fma(f.sub(shifted, TO_INTEGER + 64), -LN_2, x)
    p = f.int_add(f.bits(_polynomial(f, r, (1.0, *EXP_SHORT))), f.shift_left(f.bits(shifted), 23))
    return f.mul(f.from_bits(p), 2.0**-64)


def exp_of_near_term(f: Arithmetic, x: Value) -> Value:
    """e^x for NEAR < x <= 0, unspecified elsewhere: the bits of `exp_of_term` in 10 operations, as no result is subnormal."""
    shifted = f.fma(x, LOG2_E, TO_INTEGER)
    r = f.fma(f.sub(shifted, TO_INTEGER), -LN_2, x)
    return f.from_bits(f.int_add(f.bits(_polynomial(f, r, (1.0, *EXP_SHORT))), f.shift_left(f.bits(shifted), 23)))


def log(f: Arithmetic, x: Value) -> Value:
    """The natural logarithm. Error 0.94 ulp, at 0.6356574.

    x = 2^k (1 + r) with |r| <= 1/3, so log x = k ln 2 + log(1 + r); a subnormal x is scaled by 2^23 first.
    """
    k, r = _binary_exponent(f, x)
    return _special_log(f, x, f.fma(k, LN_2, _log1p_of_small(f, r)))


def exp2(f: Arithmetic, x: Value) -> Value:
    """2^x. Error 0.92 ulp, at -126.41137.

    2^x = e^(r ln 2) 2^n with |r| <= 1/2 and an exact r; the rest is as in `exp`.
    """
    x = f.max(f.min(x, 129.0), -151.0)
    shifted = f.add(x, TO_POWERS)
    p = _exp_of_small(f, f.mul(f.sub(x, f.sub(shifted, TO_POWERS)), LN_2))
    return _times_power(f, p, f.bits(shifted))


def expm1(f: Arithmetic, x: Value) -> Value:
    """e^x - 1. Error 1.53 ulp, at 0.3911038.

    It is s (e^r - 1) + (s - 1) with s = 2^n and the r of `exp`, and half of that with 2^(n - 1), which is in range. Where x is
    small, it is x itself.
    """
    bounded = f.max(f.min(x, 89.0), -20.0)
    shifted = f.fma(bounded, LOG2_E, TO_POWER - 1)
    n = f.sub(shifted, TO_POWER - 1)
    r = f.fma(n, -LN_2_REST, f.fma(n, -LN_2, bounded))
    half = f.from_bits(f.shift_left(f.bits(shifted), 23))
    y = f.fma(half, f.fma(f.mul(r, r), _polynomial(f, r, EXP), r), f.sub(half, 0.5))
    return f.select(f.less(f.abs(x), 2.0**-25), x, f.add(y, y))


def log2(f: Arithmetic, x: Value) -> Value:
    """The logarithm to base 2. Error 1.8 ulp, at 1.3335218.

    With the k and r of `log` it is k + log(1 + r) log2 e, where the last factor takes two floats.
    """
    k, r = _binary_exponent(f, x)
    y = _log1p_of_small(f, r)
    return _special_log(f, x, f.fma(y, LOG2_E, f.fma(y, LOG2_E_REST, k)))


def log1p(f: Arithmetic, x: Value) -> Value:
    """log(1 + x). Error 1.55 ulp, at 0.3335218.

    As the `log` of 1 + x; what is rounded off in that sum is added to r, scaled as r is.
    """
    u = f.add(x, 1.0)
    large = f.less(1.0, x)
    rounded_off = f.select(large, f.sub(1.0, f.sub(u, x)), f.sub(x, f.sub(u, 1.0)))
    exponent = f.shift_right(f.int_sub(f.bits(u), TWO_THIRDS_PATTERN), 23)
    scale = f.int_sub(f.bits(1.0), f.shift_left(exponent, 23))
    r = f.sub(f.from_bits(f.int_sub(f.bits(u), f.shift_left(exponent, 23))), 1.0)
    r = f.select(f.less(u, 2.0**100), f.fma(rounded_off, f.from_bits(scale), r), r)
    k = f.sub(f.from_bits(f.int_add(exponent, TO_INTEGER_PATTERN)), TO_INTEGER)
    y = _special_log(f, u, f.fma(k, LN_2, _log1p_of_small(f, r)))
    return f.select(f.less(f.abs(x), 2.0**-25), x, y)


def pow(f: Arithmetic, x: Value, y: Value) -> Value:  # noqa: A001
    """x^y, with the special values of C's pow. Error 1.07 ulp, on 42 million pairs.

    |x|^y = e^(y log |x|), with the logarithm and its product in two floats each.
    """
    magnitude = f.abs(x)
    high, low = _log_in_two(f, magnitude)
    exponent = f.mul(y, high)
    rest = f.fma(y, low, f.fma(y, high, f.neg(exponent)))
    rest = f.select(f.less(f.abs(exponent), 128.0), rest, 0.0)
    result = _exp(f, f.max(f.min(exponent, 89.0), -104.0), rest)
    result = f.select(f.equal(magnitude, 1.0), 1.0, result)
    integer = f.to_int(f.select(f.less(f.abs(y), 2.0**24), y, 0.0))
    whole = f.either(f.equal(f.to_float(integer), y), f.less(2.0**23, f.abs(y)))
    result = f.select(f.both(f.less(x, 0.0), f.less(-INF, x)), f.select(whole, result, NAN), result)
    odd = f.both(whole, f.int_equal(f.int_and(integer, 1), 1))
    result = _flip_sign(f, result, f.select(odd, f.bits(x), 0))
    result = f.select(f.either(f.is_nan(x), f.is_nan(y)), NAN, result)
    return f.select(f.either(f.equal(x, 1.0), f.equal(y, 0.0)), 1.0, result)


def erf(f: Arithmetic, x: Value) -> Value:
    """The error function. Error 1.83 ulp, at 0.2196253.

    erf z = 1 - e^-w, where w = -log(1 - erf z) is a polynomial; erf 4 rounds to 1.
    """
    z = f.min(f.abs(x), 4.0)
    w = f.fma(z, _polynomial(f, z, ERFC_LOG), z)
    power_of_2, expm1 = _exp_of_negative(f, w)
    return _copy_sign(f, f.fma(f.neg(power_of_2), expm1, f.sub(1.0, power_of_2)), x)


def erfc(f: Arithmetic, x: Value) -> Value:
    """1 - erf(x). Error 3.96 ulp, at 0.81396914.

    That is how it is computed for |x| < 3/4. Beyond, with z = |x|, it is e^(-z^2) q, where e^(-z^2) takes the square in two
    floats. The slope of q is 2 z q - 2 / sqrt(pi); by it, q at the rounded t becomes q at z.
    """
    z = f.min(f.abs(x), 10.5)
    denominator = f.add(z, 3.0)
    t = f.div(3.0, denominator)
    larger, smaller = f.max(z, 3.0), f.min(z, 3.0)
    rounded_off = f.sub(smaller, f.sub(denominator, larger))
    shift = f.fma(f.neg(t), rounded_off, f.fma(f.neg(t), denominator, 3.0))  # t times the distance to the z of the rounded t
    q = f.mul(t, _polynomial(f, t, ERFC_TAIL))
    slope = f.sub(f.mul(f.add(z, z), q), TWO_OVER_ROOT_PI)
    q = f.fma(f.mul(slope, f.mul(denominator, MINUS_THIRD)), shift, q)
    square = f.mul(z, z)
    power = _exp(f, f.max(f.neg(square), -104.0), f.neg(f.fma(z, z, f.neg(square))))
    y = f.mul(power, q)
    y = f.select(f.less(x, 0.0), f.sub(2.0, y), y)
    return f.select(f.less(z, 0.75), f.sub(1.0, erf(f, x)), y)


def tanh(f: Arithmetic, x: Value) -> Value:
    """The hyperbolic tangent. Error 1.97 ulp, at 0.5196337.

    tanh z = (1 - e^-2z) / (1 + e^-2z); tanh 10 rounds to 1.
    """
    z = f.min(f.abs(x), 10.0)
    power_of_2, expm1 = _exp_of_negative(f, f.add(z, z))
    numerator = f.fma(f.neg(power_of_2), expm1, f.sub(1.0, power_of_2))
    denominator = f.fma(power_of_2, expm1, f.add(1.0, power_of_2))
    return _copy_sign(f, f.div(numerator, denominator), x)


def sigmoid(f: Arithmetic, x: Value) -> Value:
    """1 / (1 + e^-x). Error 1.65 ulp, at -1.0993261.

    With e = e^-|x| it is c / (1 + e), where c = e for negative x, else 1. As c - c e / (1 + e), it suffers less from the
    roundings of 1 + e and of the division, and a subnormal result is rounded once.
    """
    e = exp_nonpositive(f, f.neg(f.abs(x)))
    c = f.select(f.less(x, 0.0), e, 1.0)
    return f.fma(f.neg(c), f.div(e, f.add(1.0, e)), c)


def silu(f: Arithmetic, x: Value) -> Value:
    """x sigmoid(x); -0 at -infinity. Error 1.7 ulp of x."""
    x = f.max(x, -104.0)
    return f.mul(x, sigmoid(f, x))


def gelu(f: Arithmetic, x: Value) -> Value:
    """x (1 + erf(x / sqrt 2)) / 2; -0 at -infinity. Error 1.7 ulp of x."""
    x = f.max(x, -8.0)
    return f.mul(f.mul(x, 0.5), f.add(1.0, erf(f, f.mul(x, SQRT_HALF))))


def gelu_tanh(f: Arithmetic, x: Value) -> Value:
    """x (1 + tanh u) / 2 = x sigmoid(2u); -0 at -infinity. Error 1.8 ulp of x."""
    x = f.max(x, -11.0)
    u = gelu_tanh_argument(f, x)
    return f.mul(x, sigmoid(f, f.add(u, u)))


def gelu_tanh_argument(f: Arithmetic, x: Value) -> Value:
    """u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return f.mul(f.mul(x, GELU_SCALE), f.fma(f.mul(x, x), GELU_CUBIC, 1.0))


def rsqrt(f: Arithmetic, x: Value) -> Value:
    """1 / sqrt(x). Error 0.85 ulp, at 1.9974642.

    The root of the inverse, since a root halves the relative error of its argument; 2^64 x or 2^-64 x has a normal inverse.
    """
    low = f.less(f.abs(x), 1.0)
    inverse = f.div(1.0, f.mul(x, f.select(low, 2.0**64, 2.0**-64)))
    y = f.mul(f.sqrt(inverse), f.select(low, 2.0**32, 2.0**-32))
    y = f.select(f.less(x, 0.0), NAN, y)
    return f.select(f.equal(x, 0.0), inverse, y)


def sin(f: Arithmetic, x: Value) -> Value:
    """The sine of any float32; NaN at infinity. Error 1.49 ulp, at 400955.3."""
    return _flip_sign(f, _quadrant_sine(f, f.abs(x), 0), f.bits(x))


def cos(f: Arithmetic, x: Value) -> Value:
    """The cosine of any float32; NaN at infinity. Error 1.49 ulp, at 648.6137."""
    return _quadrant_sine(f, f.abs(x), 1)


def power(f: Arithmetic, x: Value, n: Value) -> Value:
    """x^n for an int32 n >= 0, by squaring. The relative error of a normal result is below n 2^-24."""
    result: Value = 1.0
    for i in range(31):
        odd = f.int_equal(f.int_and(f.shift_right(n, i), 1), 1)
        result = f.select(odd, f.mul(x, result), result)
        x = f.mul(x, x)
    return result


def _polynomial(f: Arithmetic, x: Value, coefficients: Sequence[float]) -> Value:
    """The sum of coefficients[i] x^i by Horner's rule."""
    y: Value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        y = f.fma(y, x, c)
    return y


def _copy_sign(f: Arithmetic, magnitude: Value, x: Value) -> Value:
    """`magnitude`, which has no sign, with the sign of x."""
    return f.from_bits(f.int_or(f.bits(magnitude), f.int_and(f.bits(x), SIGN)))


def _flip_sign(f: Arithmetic, x: Value, pattern: Value) -> Value:
    """-x where `pattern` is negative, else x."""
    return f.from_bits(f.int_xor(f.bits(x), f.int_and(pattern, SIGN)))


def _exp(f: Arithmetic, x: Value, rest: Value | None) -> Value:
    """e^(x + rest) for -104 <= x <= 89; the rest is at most a few units in the last place of x."""
    shifted = f.fma(x, LOG2_E, TO_POWERS)
    return _times_power(f, _exp_of_remainder(f, x, f.sub(shifted, TO_POWERS), rest), f.bits(shifted))


def _times_power(f: Arithmetic, p: Value, n: Value) -> Value:
    """p 2^n, where n is the pattern of n + TO_POWERS; only the second product rounds, where the result is subnormal."""
    half = f.shift_right(n, 1)
    p = f.mul(p, f.from_bits(f.shift_left(half, 23)))
    return f.mul(p, f.from_bits(f.shift_left(f.int_sub(n, half), 23)))


def _binary_exponent(f: Arithmetic, x: Value) -> tuple[Value, Value]:
    """k and r with x = 2^k (1 + r) and |r| <= 1/3, for positive x."""
    subnormal = f.less(x, 2.0**-126)
    pattern = f.bits(f.select(subnormal, f.mul(x, 2.0**23), x))
    exponent = f.shift_right(f.int_sub(pattern, TWO_THIRDS_PATTERN), 23)
    r = f.sub(f.from_bits(f.int_sub(pattern, f.shift_left(exponent, 23))), 1.0)
    offset = f.select(subnormal, TO_INTEGER + 23, TO_INTEGER)
    return f.sub(f.from_bits(f.int_add(exponent, TO_INTEGER_PATTERN)), offset), r


def _log1p_of_small(f: Arithmetic, r: Value) -> Value:
    return f.fma(f.mul(r, r), _polynomial(f, r, LOG1P), r)


def _special_log(f: Arithmetic, x: Value, y: Value) -> Value:
    """y, a logarithm of x, with the values at 0, infinity, NaN and negative numbers."""
    y = f.select(f.less(x, INF), y, x)
    y = f.select(f.less(x, 0.0), NAN, y)
    return f.select(f.equal(x, 0.0), -INF, y)


def _log_in_two(f: Arithmetic, x: Value) -> tuple[Value, Value]:
    """log x for x >= 0 as the sum of two floats, to some 35 bits; the second is 0 where the first is infinite.

    x = 2^k m with m from sqrt(1/2) to sqrt 2, and log m = 2 atanh s for s = (m - 1) / (m + 1).
    """
    subnormal = f.less(x, 2.0**-126)
    pattern = f.bits(f.select(subnormal, f.mul(x, 2.0**23), x))
    exponent = f.shift_right(f.int_sub(pattern, SQRT_HALF_PATTERN), 23)
    m = f.from_bits(f.int_sub(pattern, f.shift_left(exponent, 23)))
    k = f.sub(f.from_bits(f.int_add(exponent, TO_INTEGER_PATTERN)), f.select(subnormal, TO_INTEGER + 23, TO_INTEGER))
    numerator, denominator = f.sub(m, 1.0), f.add(m, 1.0)
    rounded_off = f.sub(m, f.sub(denominator, 1.0))
    s = f.div(numerator, denominator)
    remainder = f.fma(f.neg(s), rounded_off, f.fma(f.neg(s), denominator, numerator))
    s_rest = f.div(remainder, denominator)
    square = f.mul(s, s)
    square_rest = f.fma(f.add(s, s), s_rest, f.fma(s, s, f.neg(square)))
    cube = f.mul(s, square)
    cube_rest = f.fma(s_rest, square, f.fma(s, square_rest, f.fma(s, square, f.neg(cube))))
    third = f.mul(cube, TWO_THIRDS)
    third_rest = f.fma(cube_rest, TWO_THIRDS, f.fma(cube, TWO_THIRDS_REST, f.fma(cube, TWO_THIRDS, f.neg(third))))
    # The larger summands, with what is rounded off; then all the rest.
    whole, twice = f.mul(k, LN_2_SHORT), f.add(s, s)
    first = f.add(whole, twice)
    second = f.add(first, third)
    errors = f.add(f.sub(twice, f.sub(first, whole)), f.sub(third, f.sub(second, first)))
    rest = f.fma(f.mul(cube, square), _polynomial(f, square, ATANH), f.fma(k, LN_2_SHORT_REST, third_rest))
    rest = f.add(errors, f.add(f.add(s_rest, s_rest), rest))
    high = f.add(second, rest)
    low = f.sub(rest, f.sub(high, second))
    high = f.select(f.equal(x, 0.0), -INF, f.select(f.equal(x, INF), INF, high))
    return high, f.select(f.less(f.abs(high), INF), low, 0.0)


def _exp_of_remainder(f: Arithmetic, x: Value, n: Value, rest: Value | None = None) -> Value:
    """e^r = 1 + r + r^2 q(r) for r = x - n ln 2, or r = x - n ln 2 + rest.

    The remainder takes two steps, of which the first is exact: W. J. Cody, W. Waite, "Software Manual for the Elementary
    Functions", 1980.
    """
    r = f.fma(n, -LN_2_REST, f.fma(n, -LN_2, x))
    return _exp_of_small(f, r if rest is None else f.add(r, rest))


def _exp_of_small(f: Arithmetic, r: Value) -> Value:
    return f.fma(f.fma(_polynomial(f, r, EXP), r, 1.0), r, 1.0)


def _exp_of_negative(f: Arithmetic, w: Value) -> tuple[Value, Value]:
    """s = 2^-n and t = e^r - 1 with e^-w = s (1 + t) and |r| <= (ln 2) / 2, for 0 <= w <= 87.

    So 1 - e^-w is (1 - s) - s t without cancellation. One step reduces, because its error counts for less the larger w is.
    """
    shifted = f.fma(w, -LOG2_E, TO_POWER)
    r = f.neg(f.fma(f.sub(shifted, TO_POWER), LN_2, w))
    return f.from_bits(f.shift_left(f.bits(shifted), 23)), f.fma(f.mul(r, r), _polynomial(f, r, EXP), r)


def _quadrant_sine(f: Arithmetic, x: Value, quadrants: int) -> Value:
    """sin(x + quadrants pi/2) for x >= 0; NaN if x is infinite or NaN.

    From 1 upwards, x is reduced with as many bits of 2/pi as it takes: M. Payne, R. Hanek, "Radian reduction for
    trigonometric functions", ACM SIGNUM Newsletter 18(1), 1983.
    """
    small = f.less(x, 1.0)
    turns, reduced = _reduce(f, f.bits(x))
    r = f.select(small, x, reduced)
    turns = f.int_add(f.select(small, 0, turns), (1 << 29) + (quadrants << 30))  # to the nearest quadrant
    square = f.mul(r, r)
    sine = f.fma(f.mul(square, r), _polynomial(f, square, SIN), r)
    cosine = f.fma(f.fma(_polynomial(f, square, COS), square, -0.5), square, 1.0)
    odd = f.int_less(f.shift_left(turns, 1), 0)
    y = _flip_sign(f, f.select(odd, cosine, sine), turns)
    return f.select(f.less(x, INF), y, NAN)


def _reduce(f: Arithmetic, pattern: Value) -> tuple[Value, Value]:
    """x / (pi/2) modulo 4 in units of 2^-30, truncated, and the angle in radians to the nearest quadrant, |angle| <= pi/4.

    The x of the pattern is a 32-bit integer times a power of two, at least 1. It is multiplied by the 96 bits of 2/pi that
    reach from 4 quadrants down to 2^-94; of the product, 57 bits are kept.
    """
    skip = f.int_sub(f.shift_right(pattern, 23), 127)  # bits of TWO_OVER_PI that give multiples of 4 quadrants
    mantissa = f.int_or(f.shift_left(pattern, 8), SIGN)
    words: list[Value] = list(TWO_OVER_PI)
    for count in (2, 1):
        whole = f.int_less(0, f.int_and(skip, 32 * count))
        words = [f.select(whole, high, low) for low, high in zip(words, words[count:], strict=False)]
    left = f.int_and(skip, 31)
    right = f.int_xor(left, 31)
    first, second, third = (
        f.int_or(f.shift_left(a, left), f.shift_right_logical(f.shift_right_logical(b, 1), right)) for a, b in pairwise(words)
    )
    # Fractions of 2^-30 quadrants in units of 2^-55, so that their sum holds its carry.
    low = f.int_add(
        f.shift_right_logical(f.int_mul(mantissa, second), 7),
        f.shift_right_logical(f.mul_high(mantissa, third), 7),
    )
    turns = f.int_add(f.int_mul(mantissa, first), f.mul_high(mantissa, second))
    turns = f.int_add(turns, f.shift_right_logical(low, 25))
    # The distance to the nearest quadrant in two floats: a multiple of 64 units, which is exact, and the rest.
    distance = f.shift_right(f.shift_left(turns, 2), 2)
    coarse = f.int_and(f.int_add(distance, 32), -64)
    fine = f.int_add(f.shift_left(f.int_sub(distance, coarse), 25), f.int_and(low, (1 << 25) - 1))
    high = f.to_float(coarse)
    rest = f.fma(high, HALF_PI_REST * 2.0**-30, f.mul(f.to_float(fine), HALF_PI * 2.0**-55))
    return turns, f.fma(high, HALF_PI * 2.0**-30, rest)
