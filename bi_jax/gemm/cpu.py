"""The GEMM contract in jax.numpy, for computations lowered for a CPU.

All values are float64 or integers (`bi_jax.float64` says why). Every float64 operation of a dot instruction is exact
(products of operands, scalings by powers of two, sums of integers below 2**53), and truncation acts on the integers that
the float64 bits are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bi_jax.float64 import decode, encode, round32, round_to, storage_bits
from bi_jax.gemm.split import split
from shared_specs.contract import DotArithmetic, GemmContract
from shared_specs.formats import FLOAT32, FloatFormat, float_format

BLOCK_OUTPUTS = 1 << 18  # outputs worked on at a time: their float64 accumulators stay in the cache
BLOCK_ROWS = 16  # but at least so many rows, which share the decoding of B

VECTOR = 16  # columns below which rows take their place

F64_BIAS, F64_MANTISSA, F64_FIELD = 1023, 52, 0x7FF
ZERO_EXPONENT = -(1 << 13)  # exponent given to zeros: never the largest beside a nonzero term


@functools.partial(jax.jit, static_argnames=("alpha", "beta", "contract", "out_dtype"))
def gemm(
    a: jax.Array,
    b: jax.Array,
    bias: jax.Array | None,
    *,
    alpha: float,
    beta: float,
    contract: GemmContract,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`alpha * (a @ b) + beta * bias` under `contract`.

    Args:
        a: [B, M, K] of the contract's operand dtype.
        b: [B, K, N] of the same dtype.
        bias: broadcastable to [B, M, N], of a 16-bit float dtype or float32; not read where beta is 0.
        alpha: factor of the product, rounded to float32 once.
        beta: factor of the bias, rounded to float32 once.
        contract: the bits.
        out_dtype: dtype of the result.

    Returns:
        [B, M, N] of `out_dtype`.
    """
    with np.errstate(over="ignore"):
        by_alpha, by_beta = (np.float64(np.float32(x)) for x in (alpha, beta))
    with jax.enable_x64(True):
        # A float32 product is exact in float64, and 53 bits are enough (2 * 24 + 2) for rounding a sum twice to be harmless.
        result = round32(_accumulate(storage_bits(a), storage_bits(b), contract) * by_alpha)
        if bias is not None and by_beta != 0:
            result = round32(result + round32(decode(storage_bits(bias), float_format(bias.dtype.name)) * by_beta))
        fmt = float_format(jnp.dtype(out_dtype).name)
        return lax.bitcast_convert_type(encode(round_to(result, fmt), fmt), out_dtype)


def _accumulate(a: jax.Array, b: jax.Array, contract: GemmContract) -> jax.Array:
    """The float32 accumulators, as float64: the leaves of K and the tree over adjacent pairs of them."""
    leaves = [_leaf(a[..., lo:hi], b[:, lo:hi], contract) for lo, hi in contract.leaf_bounds(a.shape[2])]
    while len(leaves) > 1:
        leaves = [round32(x + y) for x, y in zip(leaves[::2], leaves[1::2], strict=True)]
    return leaves[0]


