"""`shared_specs.arithmetic.Arithmetic` in NumPy: float32, int32 and bool arrays of shapes that broadcast.

NumPy's float32 addition, subtraction, multiplication, division and square root are those of IEEE 754. What NumPy lacks, or
leaves to the platform, stands here: fma, the order of signed zeros in max and min, 32-bit shifts, conversions.
"""

import math
from collections.abc import Callable

import numpy as np

from shared_specs.arithmetic import Value
from shared_specs.formats import float_format


def _quiet[Function: Callable[..., object]](function: Function) -> Function:
    """No warning about an overflow, a division by zero or a NaN: they are results."""
    return np.errstate(all="ignore")(function)


def _float(x: Value) -> Value:
    """A Python number as float32, anything else as it is."""
    if not isinstance(x, (int, float)):
        return x
    constant = np.float32(x)
    if float(constant) != x and not math.isnan(x):
        raise ValueError(f"the constant {x!r} is not a float32")
    return constant


def _int(i: Value) -> Value:
    """A Python integer as int32, anything else as it is."""
    return np.int32(i) if isinstance(i, int) else i


class NumpyArithmetic:
    """The operations on NumPy arrays; the definition of each that the engines are held to."""

    @_quiet
    def add(self, x: Value, y: Value) -> Value:
        return _float(x) + _float(y)

    @_quiet
    def sub(self, x: Value, y: Value) -> Value:
        return _float(x) - _float(y)

    @_quiet
    def mul(self, x: Value, y: Value) -> Value:
        return _float(x) * _float(y)

    @_quiet
    def div(self, x: Value, y: Value) -> Value:
        return _float(x) / _float(y)

    @_quiet
    def sqrt(self, x: Value) -> Value:
        return np.sqrt(_float(x))

    @_quiet
    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """The product is exact in float64; rounding the sum to odd there keeps the one rounding to float32 right.

        S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
        IEEE Transactions on Computers 57(4), 2008: 53 bits are enough, since 53 >= 24 + 2, also for subnormal results.
        """
        product = np.float64(_float(x)) * np.float64(_float(y))
        z = np.float64(_float(z))
        total = np.asarray(product + z)
        rest = total - product  # Knuth's TwoSum: product + z = total + error, exactly
        error = (product - (total - rest)) + (z - rest)
        bits = total.view(np.int64)
        # An even total that is not exact moves to its odd neighbour in the direction of the error.
        move = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        away = (error > 0) == (total > 0)
        odd = np.where(move, np.where(away, bits + 1, bits - 1), bits)
        return odd.view(np.float64).astype(np.float32)

    def neg(self, x: Value) -> Value:
        return np.negative(_float(x))

    def abs(self, x: Value) -> Value:
        return np.abs(_float(x))

    @_quiet
    def max(self, x: Value, y: Value) -> Value:
        x, y = _float(x), _float(y)
        # Equal values differ at most in the sign of a zero, which `and` of the patterns clears.
        return np.where(x == y, (x.view(np.int32) & y.view(np.int32)).view(np.float32), np.maximum(x, y))

    @_quiet
    def min(self, x: Value, y: Value) -> Value:
        x, y = _float(x), _float(y)
        return np.where(x == y, (x.view(np.int32) | y.view(np.int32)).view(np.float32), np.minimum(x, y))

    @_quiet
    def narrow(self, x: Value, dtype: str) -> Value:
        x, fmt = np.asarray(_float(x)), float_format(dtype)
        return fmt.decode(fmt.encode(x)).reshape(x.shape)

    def less(self, x: Value, y: Value) -> Value:
        return np.less(_float(x), _float(y))

    def equal(self, x: Value, y: Value) -> Value:
        return np.equal(_float(x), _float(y))

    def is_nan(self, x: Value) -> Value:
        return np.isnan(_float(x))

    def both(self, p: Value, q: Value) -> Value:
        return np.logical_and(p, q)

    def either(self, p: Value, q: Value) -> Value:
        return np.logical_or(p, q)

    def select(self, p: Value, x: Value, y: Value) -> Value:
        x, y = (_float(v) if isinstance(v, float) else _int(v) for v in (x, y))
        if x.dtype != y.dtype:
            raise TypeError(f"select takes two floats or two integers, got {x.dtype} and {y.dtype}")
        return np.where(p, x, y)

    @_quiet
    def int_add(self, i: Value, j: Value) -> Value:
        return _int(i) + _int(j)

    @_quiet
    def int_sub(self, i: Value, j: Value) -> Value:
        return _int(i) - _int(j)

    @_quiet
    def int_mul(self, i: Value, j: Value) -> Value:
        return _int(i) * _int(j)

    def mul_high(self, i: Value, j: Value) -> Value:
        i, j = (np.asarray(v, np.int32).view(np.uint32).astype(np.uint64) for v in (i, j))
        return ((i * j) >> np.uint64(32)).astype(np.uint32).view(np.int32)

    def int_and(self, i: Value, j: Value) -> Value:
        return _int(i) & _int(j)

    def int_or(self, i: Value, j: Value) -> Value:
        return _int(i) | _int(j)

    def int_xor(self, i: Value, j: Value) -> Value:
        return _int(i) ^ _int(j)

    def shift_left(self, i: Value, count: Value) -> Value:
        return _int(i) << _int(count)

    def shift_right(self, i: Value, count: Value) -> Value:
        return _int(i) >> _int(count)

    def shift_right_logical(self, i: Value, count: Value) -> Value:
        shifted = np.asarray(_int(i)).view(np.uint32) >> np.asarray(_int(count)).view(np.uint32)
        return shifted.view(np.int32)

    def int_less(self, i: Value, j: Value) -> Value:
        return np.less(_int(i), _int(j))

    def int_equal(self, i: Value, j: Value) -> Value:
        return np.equal(_int(i), _int(j))

    def bits(self, x: Value) -> Value:
        return np.asarray(_float(x)).view(np.int32)

    def from_bits(self, i: Value) -> Value:
        return np.asarray(_int(i)).view(np.float32)

    @_quiet
    def to_int(self, x: Value) -> Value:
        return np.asarray(_float(x)).astype(np.int32)

    def to_float(self, i: Value) -> Value:
        return np.asarray(_int(i)).astype(np.float32)
