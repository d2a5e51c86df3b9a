"""The GEMM contract in NumPy: the definition that the engines are held to, one statement per clause of the contract."""

import math

import numpy as np

from shared_specs.contract import Float32Split, GemmContract
from shared_specs.formats import BFLOAT16, FLOAT32_NAN, FloatFormat, float_format
from shared_specs.reference import tensor_core

_MAX_TERMS = 1 << 21
"""Products held in memory at a time (a few tens of MiB)."""


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
    for i in range(count):
        for start in range(0, m, rows):
            block = slice(start, start + rows)
            out[i, block] = _tree([_leaf(a[i, block, lo:hi], b[i, lo:hi], contract) for lo, hi in contract.leaf_bounds(k)])
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
    """One leaf of K: a plain chain, or the promoted chains of split float32 operands."""
    zero = np.zeros((a.shape[0], b.shape[1]), np.float32)
    rule = contract.split
    if rule is None:
        return tensor_core.chain(a, b, zero, float_format(contract.operand), contract.dot)
    part = float_format(rule.part)
    a_parts, b_parts = split(a, rule), split(b, rule)
    high = cross = zero
    with np.errstate(all="ignore"):
        for start in range(0, a.shape[1], rule.promote_k):
            chunk = slice(start, start + rule.promote_k)
            high_chain = tensor_core.chain(a_parts[0][:, chunk], b_parts[0][chunk], zero, part, contract.dot)
            cross_chain = zero
            for i, j in rule.cross:
                cross_chain = tensor_core.chain(a_parts[i][:, chunk], b_parts[j][chunk], cross_chain, part, contract.dot)
            total = high + high_chain
            error = high_chain - (total - high)
            cross = cross + (cross_chain + error)
            high = total
        return np.where(np.isfinite(high), high + cross, high)


def _tree(leaves: list[np.ndarray]) -> np.ndarray:
    """Sum over adjacent pairs, repeated until one is left."""
    with np.errstate(all="ignore"):
        while len(leaves) > 1:
            leaves = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves), 2)]
    return leaves[0]
