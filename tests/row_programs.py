"""Every row and column program in every variant, inputs for them, and the reference model on those."""

import numpy as np
import torch

from shared_specs.formats import float_format
from shared_specs.inputs import operand_bits
from shared_specs.programs import catalogue
from shared_specs.programs.catalogue import SCALARS
from shared_specs.reference import rows as reference
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, RowProgram
from tests.arrays import NAMES, to_bits, to_torch

ROW_PROGRAMS: tuple[RowProgram, ...] = tuple(program for family in catalogue.ROW_PROGRAMS.values() for program in family)


def draw_inputs(
    program: RowProgram | ColumnProgram, rows: int, n: int, dtype: str, kind: str = "normal", seed: int = 0
) -> dict[str, torch.Tensor]:
    """CPU tensors; ids lie in -1..n, some of them outside the row."""

    def floats(shape: tuple[int, ...], name: str) -> torch.Tensor:
        fmt = float_format(name)
        return to_torch(operand_bits(kind, shape, fmt, seed + len(inputs)), fmt)

    inputs: dict[str, torch.Tensor] = {}
    for name in program.elements:
        inputs[name] = floats((rows, n), dtype)
    for name in program.columns:
        inputs[name] = floats((n,), dtype)
    for name in program.rows:
        inputs[name] = floats((rows,), "float32")
    for name in getattr(program, "ids", ()):
        inputs[name] = torch.from_numpy(np.random.default_rng(seed).integers(-1, n + 1, rows))
    return inputs


def uneven_rows(n: int) -> torch.Tensor:
    """Rows [6, n] of up to three segments with very different maxima, some of them -inf; the last two have no softmax.

    Values are multiples of 1/8, so that differences between them are exact.
    """
    x = np.round(8 * np.random.default_rng(n).normal(size=(6, n))) / 8
    for row, maxima in enumerate([(0, -30, 5), (-87, 0, -100), (7, -95.5, -1000), (-np.inf, 3, -np.inf)]):
        x[row] += np.repeat(maxima, ROW_CONTRACT.segment)[:n]
    x[4], x[5, -5] = -np.inf, np.inf
    return torch.from_numpy(x.astype(np.float32))


def near_and_far_rows(n: int) -> torch.Tensor:
    """Rows [10, n] that lie near their maxima, around the distance from which on they do not, or far from them."""
    x = np.random.default_rng(n).normal(size=(10, n))
    x[1] -= 200
    x[2] *= 200
    x[3:6] = -np.linspace(0, 1, n) * [[85.5], [86.0], [104]]
    x[6, n // 3], x[7, n // 2], x[8, -1], x[9] = -np.inf, np.nan, np.inf, -np.inf
    return torch.from_numpy(x.astype(np.float32))


def pow_inputs() -> dict[str, torch.Tensor]:
    """Every pair of values for which C's pow is special, and powers of numbers near 1 that are neither 0 nor infinite."""
    inf, nan, smallest = np.inf, np.nan, 2.0**-149
    values = [0, 1, 2, 3, 0.5, 1.5, inf, smallest, 2.0**-126, 3.4e38, 2.0**24 - 1, 2.0**24, 2.0**23 + 1, 1e30]
    pairs = np.meshgrid(*[np.array([*values, *(-v for v in values), nan], np.float32)] * 2)
    rng = np.random.default_rng(3)
    near = 1 + np.exp2(rng.uniform(-23, 1, 300)) * rng.choice([-0.5, 0.5], 300)
    exponents = rng.uniform(-105, 90, 300) / np.log(near)
    drawn = zip(pairs, (near, exponents), strict=True)
    return {
        name: torch.from_numpy(np.concatenate([a.ravel(), b.astype(np.float32)])[None])
        for name, (a, b) in zip(("x1", "x2"), drawn, strict=True)
    }


def expected(
    program: RowProgram | ColumnProgram,
    inputs: dict[str, torch.Tensor],
    out_dtypes: dict[str, torch.dtype],
    scalars: dict[str, float | int] = SCALARS,
) -> dict[str, torch.Tensor]:
    """The reference model's outputs; those without a dtype are float32."""
    values = {
        name: x.numpy().astype(np.int32)
        if name in getattr(program, "ids", ())
        else float_format(NAMES[x.dtype]).decode(to_bits(x))
        for name, x in inputs.items()
    }
    run = reference.run_columns if isinstance(program, ColumnProgram) else reference.run_rows
    result = {}
    for name, value in run(program, values, scalars).items():
        fmt = float_format(NAMES[out_dtypes.get(name, torch.float32)])
        result[name] = to_torch(fmt.encode(value), fmt)
    return result
