"""The engine for NVIDIA GPUs: plans a Pallas Mosaic kernel and hands it operands that TMA can address.

Two kernels share the contract. `mosaic_kernel` multiplies 16-bit operands, and float32 operands that XLA has split into
bfloat16 parts. `mosaic_float32` leaves a float32 B with K innermost as it is and splits it in registers; in tiles of 32
columns it splits A, too. `schedule.swap` asks for the second one, where it applies; the bits are the same.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bi_jax import exact
from bi_jax.gemm.mosaic_float32 import FoldedPlan, RegisterSplitPlan
from bi_jax.gemm.mosaic_kernel import ROWS, SHARED_MEMORY, Plan, kernel, round_up
from bi_jax.gemm.split import split
from shared_specs.contract import Float32Split, GemmContract, gemm_contract
from shared_specs.schedule import ARCHITECTURES, GemmSchedule, gemm_schedule

(ARCHITECTURE,) = ARCHITECTURES
ALIGNMENT = 16
"""Bytes: TMA wants strides that are multiples of this."""
_FLOAT32_MULTIPLES = (1, ALIGNMENT // 4)
"""What the last two dimensions of a float32 operand with K innermost, not split beforehand, must be multiples of."""


def plan(
    schedule: GemmSchedule,
    contract: GemmContract,
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
    out_dtype: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    bias_dtype: Any = None,
    bias_rows: bool = False,
) -> Plan:
    """The kernel that `schedule` makes of `contract`.

    `swap` takes effect where B is float32 with K innermost; elsewhere the parts kernel runs the tile, a chunk at a time. A
    tile of an operand with K outermost is widened to 64 rows per warpgroup, the width of a swizzled row. Where shared memory
    does not hold all stages of the schedule, fewer are used.

    Raises:
        ValueError: the schedule does not fit the contract, the registers or the shared memory.
        NotImplementedError: the kernels do not implement the contract.
    """
    if contract != gemm_contract(contract.operand):
        raise NotImplementedError(f"bi_jax.gemm on CUDA: the kernels do not implement {contract.to_json()}")
    kind = _kind(schedule, contract, transpose_rhs)
    swapped = kind is not Plan
    if schedule.swap and contract.split is not None and not swapped:
        schedule = dataclasses.replace(schedule, swap=False, block_k=contract.chain_k)
    if transpose_lhs and not swapped:
        schedule = dataclasses.replace(schedule, block_m=round_up(schedule.block_m, ROWS))
    if not transpose_rhs:
        wgs = 1 if schedule.block_m >= ROWS * schedule.warps // 4 else schedule.warps // 4
        schedule = dataclasses.replace(schedule, block_n=round_up(schedule.block_n, ROWS * wgs))
    out = jnp.dtype(out_dtype or contract.operand)
    bias = None if bias_dtype is None else jnp.dtype(bias_dtype)
    made = kind(contract, schedule, transpose_lhs, transpose_rhs, out, alpha, beta, bias, bias_rows)
    while made.schedule.stages > 2 and made.shared_memory() > SHARED_MEMORY:
        made = dataclasses.replace(made, schedule=dataclasses.replace(made.schedule, stages=made.schedule.stages - 1))
    made.check()
    return made


def gemm(
    a: jax.Array,
    b: jax.Array,
    bias: jax.Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    contract: GemmContract,
    out_dtype: Any = None,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
    schedule: GemmSchedule | None = None,
) -> jax.Array:
    """alpha * (A @ B) + beta * bias under `contract`, [B, M, N].

    Where TMA cannot address an operand, the bias or the output, it works on a zero-padded copy (`workspace_bytes`).

    Args:
        a: [B or 1, M, K], or [B or 1, K, M] with `transpose_lhs`; bfloat16, float16 or float32. No dimension is 0, but K.
        b: [B or 1, K, N], or [B or 1, N, K] with `transpose_rhs`, of the same dtype.
        bias: [B or 1, M or 1, N or 1], or None.
        out_dtype: the operand dtype (default) or float32.
        schedule: taken from the schedule table if None.

    Raises:
        ValueError: the schedule is not legal.
    """
    m, k = a.shape[:-3:-1] if transpose_lhs else a.shape[-2:]
    n = b.shape[-2] if transpose_rhs else b.shape[-1]
    batch = max(a.shape[0], b.shape[0])
    if schedule is None:
        schedule = gemm_schedule("mosaic", contract.operand, m, n, k, ARCHITECTURE)
    if bias is not None and bias.shape[2] != n:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], n))
    made = plan(
        schedule,
        contract,
        transpose_lhs=transpose_lhs,
        transpose_rhs=transpose_rhs,
        out_dtype=out_dtype,
        alpha=alpha,
        beta=beta,
        bias_dtype=None if bias is None else bias.dtype,
        bias_rows=bias is not None and bias.shape[1] > 1,
    )
    padded_n = round_up(n, ALIGNMENT // made.out_dtype.itemsize)
    if isinstance(made, RegisterSplitPlan):
        a = a.mT if transpose_lhs else a
        whole = isinstance(made, FoldedPlan)
        a = _pad(a, (1, *_FLOAT32_MULTIPLES)) if whole else _addressable(_parts(a, contract), True)
        operands = [a, _pad(b, (1, *_FLOAT32_MULTIPLES))]
    else:
        operands = [_addressable(_parts(x, contract), inner) for x, inner in ((a, not transpose_lhs), (b, transpose_rhs))]
    if bias is not None:
        operands.append(_pad(bias, (1, 1, ALIGNMENT // bias.dtype.itemsize)))
    out = kernel(made, batch, m, n, k, padded_n)(*operands)
    return out if padded_n == n else out[..., :n]


def workspace_bytes(
    a_shape: tuple[int, int, int],
    b_shape: tuple[int, int, int],
    dtype: Any,
    out_dtype: Any = None,
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> int:
    """Bytes that `gemm` allocates beside its output: 0 for aligned shapes of 16-bit operands.

    An operand stored with K innermost is aligned if K is a multiple of 8; one with K outermost if K is a multiple of 8 and
    the other dimension of 64. The output is aligned if N is a multiple of 16 bytes. float32 operands are split into bfloat16
    parts, 6 bytes an element; but where the schedule table swaps, a B with K innermost is not, and aligned if K is a multiple
    of 4. Where it also has tiles of 32 columns, the same holds of A, of which a copy is made if its K is outermost.
    """
    dtype, out_dtype = jnp.dtype(dtype), jnp.dtype(out_dtype or dtype)
    m, k = a_shape[:-3:-1] if transpose_lhs else a_shape[-2:]
    n = b_shape[-2] if transpose_rhs else b_shape[-1]
    contract = gemm_contract(dtype.name)
    rule = contract.split
    kind = _kind(gemm_schedule("mosaic", dtype.name, m, n, k, ARCHITECTURE), contract, transpose_rhs)
    swapped = kind is not Plan
    a_stored = (a_shape[0], m, k) if swapped else tuple(a_shape)
    if kind is FoldedPlan:
        total = _operand_bytes(a_stored, dtype, _FLOAT32_MULTIPLES, None, transposed=transpose_lhs)
    else:
        total = _operand_bytes(a_stored, dtype, _operand_multiples(swapped or not transpose_lhs), rule)
    if swapped:
        total += _operand_bytes(b_shape, dtype, _FLOAT32_MULTIPLES, None)
    else:
        total += _operand_bytes(b_shape, dtype, _operand_multiples(transpose_rhs), rule)
    padded_n = round_up(n, ALIGNMENT // out_dtype.itemsize)
    total += max(a_shape[0], b_shape[0]) * m * padded_n * out_dtype.itemsize if padded_n != n else 0
    return total


def _kind(schedule: GemmSchedule, contract: GemmContract, transpose_rhs: bool) -> type[Plan]:
    """The kernel that runs a schedule."""
    if not schedule.swap or contract.split is None or not transpose_rhs:
        return Plan
    return FoldedPlan if schedule.block_n < ROWS else RegisterSplitPlan


def _operand_bytes(
    shape: tuple[int, ...], dtype: Any, multiples: tuple[int, int], rule: Float32Split | None, transposed: bool = False
) -> int:
    """Bytes of the copy that is made of an operand, if one is: its parts where `rule` splits it, else transposed or padded."""
    padded = _padded_shape(shape, (1, *multiples))
    if rule is not None:
        return math.prod(padded) * rule.parts * jnp.dtype(rule.part).itemsize
    return math.prod(padded) * dtype.itemsize if transposed or padded != tuple(shape) else 0


def _parts(x: jax.Array, contract: GemmContract) -> jax.Array:
    """The arrays that `wgmma` multiplies, one after another along the batch."""
    if contract.split is None:
        return x
    parts = jnp.concatenate(split(x, contract.split))
    # XLA on a CPU flushes subnormals where it fuses the split with a pad.
    return lax.optimization_barrier(parts) if exact.is_emulated() else parts


def _operand_multiples(k_inner: bool) -> tuple[int, int]:
    """What the last two dimensions of an operand must be multiples of."""
    return (1, ALIGNMENT // 2) if k_inner else (8, ROWS)


def _addressable(x: jax.Array, k_inner: bool) -> jax.Array:
    return _pad(x, (1, *_operand_multiples(k_inner)))


def _pad(x: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
    """x, or a copy of it filled with zeros up to multiples of `multiples`."""
    shape = _padded_shape(x.shape, multiples)
    return x if shape == x.shape else jnp.pad(x, [(0, padded - size) for size, padded in zip(x.shape, shape, strict=True)])


def _padded_shape(shape: tuple[int, ...], multiples: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(round_up(size, multiple) for size, multiple in zip(shape, multiples, strict=True))
