"""The canonical listing of a program: the operations that it is made of, in order, with shared ones listed once.

It is how a program gets an identity: two programs with one listing compute the same bits.
"""

import hashlib
from functools import cache
from types import SimpleNamespace
from typing import Any

from shared_specs.rows import ROW_CONTRACT, ColumnProgram, Reduction, RowProgram
from shared_specs.sum_exp import SumExp, rescaled, term, weight


class Tracer:
    """An `Arithmetic` that writes every operation down; its values are the names of lines."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def __getattr__(self, operation: str) -> Any:
        if operation.startswith("_"):
            raise AttributeError(operation)
        return lambda *operands: self._line(f"{operation} {' '.join(map(self._operand, operands))}")

    def _line(self, text: str) -> str:
        return self._lines.setdefault(text, f"%{len(self._lines)}")

    def _operand(self, x: Any) -> str:
        if isinstance(x, str):
            return x
        return float(x).hex() if isinstance(x, float) else str(int(x))

    def listing(self) -> str:
        """One line an operation."""
        return "\n".join(f"{name} = {text}" for text, name in self._lines.items())


@cache
def listing(program: RowProgram | ColumnProgram) -> str:
    """What `program` computes, one line an operation; inputs are called by name."""
    f, e, results = Tracer(), _inputs(program), []
    if isinstance(program, ColumnProgram):
        results += [f"{name}: sum {of(f, e)}" for name, of in program.sums.items()]
        return "\n".join((f.listing(), *results))
    for reduction in program.reductions:
        value = reduction.of(f, e)
        results.append(f"{reduction.name}: {reduction.kind} {value}")
        setattr(e, reduction.name, _result(reduction))
        if reduction.kind == "sum_exp":
            segment = SumExp(f"{reduction.name}.segment_max", f"{reduction.name}.segment_sum")
            row_max = _result(reduction).max
            results.append(f"  of {term(f, value, segment.max)}, rescaled {rescaled(f, segment, row_max)}")
            results.append(f"  weight {weight(f, segment.max, row_max)}")
    results += [f"{name}: {of(f, e)}" for outputs in (program.outputs, program.row_outputs) for name, of in outputs.items()]
    return "\n".join((f.listing(), *results))


def _inputs(program: RowProgram | ColumnProgram) -> SimpleNamespace:
    """What formulas read, but for reductions: names."""
    names = (*program.elements, *program.columns, *program.rows, *program.scalars)
    if isinstance(program, RowProgram):
        names += (*program.ids, *program.integers, *program.gathered)
    return SimpleNamespace(**{name: name for name in (*names, "count", "column")})


def _result(reduction: Reduction) -> Any:
    """What formulas read of a reduction: names."""
    if reduction.kind != "sum_exp":
        return reduction.name
    return SumExp(*(f"{reduction.name}.{part}" for part in ("row_max", "row_sum", "term", "weight")))


@cache
def reads(program: RowProgram, name: str) -> bool:
    """Whether a formula reads `e.<name>`."""
    return name in listing(program).split()


@cache
def terms_read(program: RowProgram) -> tuple[Reduction, ...]:
    """The sums of exponentials whose terms the outputs read."""
    return tuple(reduction for reduction in program.reductions if reads(program, f"{reduction.name}.term"))


@cache
def outputs_read_elements(program: RowProgram) -> bool:
    """Whether the outputs [R, N] read elements beside what reductions made of them."""
    f, e = Tracer(), _inputs(program)
    for reduction in program.reductions:
        setattr(e, reduction.name, _result(reduction))
    results = [of(f, e) for of in program.outputs.values()]
    return not {*f.listing().split(), *results}.isdisjoint(program.elements)


@cache
def element_reduced(program: RowProgram, index: int) -> str | None:
    """The element that reduction `index` is over as it is, if it is over nothing else."""
    f, e = Tracer(), _inputs(program)
    for reduction in program.reductions[:index]:
        setattr(e, reduction.name, _result(reduction))
    value = program.reductions[index].of(f, e)
    return value if value in program.elements else None


@cache
def is_elementwise(program: RowProgram) -> bool:
    """Whether each output element depends on the elements at its place and on scalars alone."""
    return not (
        program.reductions or program.columns or program.rows or program.ids or program.row_outputs
        or reads(program, "column") or reads(program, "count")
    )  # fmt: skip


@cache
def contract_id(program: RowProgram | ColumnProgram) -> str:
    """A readable name with the SHA-256 of the listing and of the row contract: what two engines compare."""
    digest = hashlib.sha256(f"{ROW_CONTRACT}\n{listing(program)}".encode()).hexdigest()
    return f"{program.name}-v{ROW_CONTRACT.version}-{digest}"
