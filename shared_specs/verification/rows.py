"""Row cases: every program of the catalogue, on rows that cycle through every kind of `shared_specs.inputs`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shared_specs.formats import FORMATS, float_format
from shared_specs.inputs import KINDS, operand_bits
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, ROW_PROGRAMS, SCALARS
from shared_specs.reference.rows import run_columns, run_rows
from shared_specs.rows import ColumnProgram, RowProgram

COLUMNS = (1, 5, 64, 100, 127, 128, 257, 1000, 1024, 1025, 2500, 4096)
LONG = (8192, 8193, 20000)
"""Rows of several segments, which a GPU runs too."""
ROWS = (1, 2, 7, 9, 33)

_FAMILIES: dict[RowProgram | ColumnProgram, str] = {
    **{program: family for family, programs in ROW_PROGRAMS.items() for program in programs},
    **dict.fromkeys(COLUMN_PROGRAMS, "column sums"),
}
PROGRAMS = {program.name: program for program in _FAMILIES}


@dataclass(frozen=True)
class RowCase:
    """One run of the program called `program`, all inputs and outputs of `dtype` but for the float32 numbers of a row."""

    program: str
    dtype: str
    rows: int
    columns: int
    seed: int

    @property
    def group(self) -> tuple[str, str]:
        """The line of the report that the case belongs to."""
        return _FAMILIES[PROGRAMS[self.program]], self.dtype

    def spec(self) -> RowProgram | ColumnProgram:
        """The program itself."""
        return PROGRAMS[self.program]

    def out_dtypes(self) -> dict[str, str]:
        """The dtype of every output."""
        program = self.spec()
        if isinstance(program, ColumnProgram):
            return dict.fromkeys(program.sums, self.dtype)
        return {**dict.fromkeys(program.outputs, self.dtype), **dict.fromkeys(program.row_outputs, "float32")}

    def inputs(self) -> dict[str, np.ndarray]:
        """Bits of the inputs; ids are int32, some of them outside the row."""
        program, fmt = self.spec(), float_format(self.dtype)
        inputs: dict[str, np.ndarray] = {}
        for name in program.elements:
            inputs[name] = np.zeros((self.rows, self.columns), fmt.storage)
            for row in range(self.rows):
                kind = KINDS[(row + self.seed) % len(KINDS)]
                inputs[name][row] = operand_bits(kind, (self.columns,), fmt, 1000 * self.seed + 100 * len(inputs) + row)
        for name in program.columns:
            inputs[name] = operand_bits("normal", (self.columns,), fmt, 1000 * self.seed + 100 * len(inputs))
        for name in program.rows:
            kind = KINDS[self.seed % len(KINDS)]
            inputs[name] = operand_bits(kind, (self.rows,), float_format("float32"), 1000 * self.seed + 100 * len(inputs))
        for name in program.ids if isinstance(program, RowProgram) else ():
            inputs[name] = np.random.default_rng(self.seed).integers(-1, self.columns + 1, self.rows).astype(np.int32)
        return inputs

    def expected(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Bits of every output, from the reference model."""
        program, fmt = self.spec(), float_format(self.dtype)
        values = {
            name: x if x.dtype == np.int32 else float_format("float32" if name in program.rows else fmt.name).decode(x)
            for name, x in inputs.items()
        }
        if isinstance(program, ColumnProgram):
            results = run_columns(program, values, SCALARS)
        else:
            results = run_rows(program, values, SCALARS)
        return {name: float_format(dtype).encode(results[name]) for name, dtype in self.out_dtypes().items()}

    def scalars(self) -> dict[str, float | int]:
        """The scalars that the program takes."""
        program = self.spec()
        names = (*program.scalars, *(program.integers if isinstance(program, RowProgram) else ()))
        return {name: SCALARS[name] for name in names}


Run = Callable[[RowCase, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""An engine: the program of a case on the bits of its inputs; returns the bits of every output."""


def compare(case: RowCase, run: Run) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(actual, expected) bits of every output."""
    inputs = case.inputs()
    actual = run(case, inputs)
    for name, expected in case.expected(inputs).items():
        if actual[name].shape != expected.shape or actual[name].dtype != expected.dtype:
            raise AssertionError(f"{case}: {name} is {actual[name].dtype}{list(actual[name].shape)}")
        yield actual[name], expected


def cases(*, large: bool, every: int = 1) -> Iterator[RowCase]:
    """A case for every program and dtype, two where `large`; or every `every`-th of a family and dtype; in a fixed order."""
    sizes = (*COLUMNS, *LONG) if large else COLUMNS
    seed = 0
    for dtype in FORMATS:
        for family in dict.fromkeys(_FAMILIES.values()):
            programs = [program for program, of in _FAMILIES.items() if of == family and _takes(program, dtype)]
            for i, program in enumerate(programs * (2 if large else 1)):
                seed += 1
                if i % every:
                    continue
                columns, rows = sizes[(7 * seed) % len(sizes)], ROWS[(3 * seed) % len(ROWS)]
                if isinstance(program, ColumnProgram):
                    columns, rows = min(columns, 257), (rows, 1100, 8200)[seed % 3] if large else rows
                yield RowCase(program.name, dtype, rows, columns, seed)


def _takes(program: RowProgram | ColumnProgram, dtype: str) -> bool:
    """Whether the program is for any dtype, or for this one."""
    return not program.name.endswith("]") or program.name.endswith(f"[{dtype}]")
