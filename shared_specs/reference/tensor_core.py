"""One tensor-core dot instruction, bit for bit, in NumPy.

The arithmetic is that of Hopper's `wgmma` and `mma.sync` on bfloat16 and float16 operands with a float32 accumulator,
found by Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (2025), and by the MMA-Sim project, and held here
to outputs recorded on an H100 (tests/golden). It differs from IEEE 754 in that nothing is rounded to nearest:

1. every product is exact; its exponent is the sum of the operands' exponents, before any normalisation
   (a subnormal operand has the exponent of the smallest normal number of its format);
2. products and accumulator are aligned to the largest exponent among them, but to no less than `min_exponent`, and
   truncated to `fraction_bits` fractional bits;
3. the aligned values are added exactly;
4. the sum is truncated to float32 (below 2^-126 to a multiple of 2^-149); what truncates to zero is +0,
   and what reaches 2^128 is an infinity;
5. a NaN operand, inf * 0 or infinities of both signs give the canonical NaN, otherwise an infinity stays.
"""

import numpy as np

from shared_specs.contract import DotArithmetic
from shared_specs.formats import FLOAT32, FLOAT32_NAN, FloatFormat

_NO_EXPONENT = -10_000
"""Exponent of a zero: below that of every product."""


def dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray, operand: FloatFormat, arithmetic: DotArithmetic) -> np.ndarray:
    """acc + a @ b as one instruction computes it.

    Args:
        a: [..., M, k] values of the operand format, as float32.
        b: [..., k, N] values of the operand format, as float32.
        acc: [..., M, N] float32 accumulator.
        operand: format of a and b.
        arithmetic: the instruction; k must equal `arithmetic.k`.

    Returns:
        [..., M, N] float32.
    """
    if a.shape[-1] != arithmetic.k or b.shape[-2] != arithmetic.k:
        raise ValueError(f"dot takes {arithmetic.k} products, got {a.shape} x {b.shape}")
    with np.errstate(all="ignore"):
        exponents = _exponent(a, operand)[..., :, :, None] + _exponent(b, operand)[..., None, :, :]
        largest = np.maximum(exponents.max(axis=-2), np.maximum(_exponent(acc, FLOAT32), arithmetic.min_exponent))
        to_fixed_point = np.ldexp(1.0, arithmetic.fraction_bits - largest)

        products = a[..., :, :, None].astype(np.float64) * b[..., None, :, :]
        special = None if all(np.isfinite(x).all() for x in (a, b, acc)) else products.sum(axis=-2) + acc
        products *= to_fixed_point[..., :, None, :]
        aligned = np.trunc(products, out=products).sum(axis=-2) + np.trunc(acc * to_fixed_point)
        total = _truncate_to_float32(aligned / to_fixed_point)
        if special is None:
            return total
        total = np.where(np.isfinite(special), total, special.astype(np.float32))
        return np.where(np.isnan(total), FLOAT32_NAN.view(np.float32), total)


def chain(a: np.ndarray, b: np.ndarray, acc: np.ndarray, operand: FloatFormat, arithmetic: DotArithmetic) -> np.ndarray:
    """`dot` over ascending groups of `arithmetic.k` elements of K, the last one filled with zeros.

    Shapes as in `dot`, with any K.
    """
    k = a.shape[-1]
    padding = -k % arithmetic.k
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, padding)])
    b = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, padding), (0, 0)])
    for start in range(0, k, arithmetic.k):
        step = slice(start, start + arithmetic.k)
        acc = dot(a[..., step], b[..., step, :], acc, operand, arithmetic)
    return acc


def _exponent(x: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    exponent = np.maximum(np.frexp(x)[1] - 1, fmt.min_exponent)
    return np.where(x == 0, _NO_EXPONENT, exponent)


def _truncate_to_float32(x: np.ndarray) -> np.ndarray:
    """float64 to float32 toward zero; zero results are +0, overflow is an infinity."""
    exponent = np.maximum(np.frexp(x)[1] - 1, FLOAT32.min_exponent)
    ulp = exponent - FLOAT32.mantissa_bits
    truncated = np.ldexp(np.trunc(np.ldexp(x, -ulp)), ulp)
    return (truncated + 0.0).astype(np.float32)
