"""The GEMM contract in NumPy: the definition that the engines are held to, one statement per clause of the contract."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from shared_specs.contract import DotArithmetic, Float32Split, GemmContract
from shared_specs.formats import BFLOAT16, FLOAT32_NAN, FloatFormat, float_format
from shared_specs.reference import tensor_core

_MAX_TERMS = 1 << 18
"""Products held in memory at a time (a few MiB, as much as a cache holds)."""


def gemm(
    a_bits: np.ndarray,
    b_bits: np.ndarray,
    contract: GemmContract,
    *,
    bias_bits: np.ndarray | None = None,
    bias_format: FloatFormat | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_format: FloatFormat | None = None,
) -> np.ndarray:
    """alpha * (A @ B) + beta * bias under `contract`, on bit patterns.

    Args:
        a_bits: [..., M, K] bits of the contract's operand format.
        b_bits: [..., K, N] bits of the same format; leading dimensions broadcast against those of A.
        bias_bits: bits broadcastable to [..., M, N], or None.
        bias_format: format of the bias; the operand format if None.
        alpha, beta: rounded to float32 once. beta = 0 ignores the bias.
        out_format: format of the output; the operand format if None.

    Returns:
        [..., M, N] bits of `out_format`.
    """
    operand = float_format(contract.operand)
    bias = None if bias_bits is None or np.float32(beta) == 0 else (bias_format or operand).decode(bias_bits)
    acc = accumulate(operand.decode(a_bits), operand.decode(b_bits), contract)
    return (out_format or operand).encode(epilogue(acc, bias, alpha, beta))


def epilogue(acc: np.ndarray, bias: np.ndarray | None, alpha: float, beta: float) -> np.ndarray:
    """alpha * acc, beta * bias and their sum, each rounded once to float32."""
    with np.errstate(all="ignore"):
        out = np.float32(alpha) * acc
        return out if bias is None else out + np.float32(beta) * bias


def accumulate(a: np.ndarray, b: np.ndarray, contract: GemmContract) -> np.ndarray:
    """The float32 accumulator of A [..., M, K] @ B [..., K, N] (values as float32), before the epilogue."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    count = math.prod(batch)
    a = np.broadcast_to(a, (*batch, m, k)).reshape(count, m, k)
    b = np.broadcast_to(b, (*batch, k, n)).reshape(count, k, n)
    out = np.zeros((count, m, n), np.float32)
    rows = max(1, _MAX_TERMS // (contract.dot.k * max(n, 1)))
    several = max(1, rows // max(m, 1))
    for i in range(0, count, several):
        for start in range(0, m, rows):
            block = slice(i, i + several), slice(start, start + rows)
            leaves = [(a[*block, lo:hi], b[i : i + several, lo:hi]) for lo, hi in contract.leaf_bounds(k)]
            out[block] = _tree([_leaf(*leaf, contract) for leaf in leaves])
    return out.reshape(*batch, m, n)


def split(x: np.ndarray, rule: Float32Split) -> list[np.ndarray]:
    """The parts of float32 `x`, largest first, as float32 values of the part format."""
    part = float_format(rule.part)
    if part is not BFLOAT16:
        raise NotImplementedError(f"parts of format {rule.part}")
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    finite = np.isfinite(x)
    parts = [np.where(np.isnan(x), FLOAT32_NAN, bits & np.uint32(0xFFFF0000)).view(np.float32)]
    rest = np.where(finite, x, np.float32(0)) - np.where(finite, parts[0], np.float32(0))
    for _ in range(1, rule.parts):
        parts.append(part.decode(part.encode(rest)))
        rest = rest - parts[-1]
    return parts


def _leaf(a: np.ndarray, b: np.ndarray, contract: GemmContract) -> np.ndarray:
    """One leaf of K, [..., M, K] x [..., K, N]: a plain chain, or the promoted chains of split float32 operands."""
    zero = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    rule, k = contract.split, a.shape[-1]
    if rule is None:
        return tensor_core.chain(a, b, zero, float_format(contract.operand), contract.dot)
    high = cross = zero
    whole = k - k % rule.promote_k
    step = rule.promote_k * max(1, _MAX_TERMS // (contract.dot.k * max(zero.size, 1)))
    with np.errstate(all="ignore"):
        for start, stop in itertools.pairwise((*range(0, whole, step), whole, k)):
            for high_chain, cross_chain in _promoted_chains(a[..., start:stop], b[..., start:stop, :], contract.dot, rule):
                total = high + high_chain
                error = high_chain - (total - high)
                cross = cross + (cross_chain + error)
                high = total
        return np.where(np.isfinite(high), high + cross, high)


def _promoted_chains(
    a: np.ndarray, b: np.ndarray, arithmetic: DotArithmetic, rule: Float32Split
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two chains of each `promote_k` elements of K, or of fewer: they start at +0 and do not wait for one another."""
    size = min(rule.promote_k, a.shape[-1])
    if not size:
        return iter(())
    chunks = a.shape[-1] // size
    a = np.moveaxis(a.reshape(*a.shape[:-1], chunks, size), -2, 0)
    b = np.moveaxis(b.reshape(*b.shape[:-2], chunks, size, b.shape[-1]), -3, 0)
    part, a_parts, b_parts = float_format(rule.part), split(a, rule), split(b, rule)
    zero = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    high = tensor_core.chain(a_parts[0], b_parts[0], zero, part, arithmetic)
    cross = zero
    for i, j in rule.cross:
        cross = tensor_core.chain(a_parts[i], b_parts[j], cross, part, arithmetic)
    return zip(high, cross, strict=True)


def _tree(leaves: list[np.ndarray]) -> np.ndarray:
    """Sum over adjacent pairs, repeated until one is left."""
    with np.errstate(all="ignore"):
        while len(leaves) > 1:
            leaves = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves), 2)]
    return leaves[0]