def _leaf(a: jax.Array, b: jax.Array, contract: GemmContract) -> jax.Array:
    batch, m, n = a.shape[0], a.shape[1], b.shape[2]
    if 0 in (*a.shape, n):
        return jnp.zeros((batch, m, n), jnp.float64)
    chain = _chain if contract.split is None else _split_chain
    rows = max(BLOCK_ROWS, BLOCK_OUTPUTS // n)

    def matrices(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = operands
        return _by_blocks(lambda block: chain(block, y, contract), x, axis=1, size=rows)

    return _by_blocks(matrices, (a, b), axis=0, size=max(1, BLOCK_OUTPUTS // (m * n)))


def _by_blocks(f: Callable[[Any], jax.Array], x: Any, *, axis: int, size: int) -> jax.Array:
    """What `f` makes of consecutive blocks of `x` (arrays equally long in `axis`), of at most `size`, joined along `axis`."""
    length = jax.tree.leaves(x)[0].shape[axis]
    count = -(-length // size)
    if count == 1:
        return f(x)
    size = -(-length // count)

    def cut(array: jax.Array) -> jax.Array:
        array = _zero_fill(array, axis, size)
        return jnp.moveaxis(array.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :]), axis, 0)

    blocks = jnp.moveaxis(lax.map(f, jax.tree.map(cut, x)), 0, axis)
    joined = blocks.reshape(*blocks.shape[:axis], count * size, *blocks.shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, length, axis=axis)


def _zero_fill(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, fill)


def _chain(a: jax.Array, b: jax.Array, contract: GemmContract) -> jax.Array:
    """One chain of dot instructions over the whole K, from +0."""
    a, b = _zero_fill(a, 2, contract.dot.k), _zero_fill(b, 1, contract.dot.k)
    return _steps(a, b, 0, a.shape[2] // contract.dot.k, contract.dot, float_format(contract.operand))


def _split_chain(a: jax.Array, b: jax.Array, contract: GemmContract) -> jax.Array:
    """float32 operands: chains over the parts, promoted every `promote_k` elements of K."""
    rule, dot = contract.split, contract.dot
    assert rule is not None
    a, b = _zero_fill(a, 2, rule.promote_k), _zero_fill(b, 1, rule.promote_k)
    # The parts laid end to end: products of parts that run one after the other are one chain.
    products = (*rule.cross, (0, 0))
    steps = rule.promote_k // dot.k
    chains = np.array([[0, len(rule.cross) * steps], [len(rule.cross) * steps, len(products) * steps]])

    def parts(bits: jax.Array, i: jax.Array, axis: int, order: Sequence[int]) -> jax.Array:
        chunk = lax.dynamic_slice_in_dim(bits, i * rule.promote_k, rule.promote_k, axis)
        values = lax.bitcast_convert_type(chunk, jnp.float32)
        cut = lax.optimization_barrier([storage_bits(part) for part in split(values, rule)])
        return lax.optimization_barrier(jnp.concatenate([cut[part] for part in order], axis))

    def promote(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        high, cross = totals
        x, y = parts(a, i, 2, [p for p, _ in products]), parts(b, i, 1, [p for _, p in products])
        cross_chain, high_chain = lax.map(lambda ends: _steps(x, y, ends[0], ends[1], dot, float_format(rule.part)), chains)
        total = round32(high + high_chain)
        error = round32(high_chain - round32(total - high))
        return total, round32(cross + round32(cross_chain + error))

    zeros = jnp.zeros((a.shape[0], a.shape[1], b.shape[2]), jnp.float64)
    high, cross = lax.fori_loop(0, a.shape[2] // rule.promote_k, promote, (zeros, zeros))
    return jnp.where(jnp.isfinite(high), round32(high + cross), high)


def _steps(
    a: jax.Array, b: jax.Array, start: int | jax.Array, stop: int | jax.Array, dot: DotArithmetic, fmt: FloatFormat
) -> jax.Array:
    """A chain of the instructions `start` to `stop` along K, from +0: float32 accumulators as float64."""
    if b.shape[2] < min(VECTOR, a.shape[1]):
        return _steps(b.mT, a.mT, start, stop, dot, fmt).mT  # the innermost axis is what XLA vectorises

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(a, i * dot.k, dot.k, axis=2)
        y = lax.dynamic_slice_in_dim(b, i * dot.k, dot.k, axis=1)
        # Behind the barrier the slices are decoded once, not once for every output that reads them.
        decoded = lax.optimization_barrier((decode(x, fmt), _exponent(x, fmt), decode(y, fmt), _exponent(y, fmt)))
        x, x_exponent, y, y_exponent = decoded
        return _instruction(acc, x, x_exponent, y, y_exponent, dot)

    return lax.fori_loop(start, stop, step, jnp.zeros((a.shape[0], a.shape[1], b.shape[2]), jnp.float64))


def _instruction(
    acc: jax.Array, a: jax.Array, a_exponent: jax.Array, b: jax.Array, b_exponent: jax.Array, dot: DotArithmetic
) -> jax.Array:
    """One dot instruction on acc [B, M, N], a [B, M, k], b [B, k, N], float64 and exact up to its truncations."""
    field = _field(acc)
    # A subnormal accumulator has the exponent of the smallest normal, a zero has none.
    own = jnp.where(field == 0, ZERO_EXPONENT, jnp.maximum(field - F64_BIAS, FLOAT32.min_exponent))
    largest = jnp.maximum(own, dot.min_exponent)
    for k in range(dot.k):
        largest = jnp.maximum(largest, a_exponent[:, :, k, None] + b_exponent[:, k, None, :])
    scale = _power(dot.fraction_bits - largest)
    total = _toward_zero(acc * scale)
    for k in range(dot.k):
        total += _toward_zero(a[:, :, k, None] * b[:, k, None, :] * scale)
    return _truncate(total * _power(largest - dot.fraction_bits))


def _toward_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, lax.ceil(x), lax.floor(x))


def _truncate(x: jax.Array) -> jax.Array:
    """float64 values truncated to float32; zero results are +0, overflow is an infinity."""
    field = _field(x)
    smallest = F64_BIAS + FLOAT32.min_exponent
    dropped = F64_MANTISSA - FLOAT32.mantissa_bits + jnp.clip(smallest - field, 0, FLOAT32.mantissa_bits)
    bits = lax.bitcast_convert_type(x, jnp.int64) & (jnp.int64(-1) << dropped.astype(jnp.int64))
    kept = lax.bitcast_convert_type(jnp.where(field < smallest - FLOAT32.mantissa_bits, 0, bits), jnp.float64)
    return jnp.where(field > F64_BIAS - FLOAT32.min_exponent + 1, kept * jnp.inf, kept)


def _field(x: jax.Array) -> jax.Array:
    """The exponent field of float64 values, int32."""
    return (lax.bitcast_convert_type(x, jnp.int64) >> F64_MANTISSA).astype(jnp.int32) & F64_FIELD


def _power(exponent: jax.Array) -> jax.Array:
    """The float64 2**exponent."""
    return lax.bitcast_convert_type((exponent + F64_BIAS).astype(jnp.int64) << F64_MANTISSA, jnp.float64)


def _exponent(bits: jax.Array, fmt: FloatFormat) -> jax.Array:
    """The exponents that the instruction sees, int32: a subnormal has that of the smallest normal."""
    magnitude = bits.astype(jnp.int32) & fmt.nan
    exponent = jnp.maximum(magnitude >> fmt.mantissa_bits, 1) + (fmt.min_exponent - 1)
    return jnp.where(magnitude == 0, ZERO_EXPONENT, exponent)
