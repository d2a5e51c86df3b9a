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
