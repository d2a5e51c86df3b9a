"""dot_general as a product under the contract."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bi_jax.gemm.primitive import gemm
from bi_jax.narrow import narrow
from shared_specs import gemm_contract


def operand_dtype(lhs: Any, rhs: Any) -> str:
    """The dtype whose contract holds for two operands: their own, or float32, which holds both, where they differ."""
    return lhs.dtype.name if lhs.dtype == rhs.dtype else "float32"


def dot_general(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, preferred_element_type: Any, **_: Any) -> jax.Array:
    """lax.dot_general. Contracted dimensions make one K, in the order in which they are given.

    No precision asks for more than the contract's: 16-bit products are exact and accumulated in float32, float32 ones have
    IEEE quality. The result is rounded once, to `preferred_element_type`.
    """
    (contract_lhs, contract_rhs), (batch_lhs, batch_rhs) = dimension_numbers
    contract = gemm_contract(operand_dtype(lhs, rhs))
    lhs, rhs = lhs.astype(contract.operand), rhs.astype(contract.operand)
    batch = tuple(lhs.shape[d] for d in batch_lhs)
    a, rows, transpose_lhs = _matrices(lhs, batch_lhs, contract_lhs, first=False)
    b, columns, transpose_rhs = _matrices(rhs, batch_rhs, contract_rhs, first=True)
    dtype = jnp.dtype(preferred_element_type or contract.operand)
    own = dtype if dtype.name == contract.operand else jnp.dtype("float32")
    out = gemm(
        a,
        b,
        None,
        alpha=1.0,
        beta=1.0,
        contract=contract,
        out_dtype=own,
        transpose_lhs=transpose_lhs,
        transpose_rhs=transpose_rhs,
    )
    return narrow(out.reshape(*batch, *rows, *columns), dtype)


def _matrices(
    x: jax.Array, batch: tuple[int, ...], contract: tuple[int, ...], *, first: bool
) -> tuple[jax.Array, tuple[int, ...], bool]:
    """x as [B, free, K], or [B, K, free] if K is to be `first`; the free extents; whether the two are swapped.

    They are where that spares moving x.
    """
    free = tuple(d for d in range(x.ndim) if d not in (*batch, *contract))
    orders = {False: (*batch, *free, *contract), True: (*batch, *contract, *free)}
    swapped = orders[not first] == tuple(range(x.ndim)) != orders[first]
    order = orders[first != swapped]
    sizes = [
        math.prod(x.shape[d] for d in dims)
        for dims in ((batch, contract, free) if first != swapped else (batch, free, contract))
    ]
    return x.transpose(order).reshape(sizes), tuple(x.shape[d] for d in free), swapped
