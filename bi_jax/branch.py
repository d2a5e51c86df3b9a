"""Branches in Mosaic kernels that compile faster."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax


def when(condition: bool | jax.Array) -> Callable[[Callable[[], Any]], None]:
    """Run the decorated function where the scalar `condition` holds, as `pl.when` does.

    `pl.when` converts the condition to an integer, and for any conversion from one bit Mosaic starts ptxas to ask for its
    version: a process for every branch of every kernel. A selection of integers needs none, and compiles to the same code.
    """

    def decorated(run: Callable[[], Any]) -> None:
        if isinstance(condition, bool):
            if condition:
                run()
        else:
            lax.switch(lax.select(condition, np.int32(1), np.int32(0)), [lambda: None, run])

    return decorated
