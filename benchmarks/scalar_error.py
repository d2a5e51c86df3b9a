"""Worst errors of the scalar programs: `python -m benchmarks.scalar_error [--every 1] [names]`.

The programs run on NumPy over every K-th of the 2^32 float32 patterns, then over all patterns around the worst arguments
found so far. The exact values are those of float64 functions, whose own error is below 1e-6 of a float32's last place.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from shared_specs import scalar
from shared_specs.reference import NumpyArithmetic

BLOCK = 1 << 20
NEIGHBOURS = 1 << 17
"""Patterns looked at on each side of an argument with a large error."""

Function = Callable[[np.ndarray], np.ndarray]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _elementwise(function: Callable[[float], float]) -> Function:
    return lambda x: np.array([function(v) for v in x.tolist()], np.float64)


_erf = _elementwise(math.erf)
_erfc = _elementwise(math.erfc)


EXACT: dict[str, Function] = {
    "exp": np.exp,
    "log": np.log,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log2": np.log2,
    "log1p": np.log1p,
    "erf": _erf,
    "erfc": _erfc,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (0.5 * _erfc(x * -math.sqrt(0.5))),
    "gelu_tanh": lambda x: x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}
"""The float64 function of each program."""

OF_ARGUMENT = ("silu", "gelu", "gelu_tanh")
"""Products of x and a factor between 0 and 1, whose error is counted in the last place of x: they cancel for negative x."""


def ulp_error(result: np.ndarray, exact: np.ndarray, unit: np.ndarray | None = None) -> np.ndarray:
    """|result - exact| in units in the last place of `unit`.

    Args:
        result: float32.
        exact: float64; beyond float32's range it counts as infinite, as rounding would make it.
        unit: float64 values whose float32 last place is the unit; `exact` if None. Subnormals share one last place.

    Returns:
        float64; 0 where both are the same infinity or both NaN, infinite where only one is not finite.
    """
    with np.errstate(all="ignore"):
        exact = np.where(np.abs(exact) < 2.0**128 - 2.0**103, exact, exact * np.inf)
        exponent = np.frexp(exact if unit is None else unit)[1] - 1
        error = np.abs(result - exact) * np.ldexp(1.0, 23 - np.clip(exponent, -126, 127))
    same = (result == exact) | (np.isnan(result) & np.isnan(exact))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


@dataclass(frozen=True, order=True)
class Worst:
    """A large error and its argument."""

    error: float
    argument: float


def errors(name: str, x: np.ndarray) -> np.ndarray:
    """Errors of the program `name` at float32 arguments."""
    with np.errstate(all="ignore"):  # a signalling NaN warns when it is converted
        wide = x.astype(np.float64)
        exact = EXACT[name](wide)
    result = getattr(scalar, name)(NumpyArithmetic(), x)
    finite = np.isfinite(wide) | (name not in OF_ARGUMENT)
    return np.where(finite, ulp_error(result, exact, wide if name in OF_ARGUMENT else None), 0.0)


def worst(name: str, every: int) -> Worst:
    """The largest error among the patterns looked at."""
    found = sorted((_worst_of(name, x) for x in _patterns(every)), reverse=True)[:8]
    if every > 1:
        for argument in [w.argument for w in found]:
            middle = int(np.float32(argument).view(np.uint32))
            around = np.arange(max(middle - NEIGHBOURS, 0), min(middle + NEIGHBOURS, 1 << 32))
            found.append(_worst_of(name, around.astype(np.uint32).view(np.float32)))
    return max(found)


def _patterns(every: int) -> Iterator[np.ndarray]:
    for start in range(0, 1 << 32, BLOCK * every):
        yield np.arange(start, min(start + BLOCK * every, 1 << 32), every).astype(np.uint32).view(np.float32)


def _worst_of(name: str, x: np.ndarray) -> Worst:
    error = errors(name, x)
    i = int(np.argmax(error))
    return Worst(float(error[i]), float(x[i]))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(EXACT), help="programs; all by default")
    parser.add_argument("--every", type=int, default=1009, help="step between the patterns; 1 for all of them")
    options = parser.parse_args()
    unknown = set(options.names) - set(EXACT)
    if unknown:
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    table = Table(title=f"worst error over every {options.every}. float32 and around the worst", title_justify="left")
    for column in ("program", "ulp", "argument", "ulp of"):
        table.add_column(column, justify="right" if column == "ulp" else "left")
    for name in options.names:
        result = worst(name, options.every)
        table.add_row(name, f"{result.error:.3f}", repr(result.argument), "x" if name in OF_ARGUMENT else "the result")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
