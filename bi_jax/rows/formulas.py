"""The formulas of a program as one listing, in the steps in which a kernel evaluates them.

Steps share what they have in common: where a row stays in registers, a value that is worth more than a few operations is
kept from the step that computes it for those after it (softmax needs each exponential twice).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np

from bi_jax.rows.ptx import Kind, Level, Listing, Node, needed
from shared_specs import sum_exp
from shared_specs.rows import ColumnProgram, RowProgram

WORTH_KEEPING = 8
"""Operations from which on a value is kept in registers rather than computed again."""


@dataclass(frozen=True, eq=False)
class Step:
    """A pass over the values of a row that folds them.

    Attributes:
        kind: "sum", "max" or "min".
        value: what is folded.
        result: the input that later steps read.
        kept: values computed here that later steps need, too.
        near: of a sum of exponentials, `value` by fewer operations where everything is `sum_exp.near` the maximum.
    """

    kind: str
    value: Node
    result: Node
    kept: tuple[Node, ...] = ()
    near: Node | None = None


@dataclass(frozen=True, eq=False)
class Combination:
    """How the results of a row's segments become the row's: `kind` over `value`, which reads the segments' `parts`."""

    kind: str
    parts: tuple[Node, ...]
    value: Node
    result: Node


@dataclass(frozen=True, eq=False)
class Stage:
    """A reduction: one step or, for a sum of exponentials, two."""

    steps: tuple[Step, ...]
    combinations: tuple[Combination, ...]


@dataclass(frozen=True, eq=False)
class Formulas:
    """A program's listing for rows of a fixed length.

    Attributes:
        listing: where further operations may be written.
        column: the input that is an element's column.
        stages: the reductions, in order.
        outputs, row_outputs: formulas by name, with canonical NaN where float32.
    """

    listing: Listing
    column: Node
    stages: tuple[Stage, ...]
    outputs: Mapping[str, Node]
    row_outputs: Mapping[str, Node]

    def masked(self, value: Node, end: int, fill: float) -> Node:
        """`value`, but `fill` from column `end` on."""
        return self.listing.select(self.listing.int_less(self.column, end), value, fill)


FILL = {"sum": 0.0, "max": -np.inf, "min": np.inf}
"""What a fold starts with."""


def fold(listing: Listing, kind: str, x: Node | float, y: Node | float) -> Node:
    """One step of a reduction."""
    return {"sum": listing.add, "max": listing.max, "min": listing.min}[kind](x, y)


@cache
def row_formulas(program: RowProgram, n: int, one_segment: bool, dtypes: tuple[tuple[str, str], ...]) -> Formulas:
    """The formulas of `program` for rows of `n` elements, with outputs of `dtypes`."""
    f = Listing()
    column = f.input("column", Level.ELEMENT, "int")
    e = SimpleNamespace(count=float(np.float32(n)), column=column)
    inputs: tuple[tuple[Level, Kind, tuple[str, ...]], ...] = (
        (Level.ELEMENT, "float", (*program.elements, *program.columns)),
        (Level.ROW, "float", (*program.rows, *program.gathered)),
        (Level.ROW, "int", program.ids),
        (Level.CALL, "float", program.scalars),
        (Level.CALL, "int", program.integers),
    )
    for level, kind, names in inputs:
        for name in names:
            setattr(e, name, f.input(name, level, kind))
    stages = []
    for reduction in program.reductions:
        name, value = reduction.name, reduction.of(f, e)
        result = f.input(name, Level.ROW)
        segment = result if one_segment else f.input(f"{name} of a segment", Level.SEGMENT)
        part = f.input(f"{name} parts", Level.ELEMENT)
        if reduction.kind != "sum_exp":
            combination = Combination(reduction.kind, (part,), part, result)
            stages.append(Stage((Step(reduction.kind, value, segment),), (combination,)))
            setattr(e, name, result)
            continue
        largest = f.input(f"{name} maximum", Level.ROW)
        segment_largest = largest if one_segment else f.input(f"{name} maximum of a segment", Level.SEGMENT)
        term, weight = sum_exp.term(f, value, segment_largest), sum_exp.weight(f, segment_largest, largest)
        largest_part = f.input(f"{name} maxima", Level.ELEMENT)
        rescaled = sum_exp.rescaled(f, sum_exp.SumExp(largest_part, part), largest)
        near = sum_exp.near_term(f, value, segment_largest)
        steps = Step("max", value, segment_largest), Step("sum", term, segment, near=near)
        combinations = (
            Combination("max", (largest_part,), largest_part, largest),
            Combination("sum", (largest_part, part), rescaled, result),
        )
        stages.append(Stage(steps, combinations))
        setattr(e, name, sum_exp.SumExp(largest, result, term, 1.0 if one_segment else weight))
    formats = dict(dtypes)
    outputs = {name: of(f, e) for name, of in program.outputs.items()}
    outputs = {name: f.canonical(node) if formats[name] == "float32" else node for name, node in outputs.items()}
    row_outputs = {name: f.canonical(of(f, e)) for name, of in program.row_outputs.items()}
    return Formulas(f, column, _with_kept(stages, list(outputs.values())), outputs, row_outputs)


@cache
def column_formulas(program: ColumnProgram) -> tuple[Listing, Mapping[str, Node]]:
    """The listing, and what is summed for each output."""
    f, e = Listing(), SimpleNamespace()
    for level, names in (
        (Level.ELEMENT, (*program.elements, *program.columns)),
        (Level.ROW, program.rows),
        (Level.CALL, program.scalars),
    ):
        for name in names:
            setattr(e, name, f.input(name, level))
    return f, {name: of(f, e) for name, of in program.sums.items()}


def _with_kept(stages: Sequence[Stage], outputs: list[Node]) -> tuple[Stage, ...]:
    """The stages, their steps with what is worth keeping for later ones."""
    later, result = outputs, []
    for stage in reversed(stages):
        steps: list[Step] = []
        for step in reversed(stage.steps):
            steps.insert(0, replace(step, kept=_worth_keeping(step.value, later)))
            later = [*later, step.value]
        result.append(replace(stage, steps=tuple(steps)))
    return tuple(reversed(result))


def _worth_keeping(value: Node, later: list[Node]) -> tuple[Node, ...]:
    """What `value` consists of that takes many operations and that `later` needs."""
    worth = {x for x in _element_operations([value]) if x.kind != "bool" and len(_element_operations([x])) >= WORTH_KEEPING}
    _, leaves = needed(later, lambda x: x in worth or _given(x))
    return tuple(x for x in leaves if x in worth)


def _given(node: Node) -> bool:
    return node.is_input or node.level < Level.ELEMENT


def _element_operations(roots: list[Node]) -> list[Node]:
    return needed(roots, _given)[0]
