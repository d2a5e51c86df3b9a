"""`explain`: what `batch_invariant` makes of a function, as a table."""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Jaxpr

from bi_jax.transform.coverage import Options, at_line_of
from bi_jax.transform.rewrite import inner
from bi_jax.transform.rules import treatment

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """Equations of one kind.

    Attributes:
        primitive: its name.
        shapes: types of the operands and results, as JAX writes them.
        treatment: "contract", "pinned", "kept" or "uncovered".
        contract: identity of the contract, or why there is none, with the user's line.
        count: how often the program holds it; a loop's body counts once.
    """

    primitive: str
    shapes: str
    treatment: str
    contract: str
    count: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What becomes of a function's primitives; `print` shows those that are not kept as they are."""

    rows: tuple[Row, ...]

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table("primitive", "operands -> results", "computed by", "count")
        for row in self.rows:
            if row.treatment != "kept":
                table.add_row(row.primitive, row.shapes, row.contract or row.treatment, str(row.count))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=160).print(self)
        return text.getvalue()


def explain(fn: Callable[..., Any], *args: Any, portable: bool = False, **kwargs: Any) -> Explanation:
    """What `batch_invariant(fn, portable=portable)` computes in place of each primitive, for arguments like these.

    Where `fn` calls transformed functions itself, or is one or a gradient of one, only what they compute is explained, as they
    were asked to. Nothing is computed, and nothing raises for not being covered.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs)
    found = Counter(_rows(jaxpr, None)) or Counter(_rows(jaxpr, Options(portable)))
    return Explanation(tuple(Row(*row, count) for row, count in found.items()))


def _rows(jaxpr: Jaxpr, options: Options | None) -> Iterator[tuple[str, str, str, str]]:
    """A row, but for its count, for each equation; without options, for those of transformed functions only."""
    for eqn in jaxpr.eqns:
        with at_line_of(eqn) as line:
            if entered := inner(eqn, options):
                for each in entered[0]:
                    yield from _rows(each, entered[1])
            elif options is not None:
                chosen = treatment(eqn, options)
                by = f"uncovered: {chosen.by}, {line}" if chosen.kind == "uncovered" else chosen.by
                yield eqn.primitive.name, _types(eqn), chosen.kind, by


def _types(eqn: Any) -> str:
    operands, results = (", ".join(x.aval.str_short(short_dtypes=True) for x in side) for side in (eqn.invars, eqn.outvars))
    return f"{operands} -> {results}"
