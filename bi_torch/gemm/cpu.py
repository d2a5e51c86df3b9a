"""The GEMM contract on CPU tensors, in torch operations alone.

A dot instruction is evaluated for a whole tile of outputs at once, in steps that are exact: the product of two operands, the
alignment of the terms (a multiplication by a power of two) and their sum; what the instruction truncates is truncated
explicitly, and what rounds to float32 is rounded by exact steps. So the bits do not depend on threads, on vector width or
on the order of a sum; nor on torch's flush-denormal mode, since no subnormal is ever computed with.

Where the operands' exponents allow it (`_ordinary` says when), the steps are float32 and int32 operations; elsewhere float64
ones, at a quarter to a half of the speed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shared_specs.contract import DotArithmetic, Float32Split, GemmContract
from shared_specs.formats import BFLOAT16, FLOAT32, FloatFormat, float_format

F32, I32, F64, I64 = torch.float32, torch.int32, torch.float64, torch.int64

TILE_OUTPUTS = 1 << 14  # outputs worked on at a time: the 16 products of each, in float32, stay in the L2 cache
TILE_COLUMNS = 256
TILE_CHAINS = 1 << 15  # chains of a tile's chunks side by side: enough for two threads to work on products of their own
SLAB_OPERANDS = 1 << 18  # operand elements decoded at a time

F32_EXPONENT = 0xFF << FLOAT32.mantissa_bits
BFLOAT16_EXPONENT = 0xFF << BFLOAT16.mantissa_bits
F64_BIAS, F64_MANTISSA = 1023, 52
F64_EXPONENT = 0x7FF << F64_MANTISSA
HEADROOM = F64_BIAS - (1 - FLOAT32.min_exponent)  # 2**HEADROOM times what overflows float32 overflows float64
ZERO_EXPONENT = -(1 << 13)  # exponent given to zeros: never the largest beside a nonzero product

# In 32 bits, half a bfloat16 exponent field stands for an exponent, so that two of them add up to the bits of 2**(e + e'), and
# a zero has the exponent of its own field.
HALF_BIAS = (1 - BFLOAT16.min_exponent) << (BFLOAT16.mantissa_bits - 1)
BFLOAT16_ZERO = BFLOAT16.min_exponent - 1


@torch.no_grad()
def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    *,
    alpha: float,
    beta: float,
    contract: GemmContract,
    out_dtype: torch.dtype,
) -> Tensor:
    """`alpha * (a @ b) + beta * bias` under `contract`.

    Args:
        a: [B, M, K] of the contract's operand dtype, any strides.
        b: [B, K, N] of the same dtype, any strides.
        bias: broadcastable to [B, M, N], of a 16-bit float dtype or float32; not read where beta is 0.
        alpha: factor of the product, rounded to float32 once.
        beta: factor of the bias, rounded to float32 once.
        contract: the bits.
        out_dtype: dtype of the result.

    Returns:
        [B, M, N] of `out_dtype`, contiguous.
    """
    shape = (a.shape[0], a.shape[1], b.shape[2])
    out = _empty(shape, out_dtype)
    by_alpha, by_beta = (_round(torch.tensor(x, dtype=F64, device="cpu")) for x in (alpha, beta))
    terms = None if bias is None or by_beta == 0 else bias.expand(shape)
    for tile in _tiles(shape):
        batch, rows, columns = tile
        # A float32 product is exact in float64, and 53 bits are enough (2 * 24 + 2) for rounding a sum twice to be harmless.
        result = _round(_accumulate(a[batch, rows], b[batch, :, columns], contract) * by_alpha)
        if terms is not None:
            result = _round(result + _round(_decode(terms[tile]) * by_beta))
        out[tile] = _encode(result, out_dtype)
    return out


def _tiles(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice, slice]]:
    batch, m, n = shape
    if not batch * m * n:
        return
    columns = min(n, TILE_COLUMNS)
    rows = min(m, TILE_OUTPUTS // columns)
    columns = min(n, TILE_OUTPUTS // rows)
    matrices = min(batch, TILE_OUTPUTS // (rows * columns))
    for i in range(0, batch, matrices):
        for r in range(0, m, rows):
            for c in range(0, n, columns):
                yield slice(i, i + matrices), slice(r, r + rows), slice(c, c + columns)


def _accumulate(a: Tensor, b: Tensor, contract: GemmContract) -> Tensor:
    """The float32 accumulators of a tile, as float64: the leaves of K and the tree over adjacent pairs of them."""
    chain = _chain if contract.split is None else _split_chain
    leaves = [chain(a[..., lo:hi], b[:, lo:hi], contract) for lo, hi in contract.leaf_bounds(a.shape[-1])]
    while len(leaves) > 1:
        leaves = [_round(x + y) for x, y in zip(leaves[::2], leaves[1::2], strict=True)]
    return leaves[0]


def _chain(a: Tensor, b: Tensor, contract: GemmContract) -> Tensor:
    """One chain of dot instructions over the whole K, from +0."""
    accumulators = _Accumulators if _ordinary(a, b, contract) else _CarefulAccumulators
    acc = accumulators((a.shape[0], a.shape[1], b.shape[2]), contract.dot)
    for x, y in _slabs(a, b, contract.dot.k, most=a.shape[-1]):
        acc.add(x, y.mT)
    return acc.values().to(F64)


def _split_chain(a: Tensor, b: Tensor, contract: GemmContract) -> Tensor:
    """float32 operands: chains over the parts, promoted every `promote_k` elements of K."""
    rule, dot = contract.split, contract.dot
    assert rule is not None
    ordinary = _ordinary(a, b, contract)
    accumulators = _Accumulators if ordinary else _CarefulAccumulators
    high = _empty((a.shape[0], a.shape[1], b.shape[2]), F32 if ordinary else F64).zero_()
    cross = torch.zeros_like(high)
    # Chunks of promote_k are independent until they are promoted: work on a slab's chunks side by side.
    for x, y in _slabs(a, b, rule.promote_k, most=TILE_CHAINS // high.numel()):
        chunks = x.shape[-1] // rule.promote_k
        x = x.unflatten(-1, (chunks, -1)).movedim(-2, 1).flatten(0, 1)
        y = y.mT.unflatten(-1, (chunks, -1)).movedim(-2, 1).flatten(0, 1)
        left, right = (_parts(z, rule, careful=not ordinary) for z in (x, y))
        high_chains, cross_chains = (accumulators((x.shape[0], x.shape[1], y.shape[1]), dot) for _ in range(2))
        high_chains.add(left[0], right[0])
        for i, j in rule.cross:
            cross_chains.add(left[i], right[j])
        by_chunk = (chains.values().unflatten(0, (-1, chunks)).unbind(1) for chains in (high_chains, cross_chains))
        for high_chain, cross_chain in zip(*by_chunk, strict=True):
            total = _round(high + high_chain)
            error = _round(high_chain - _round(total - high))
            high, cross = total, _round(cross + _round(cross_chain + error))
    return torch.where(high.isfinite(), _round(high + cross), high).to(F64)


def _slabs(a: Tensor, b: Tensor, multiple: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive pieces of K, zero-filled to a multiple of `multiple`, of at most `most` multiples."""
    k = a.shape[-1]
    per_k = a.shape[0] * (a.shape[1] + b.shape[2])
    step = max(1, min(most, SLAB_OPERANDS // (per_k * multiple))) * multiple
    for lo in range(0, k, step):
        x, y = a[..., lo : lo + step], b[:, lo : lo + step]
        if fill := -x.shape[-1] % multiple:
            x = torch.nn.functional.pad(x, (0, fill))
            y = torch.nn.functional.pad(y, (0, 0, 0, fill))
        yield x, y


class _Accumulators:
    """float32 accumulators [L, M, N] of the dot instruction, starting at +0; for operands that are `_ordinary`."""

    dtype = F32

    def __init__(self, shape: tuple[int, int, int], dot: DotArithmetic) -> None:
        chains, m, n = shape
        self.dot = dot
        self.transposed = n < m  # the longer side is the contiguous one
        self.shape = (chains, n, m) if self.transposed else shape
        self.terms = self._new(dot.k + 1, self.dtype)  # the products, and the accumulator as the last term
        self.products, self.acc = self.terms[:, :-1], self.terms[:, -1].zero_()
        self.exponents = self._new(dot.k, torch.int16)
        self.largest = self._new(0, torch.int16)
        self._allocate()

    def _new(self, terms: int, dtype: torch.dtype) -> Tensor:
        chains, m, n = self.shape
        return _empty((chains, terms, m, n) if terms else self.shape, dtype)

    def _allocate(self) -> None:
        self.fixed = self.terms.view(I32)  # the fixed-point terms take the memory of the scaled ones
        self.own, self.products_sum = self._new(0, I32), self._new(0, I32)
        self.scale, self.sums = self._new(0, F32), self._new(0, F64)
        self.fraction = torch.tensor(2.0**self.dot.fraction_bits, dtype=F32, device="cpu")
        # No term has bits below float32's smallest normal, so that a larger exponent, up to here, drops none.
        least = max(self.dot.min_exponent, FLOAT32.min_exponent + self.dot.fraction_bits)
        self.least = (least + 1 - BFLOAT16.min_exponent) << BFLOAT16.mantissa_bits

    def values(self) -> Tensor:
        """The accumulators, [L, M, N]."""
        return self.acc.mT if self.transposed else self.acc

    def add(self, a: Tensor, b: Tensor) -> None:
        """Run the dot instructions of a slab, [L, M, K] by [L, N, K] of a 16-bit format, in order."""
        if self.transposed:
            a, b = b, a
        x, x_exponents = self._operand(a)
        y, y_exponents = self._operand(b)
        operands = x.unsqueeze(-1), x_exponents.unsqueeze(-1), y.unsqueeze(-2), y_exponents.unsqueeze(-2)
        for x, x_exponent, y, y_exponent in zip(*operands, strict=True):
            torch.mul(x, y, out=self.products)
            torch.add(x_exponent, y_exponent, out=self.exponents)
            torch.amax(self.exponents, 1, out=self.largest)
            self._instruction()

    def _operand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and exponents [steps, L, k, rows] of a slab."""
        x = self._by_steps(x)
        if x.dtype == torch.bfloat16:
            return x.to(F32), _bits(x).bitwise_and(BFLOAT16_EXPONENT).sub_(HALF_BIAS)
        return x.to(F32), _exponents(x, BFLOAT16_ZERO).mul_(1 << BFLOAT16.mantissa_bits).add_(HALF_BIAS)

    def _by_steps(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.dot.k)).permute(2, 0, 3, 1).contiguous()

    def _instruction(self) -> None:
        # 2**e, e the largest exponent among the nonzero terms. The accumulator's is its own exponent field.
        largest = self.scale.copy_(self.largest.clamp_(min=self.least).view(torch.bfloat16)).view(I32)
        own = torch.bitwise_and(self.acc.view(I32), F32_EXPONENT, out=self.own)
        torch.maximum(largest, own, out=largest)
        scale = torch.div(self.fraction, self.scale, out=self.scale)  # 2**(fraction_bits - e): makes the terms fixed-point
        self.fixed.copy_(self.terms.mul_(scale.unsqueeze(1)))  # truncates
        # int32 holds the sum of the products, not with the accumulator beside them: float64 does.
        torch.sum(self.fixed[:, :-1], 1, dtype=I32, out=self.products_sum)
        self.sums.copy_(self.products_sum).add_(self.fixed[:, -1])
        self.sums.view(I64).bitwise_and_(-1 << (F64_MANTISSA - FLOAT32.mantissa_bits))
        self.acc.copy_(self.sums).div_(scale)


class _CarefulAccumulators(_Accumulators):
    """The same for any operands, in float64."""

    dtype = F64

    def _allocate(self) -> None:
        self.sums, self.own, self.scale = self._new(0, F64), self._new(0, I64), self._new(0, I64)

    def _operand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._by_steps(x)
        return _decode(x), _exponents(x, ZERO_EXPONENT)

    def _instruction(self) -> None:
        # Bits of 2**e, e the largest exponent among the nonzero terms. The accumulator's is its own exponent field, but
        # a subnormal has the exponent of the smallest normal, a zero has none.
        largest = self.scale.copy_(self.largest.clamp_(min=self.dot.min_exponent)).add_(F64_BIAS)
        largest.bitwise_left_shift_(F64_MANTISSA)
        own = torch.bitwise_and(self.acc.view(I64), F64_EXPONENT, out=self.own)
        own.clamp_(min=_power(FLOAT32.min_exponent)).masked_fill_(self.acc == 0, 0)
        torch.maximum(largest, own, out=largest)
        # Bits of 2**(fraction_bits - e), which makes the terms fixed-point: inverting the exponent field gives 2**(1 - e).
        scale = largest.bitwise_xor_(F64_EXPONENT).add_((self.dot.fraction_bits - 1) << F64_MANTISSA).view(F64)
        self.terms.mul_(scale.unsqueeze(1)).trunc_()
        torch.sum(self.terms, 1, out=self.sums)  # exact: integers below 2**53
        self.sums.view(I64).bitwise_and_(-1 << (F64_MANTISSA - FLOAT32.mantissa_bits))
        torch.div(self.sums, scale, out=self.acc)
        # Truncate at float32's smallest subnormal, overflow where float32 does, and make a zero +0.
        down = _smallest(FLOAT32)
        self.acc.mul_(2.0**-down).trunc_().mul_(2.0 ** (down + HEADROOM)).mul_(2.0**-HEADROOM).add_(0.0)


def _exponents(x: Tensor, zero: int) -> Tensor:
    """The exponents that the instruction sees, int16: a subnormal has that of the smallest normal, a zero `zero`."""
    fmt = _format(x.dtype)
    magnitude = _bits(x) & fmt.nan
    offset = magnitude.clamp(max=1).mul_(fmt.min_exponent - zero).add_(zero - 1)
    return magnitude.bitwise_right_shift_(fmt.mantissa_bits).clamp_(min=1).add_(offset)


def _power(exponent: int) -> int:
    """Bits of the float64 2**exponent."""
    return (exponent + F64_BIAS) << F64_MANTISSA


def _smallest(fmt: FloatFormat) -> int:
    """Exponent of the smallest subnormal of `fmt`."""
    return fmt.min_exponent - fmt.mantissa_bits


def _ordinary(a: Tensor, b: Tensor, contract: GemmContract) -> bool:
    """Whether 32 bits hold every term of every instruction exactly, none of them subnormal or non-finite.

    Parts, products and sums are multiples of the last places of what they are made of; a format's subnormals have the last
    place of its smallest normal. With exponents up to `fraction_bits`, a zero's product stays below those that
    `_Accumulators` aligns to, and no sum overflows.
    """
    fmt, dot = float_format(contract.operand), contract.dot
    (low_a, high_a), (low_b, high_b) = _exponent_range(a), _exponent_range(b)
    last_place = min(low_a, low_b, low_a + low_b - fmt.mantissa_bits) - fmt.mantissa_bits
    moderate = max(high_a, high_b) <= min(dot.fraction_bits, 1 - fmt.min_exponent)
    fixed = dot.k << (dot.fraction_bits + 2)  # no sum of aligned products reaches it
    return moderate and last_place >= FLOAT32.min_exponent and fixed <= 1 << 31


def _exponent_range(x: Tensor) -> tuple[int, int]:
    """Least and largest exponent of the nonzero elements; (large, small) where there are none."""
    fmt = _format(x.dtype)
    low, high = fmt.nan, 0
    for piece in x.split(max(1, SLAB_OPERANDS // max(1, x.shape[0] * x.shape[2])), dim=1) if x.numel() else ():
        magnitude = _bits(piece) & fmt.nan
        high = max(high, int(magnitude.amax()))
        low = min(low, int(magnitude.sub_(1).bitwise_and_(fmt.nan).amin()) + 1)  # zeros wrap to the largest
    bias = 1 - fmt.min_exponent
    return (low >> fmt.mantissa_bits) - bias, (high >> fmt.mantissa_bits) - bias


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device


def _format(dtype: torch.dtype) -> FloatFormat:
    return float_format(str(dtype).removeprefix("torch."))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.itemsize == 2 else torch.int32)


def _decode(x: Tensor) -> Tensor:
    """float64 values, also of subnormals, which torch's own conversion flushes in flush-denormal mode."""
    if x.dtype == torch.bfloat16:
        x = (_bits(x).to(torch.int32) << 16).view(torch.float32)
    x = x.to(torch.float32)  # a float16 subnormal is a normal float32
    values = x.to(F64)
    magnitude = _bits(x) & FLOAT32.nan
    subnormals = magnitude.to(F64).mul_(2.0 ** _smallest(FLOAT32)).copysign_(values)
    return torch.where(magnitude < 1 << FLOAT32.mantissa_bits, subnormals, values)


def _parts(x: Tensor, rule: Float32Split, careful: bool) -> list[Tensor]:
    """The bfloat16 parts of float32 `x`: the first truncated, the others rounded to nearest."""
    if rule.part != BFLOAT16.name:
        raise NotImplementedError(f"parts of format {rule.part}")

    def value(part: Tensor) -> Tensor:
        return torch.where(x.isfinite(), _decode(part), 0.0) if careful else part.to(F32)

    high = _bits(x) >> (FLOAT32.bits - BFLOAT16.bits)
    if careful:
        high = torch.where(x.isnan(), BFLOAT16.nan, high)
    parts, rest = [high.to(torch.int16).view(torch.bfloat16)], value(x)
    while len(parts) < rule.parts:
        rest = rest - value(parts[-1])
        parts.append(_encode(rest, torch.bfloat16) if careful else rest.to(torch.bfloat16))
    return parts


def _ulp(x: Tensor, fmt: FloatFormat) -> Tensor:
    """The distance of `fmt`'s numbers around each float64 element, before rounding."""
    exponent = x.view(I64).bitwise_and(F64_EXPONENT).clamp_(min=_power(fmt.min_exponent))
    return exponent.sub_(fmt.mantissa_bits << F64_MANTISSA).view(F64)


def _round(x: Tensor) -> Tensor:
    """float64 values rounded to nearest even in float32, as float64. What torch computed in float32 is rounded already."""
    if x.dtype == F32:
        return x
    ulp = _ulp(x, FLOAT32)
    return (x / ulp).round_().mul_(ulp).mul_(2.0**HEADROOM).mul_(2.0**-HEADROOM)


def _encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once, to nearest even, to `dtype`; every NaN as the canonical pattern."""
    fmt = _format(dtype)
    infinity = ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
    magnitude = x.abs().clamp_(max=2.0**200)  # beyond every format, and small enough for the integers below
    ulp = _ulp(magnitude, fmt)
    significand = (magnitude / ulp).round_().to(I64)  # with the hidden bit, which adds one to the exponent field
    field = (ulp.view(I64) >> F64_MANTISSA) - (F64_BIAS + _smallest(fmt))
    bits = (significand + (field << fmt.mantissa_bits)).clamp_(max=infinity)
    bits |= (x.view(I64) >> 63) << (fmt.bits - 1)
    bits = torch.where(x.isnan(), fmt.nan, bits)
    return bits.to(torch.int16 if fmt.bits == 16 else torch.int32).view(dtype)
