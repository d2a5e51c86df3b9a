"""`shared_specs.arithmetic.Arithmetic` on CPU tensors: float32, int32 and bool, of shapes that broadcast.

torch's float32 addition, subtraction, multiplication, division and conversions round once on a CPU. Its square root does not:
the vector library behind it often returns the neighbour of the right number. That, fma and what else torch lacks is built
from float64 and integers here. Subnormals are kept while torch flushes none; `bi_torch.rows.cpu` sees to it.
"""

from functools import cache

import torch
from torch import Tensor

from shared_specs.arithmetic import Value
from shared_specs.formats import FLOAT32, float_format

I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64

EXTRA_BITS = 52 - FLOAT32.mantissa_bits  # fraction bits that float64 has and float32 has not
I32_MIN, I32_MAX, I64_MIN = -(1 << 31), (1 << 31) - 1, -(1 << 63)


@cache
def _float_constant(text: str) -> Tensor:
    """The text is a float's `hex`, which tells -0 from +0."""
    x = torch.tensor(float.fromhex(text), dtype=F32, device="cpu")
    if not x.isnan() and float(x) != float.fromhex(text):
        raise ValueError(f"the constant {float.fromhex(text)!r} is not a float32")
    return x


@cache
def _int_constant(i: int) -> Tensor:
    return torch.tensor(i, dtype=I32, device="cpu")


def _float(x: Value) -> Tensor:
    """A Python number as a float32 tensor without dimensions, anything else as it is."""
    return x if isinstance(x, Tensor) else _float_constant(float(x).hex())


def _int(i: Value) -> Tensor:
    """A Python integer as an int32 tensor without dimensions, anything else as it is."""
    return i if isinstance(i, Tensor) else _int_constant(i)


def _unsigned(i: Value) -> Tensor:
    """int32 read as unsigned, in int64."""
    return _int(i).to(I64) & 0xFFFFFFFF


