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
        return _fma_at_ties(product, z) if _may_be_tie(total, result) else result

    def neg(self, x: Value) -> Value:
        return -_float(x)

    def abs(self, x: Value) -> Value:
        return _float(x).abs()

    def max(self, x: Value, y: Value) -> Value:
        x, y = _float(x), _float(y)
        # Equal values differ at most in the sign of a zero, which `and` of the patterns clears.
        return torch.where(x == y, (x.view(I32) & y.view(I32)).view(F32), torch.maximum(x, y))

    def min(self, x: Value, y: Value) -> Value:
        x, y = _float(x), _float(y)
        return torch.where(x == y, (x.view(I32) | y.view(I32)).view(F32), torch.minimum(x, y))

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
        return torch.where(p, x, y)

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
    nan = torch.tensor(float_format(str(dtype).removeprefix("torch.")).nan, dtype=bits.dtype, device="cpu")
    return torch.where(x.isnan(), nan, bits).view(dtype)


def _may_be_tie(total: Tensor, result: Tensor) -> bool:
    """Whether a float64 `total` stands half way between two float32 numbers, or among the subnormal ones.

    Half way is the pattern 100..0 in the bits that float32 lacks: shifted to the top, the least integer. A nonzero result up to
    the smallest normal number counts: shifted to the left, less one, its pattern is below all others, read as unsigned. A zero
    does not: where a nonzero total rounds to zero, the sum was exact.
    """
    if not total.numel():
        return False
    ties = total.view(I64) << (64 - EXTRA_BITS)
    magnitude = (result.view(I32) << 1) + I32_MAX
    smallest_normal = 1 << FLOAT32.mantissa_bits
    return int(ties.amin()) == I64_MIN or int(magnitude.amin()) < 2 * smallest_normal + I32_MIN


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
