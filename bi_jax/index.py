"""Index arithmetic of Mosaic kernels, on int32 scalars.

A kernel has dozens of such operations, and `jax.lax` traces faster than the operators of arrays.
"""

from typing import Any

import numpy as np
from jax import lax


def affine(x: Any, factor: int, offset: Any = 0) -> Any:
    """x * factor + offset; a Python number where both x and offset are."""
    if isinstance(x, int):
        x, offset = offset, x * factor
        return x + offset if isinstance(x, int) else affine(x, 1, offset)
    x = x if factor == 1 else lax.mul(x, np.int32(factor))
    if isinstance(offset, int):
        return lax.add(x, np.int32(offset)) if offset else x
    return lax.add(x, offset)


def quotient_and_rest(x: Any, y: int) -> tuple[Any, Any]:
    """`divmod` of a scalar that is not negative."""
    return lax.div(x, np.int32(y)), lax.rem(x, np.int32(y))