class TorchArithmetic:
    """The operations on CPU tensors."""

    def add(self, x: Value, y: Value) -> Value:
        return _float(x) + _float(y)

    def sub(self, x: Value, y: Value) -> Value:
        return _float(x) - _float(y)

    def mul(self, x: Value, y: Value) -> Value:
        return _float(x) * _float(y)

    def div(self, x: Value, y: Value) -> Value:
        return _float(x) / _float(y)

    def sqrt(self, x: Value) -> Value:
        """A root of a float32 is 2**-51 of itself from a tie, so a float64 root off by an ulp rounds to the right side too."""
        return _float(x).to(F64).sqrt_().to(F32)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """The product is exact in float64; the sum is rounded there, and the second rounding is harmless but at a tie."""
        product, z = _float(x).to(F64) * _float(y).to(F64), _float(z).to(F64)
        total = product + z
        result = total.to(F32)
        if _may_be_tie(total, result):
            ties = _ties(total, result)
            result[ties] = _fma_at_ties(product.expand_as(total)[ties], z.expand_as(total)[ties])
        return result

    def neg(self, x: Value) -> Value:
        return -_float(x)

    def abs(self, x: Value) -> Value:
        return _float(x).abs()

    def max(self, x: Value, y: Value) -> Value:
        largest = torch.maximum(_float(x), _float(y))
        if _has_zero_order(x, y):
            # Equal values differ at most in the sign of a zero, which `and` of the patterns clears.
            return self.select(_float(x) == _float(y), (self.bits(x) & self.bits(y)).view(F32), largest)
        return largest

    def min(self, x: Value, y: Value) -> Value:
        smallest = torch.minimum(_float(x), _float(y))
        if _has_zero_order(x, y):
            return self.select(_float(x) == _float(y), (self.bits(x) | self.bits(y)).view(F32), smallest)
        return smallest

    def narrow(self, x: Value, dtype: str) -> Value:
        return encode(_float(x), getattr(torch, dtype)).to(F32)

    def less(self, x: Value, y: Value) -> Value:
        return _float(x) < _float(y)

    def equal(self, x: Value, y: Value) -> Value:
        return _float(x) == _float(y)

    def is_nan(self, x: Value) -> Value:
        return _float(x).isnan()

    def both(self, p: Value, q: Value) -> Value:
        return p & q

    def either(self, p: Value, q: Value) -> Value:
        return p | q

    def select(self, p: Value, x: Value, y: Value) -> Value:
        x, y = (_float(v) if isinstance(v, float) else _int(v) for v in (x, y))
        if x.dtype != y.dtype:
            raise TypeError(f"select takes two floats or two integers, got {x.dtype} and {y.dtype}")
        # By masks: torch.where branches on every element.
        mask, i, j = p.to(I32).neg_(), x.view(I32), y.view(I32)
        return (((i ^ j) & mask) ^ j).view(x.dtype)

    def int_add(self, i: Value, j: Value) -> Value:
        return _int(i) + _int(j)

    def int_sub(self, i: Value, j: Value) -> Value:
        return _int(i) - _int(j)

    def int_mul(self, i: Value, j: Value) -> Value:
        return _int(i) * _int(j)

    def mul_high(self, i: Value, j: Value) -> Value:
        return ((_unsigned(i) * _unsigned(j)) >> 32).to(I32)  # the product wraps, with the right bits

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
        return (_unsigned(i) >> _int(count)).to(I32)

    def int_less(self, i: Value, j: Value) -> Value:
        return _int(i) < _int(j)

    def int_equal(self, i: Value, j: Value) -> Value:
        return _int(i) == _int(j)

    def bits(self, x: Value) -> Value:
        return _float(x).view(I32)

    def from_bits(self, i: Value) -> Value:
        return _int(i).view(F32)

    def to_int(self, x: Value) -> Value:
        return _float(x).to(I32)

    def to_float(self, i: Value) -> Value:
        return _int(i).to(F32)


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded once, to nearest even, to `dtype`; every NaN as the canonical pattern."""
    bits = x.view(I32)
    if dtype == torch.bfloat16:
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16)
    elif dtype == torch.float16:
        bits = x.to(dtype).view(torch.int16)
    if x.numel() and x.amax().isnan():
        bits = bits.masked_fill(x.isnan(), float_format(str(dtype).removeprefix("torch.")).nan)
    return bits.view(dtype)


def _has_zero_order(x: Value, y: Value) -> bool:
    """Whether the larger of two zeros may be asked for: not where a constant is none."""
    return all(isinstance(v, Tensor) or v == 0 for v in (x, y))


def _may_be_tie(total: Tensor, result: Tensor) -> bool:
    """Whether any of `_ties`, by two minima: the quickest reductions that torch has."""
    if not total.numel():
        return False
    return int(_tie_pattern(total).view(I32).amin()) == I32_MIN or int(_magnitude(result).amin()) < _LEAST_NORMAL


def _ties(total: Tensor, result: Tensor) -> Tensor:
    """Where a float64 `total` is half way between two float32 numbers, or `result` is not above the least normal number.

    Zeros do not count: where a total that is not zero rounds to zero, the sum was exact.
    """
    return (_tie_pattern(total) == I64_MIN) | (_magnitude(result) < _LEAST_NORMAL)


def _tie_pattern(total: Tensor) -> Tensor:
    """Half way is 100..0 in the bits that float32 lacks: shifted to the top, the least integer."""
    return total.view(I64) << (64 - EXTRA_BITS)


def _magnitude(result: Tensor) -> Tensor:
    """The patterns of |result| in their order, but that of zero at the end: less one as unsigned, moved to signed."""
    return (result.view(I32) << 1) + I32_MAX


_LEAST_NORMAL = (2 << FLOAT32.mantissa_bits) + I32_MIN
"""`_magnitude` of what is above the least normal number is larger."""


def _fma_at_ties(product: Tensor, z: Tensor) -> Tensor:
    """The sum rounded to odd in float64, which makes the rounding to float32 right always.

    S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE
    Transactions on Computers 57(4), 2008: 53 bits are enough, since 53 >= 24 + 2, also for subnormal results.
    """
    total = product + z
    rest = total - product  # Knuth's TwoSum: product + z = total + error, exactly
    error = (product - (total - rest)) + (z - rest)
    bits = total.view(I64)
    # An even total that is not exact moves to its odd neighbour in the direction of the error.
    move = total.isfinite() & (error != 0) & (bits & 1 == 0)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(move, bits + step, bits).view(F64).to(F32)
