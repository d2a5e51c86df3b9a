"""The GEMM contract on CPU tensors, in torch operations alone.

A dot instruction is evaluated for a whole tile of outputs at once, in float64, where the product of two operands, the
alignment of the terms (a multiplication by a power of two) and their sum are all exact; what the instruction truncates is
truncated explicitly, and what rounds to float32 is rounded by exact steps. So the bits do not depend on threads, on vector
width or on the order of a sum; nor on torch's flush-denormal mode, since no subnormal is ever computed with.

Where the operands' exponents show that no sum can be subnormal or overflow, a lean path skips what only those need; it
gives the same bits (`_ordinary` says why).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shared_specs.contract import DotArithmetic, Float32Split, GemmContract
from shared_specs.formats import BFLOAT16, FLOAT32, FloatFormat, float_format

F64, I64 = torch.float64, torch.int64

TILE_OUTPUTS = 1 << 14  # outputs worked on at a time: the 16 products of each, in float64, stay in the L2 cache
TILE_COLUMNS = 512
SLAB_OPERANDS = 1 << 17  # operand elements decoded at a time

F64_BIAS, F64_MANTISSA = 1023, 52
F64_EXPONENT = 0x7FF << F64_MANTISSA
HEADROOM = F64_BIAS - (1 - FLOAT32.min_exponent)  # 2**HEADROOM times what overflows float32 overflows float64
ZERO_EXPONENT = -(1 << 13)  # exponent given to zeros: never the largest beside a nonzero product


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
            result = _round(result + _round(_decode(terms[tile], careful=True) * by_beta))
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
    careful = not _ordinary(a, b, contract)
    acc = _Accumulators((a.shape[0], a.shape[1], b.shape[2]), contract.dot, careful)
    for x, y in _slabs(a, b, contract.dot.k, most=a.shape[-1]):
        acc.add(_operand(x.movedim(-1, 0), contract.dot, careful), _operand(y.movedim(1, 0), contract.dot, careful))
    return acc.values()


def _split_chain(a: Tensor, b: Tensor, contract: GemmContract) -> Tensor:
    """float32 operands: chains over the parts, promoted every `promote_k` elements of K."""
    rule, dot = contract.split, contract.dot
    assert rule is not None
    careful = not _ordinary(a, b, contract)
    high = _empty((a.shape[0], a.shape[1], b.shape[2]), F64).zero_()
    cross = torch.zeros_like(high)
    # Chunks of promote_k are independent until they are promoted: work on a slab's chunks side by side.
    for x, y in _slabs(a, b, rule.promote_k, most=TILE_OUTPUTS // high.numel()):
        chunks = x.shape[-1] // rule.promote_k
        x = x.unflatten(-1, (chunks, -1)).movedim(-2, 1).flatten(0, 1)
        y = y.unflatten(1, (chunks, -1)).flatten(0, 1)
        left = [_operand(part.movedim(-1, 0), dot, careful) for part in _parts(x, rule, careful)]
        right = [_operand(part.movedim(1, 0), dot, careful) for part in _parts(y, rule, careful)]
        high_chains, cross_chains = (_Accumulators((x.shape[0], x.shape[1], y.shape[2]), dot, careful) for _ in range(2))
        high_chains.add(left[0], right[0])
        for i, j in rule.cross:
            cross_chains.add(left[i], right[j])
        by_chunk = (chains.values().unflatten(0, (-1, chunks)).unbind(1) for chains in (high_chains, cross_chains))
        for high_chain, cross_chain in zip(*by_chunk, strict=True):
            high, cross = _promote(high, cross, high_chain, cross_chain, careful)
    return torch.where(high.isfinite(), _round(high + cross, careful), high)


def _promote(high: Tensor, cross: Tensor, high_chain: Tensor, cross_chain: Tensor, careful: bool) -> tuple[Tensor, Tensor]:
    """The fast two-sum of `Float32Split`, every operation rounded to float32."""
    total = _round(high + high_chain, careful)
    error = _round(high_chain - _round(total - high, careful), careful)
    return total, _round(cross + _round(cross_chain + error, careful), careful)


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


class _Operand(NamedTuple):
    """A slab of one operand: [steps, k, L, rows] in float64, beside the exponents that the instruction sees, in int16."""

    values: Tensor
    exponents: Tensor


def _operand(x: Tensor, dot: DotArithmetic, careful: bool) -> _Operand:
    """The slab `x` [K, L, rows] of a 16-bit format. A subnormal has the exponent of the smallest normal."""
    fmt = _format(x.dtype)
    x = x.unflatten(0, (-1, dot.k)).contiguous()
    magnitude = _bits(x) & fmt.nan
    offset = magnitude.clamp(max=1).mul_(-ZERO_EXPONENT).add_(ZERO_EXPONENT + fmt.min_exponent - 1)
    exponents = magnitude.bitwise_right_shift_(fmt.mantissa_bits).clamp_(min=1).add_(offset)
    return _Operand(_decode(x, careful), exponents)


class _Accumulators:
    """float32 accumulators [L, M, N] of the dot instruction, starting at +0 and held as float64.

    `careful` is needed where an accumulator may become subnormal or overflow (see `_ordinary`); the bits are the same.
    """

    def __init__(self, shape: tuple[int, int, int], dot: DotArithmetic, careful: bool) -> None:
        chains, m, n = shape
        self.transposed = n < m  # the longer side is the contiguous one
        shape = (chains, n, m) if self.transposed else shape
        self.dot, self.careful = dot, careful
        self.terms = _empty((dot.k + 1, *shape), F64)  # the products, and the accumulator as the last term
        self.products, self.acc = self.terms[:-1], self.terms[-1].zero_()
        self.sums = _empty(shape, F64)
        self.exponents = _empty((dot.k, *shape), torch.int16)
        self.largest = _empty(shape, torch.int16)
        self.own = _empty(shape, I64)
        self.scale = _empty(shape, I64)

    def values(self) -> Tensor:
        """The accumulators, [L, M, N]."""
        return self.acc.mT if self.transposed else self.acc

    def add(self, a: _Operand, b: _Operand) -> None:
        """Run one dot instruction for each step of the slab, in order."""
        if self.transposed:
            a, b = b, a
        left, right = (x.unsqueeze(-1) for x in a), (y.unsqueeze(-2) for y in b)
        for x, x_exponent, y, y_exponent in zip(*left, *right, strict=True):
            torch.mul(x, y, out=self.products)
            torch.add(x_exponent, y_exponent, out=self.exponents)
            self._instruction()

    def _instruction(self) -> None:
        # Bits of 2**e, e the largest exponent among the nonzero terms. The accumulator's is its own exponent field.
        torch.amax(self.exponents, 0, out=self.largest)
        largest = self.scale.copy_(self.largest.clamp_(min=self.dot.min_exponent)).add_(F64_BIAS)
        largest.bitwise_left_shift_(F64_MANTISSA)
        own = torch.bitwise_and(self.acc.view(I64), F64_EXPONENT, out=self.own)
        if self.careful:  # a subnormal has the exponent of the smallest normal, a zero has none
            own.clamp_(min=_power(FLOAT32.min_exponent)).masked_fill_(self.acc == 0, 0)
        torch.maximum(largest, own, out=largest)
        # Bits of 2**(fraction_bits - e), which makes the terms fixed-point: inverting the exponent field gives 2**(1 - e).
        scale = largest.bitwise_xor_(F64_EXPONENT).add_((self.dot.fraction_bits - 1) << F64_MANTISSA).view(F64)
        self.terms.mul_(scale).trunc_()
        torch.sum(self.terms, 0, out=self.sums)  # exact: integers below 2**53
        self.sums.view(I64).bitwise_and_(-1 << (F64_MANTISSA - FLOAT32.mantissa_bits))
        torch.div(self.sums, scale, out=self.acc)
        if self.careful:
            # Truncate at float32's smallest subnormal, overflow where float32 does, and make a zero +0.
            down = _smallest(FLOAT32)
            self.acc.mul_(2.0**-down).trunc_().mul_(2.0 ** (down + HEADROOM)).mul_(2.0**-HEADROOM).add_(0.0)


def _power(exponent: int) -> int:
    """Bits of the float64 2**exponent."""
    return (exponent + F64_BIAS) << F64_MANTISSA


def _smallest(fmt: FloatFormat) -> int:
    """Exponent of the smallest subnormal of `fmt`."""
    return fmt.min_exponent - fmt.mantissa_bits


def _ordinary(a: Tensor, b: Tensor, contract: GemmContract) -> bool:
    """Whether no operand is non-finite or a float32 subnormal, and every nonzero sum stays among float32's normal numbers.

    An instruction's nonzero result is no smaller than the last fraction bit of its largest exponent, and no sum exceeds
    K products, each below 2**(e + 2).
    """
    (low_a, high_a), (low_b, high_b) = _exponent_range(a), _exponent_range(b)
    parts_below = 0 if contract.split is None else FLOAT32.mantissa_bits  # a part's leading bit may be its value's last
    terms = a.shape[-1] * (1 if contract.split is None else 1 + len(contract.split.cross))
    normal = min(low_a, low_b) - parts_below >= FLOAT32.min_exponent
    grid = low_a + low_b - 2 * parts_below - contract.dot.fraction_bits
    finite = max(high_a, high_b) < 1 << (float_format(contract.operand).exponent_bits - 1)
    bound = high_a + high_b + 2 + terms.bit_length()
    return normal and finite and grid >= FLOAT32.min_exponent and bound < 1 - FLOAT32.min_exponent


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


def _decode(x: Tensor, careful: bool) -> Tensor:
    """float64 values. `careful`: also of subnormals, which torch's own conversion flushes in flush-denormal mode."""
    if not careful:
        return x.to(F64)
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
        return torch.where(x.isfinite(), _decode(part, careful), 0.0) if careful else part.to(torch.float32)

    high = _bits(x) >> (FLOAT32.bits - BFLOAT16.bits)
    if careful:
        high = torch.where(x.isnan(), BFLOAT16.nan, high)
    parts, rest = [high.to(torch.int16).view(torch.bfloat16)], value(x)
    while len(parts) < rule.parts:
        rest = rest - value(parts[-1])
        parts.append(_encode(rest, torch.bfloat16, careful))
    return parts


def _ulp(x: Tensor, fmt: FloatFormat) -> Tensor:
    """The distance of `fmt`'s numbers around each float64 element, before rounding."""
    exponent = x.view(I64).bitwise_and(F64_EXPONENT).clamp_(min=_power(fmt.min_exponent))
    return exponent.sub_(fmt.mantissa_bits << F64_MANTISSA).view(F64)


def _round(x: Tensor, careful: bool = True) -> Tensor:
    """float64 values rounded to nearest even in float32, as float64; by torch's conversion where it cannot flush."""
    if not careful:
        return x.to(torch.float32).to(F64)
    ulp = _ulp(x, FLOAT32)
    return (x / ulp).round_().mul_(ulp).mul_(2.0**HEADROOM).mul_(2.0**-HEADROOM)


def _encode(x: Tensor, dtype: torch.dtype, careful: bool = True) -> Tensor:
    """float64 values rounded once, to nearest even, to `dtype`; every NaN as the canonical pattern."""
    if not careful:
        return x.to(dtype)
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
