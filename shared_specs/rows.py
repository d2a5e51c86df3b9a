"""Row operations: the contract of a reduction, and what a row program is.

A row operation maps rows [R, N] of float32 values (16-bit inputs are widened exactly) to rows and to one number a row. Its
*contract* says in which order a row is summed; its *program* says what is computed. How many rows a thread block takes, how
many blocks share a row, what stays in registers: that is schedule, and free.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

from shared_specs.arithmetic import Arithmetic, Value

VERSION = 3
"""Version of the contract's meaning; a change to any output bit needs a new number."""


@dataclass(frozen=True)
class RowContract:
    """The order in which the elements of a row are reduced.

    A row is cut into segments of `segment` elements, the last one shorter. In a segment lane l takes the elements l,
    l + lanes, l + 2 * lanes, ... in ascending order, added one by one to +0. The lanes are summed by a tree over adjacent
    pairs: lane 0 + lane 1, lane 2 + lane 3, ..., and so on with the sums; then the segments by the same tree, filled up with
    +0 to a power of two. Every addition is float32, rounded to nearest.

    Zeros behind a row change nothing: a lane or a segment of +0 adds nothing. So a row shorter than `lanes` may be
    summed with fewer lanes, any power of two that holds it. The sum over no elements is +0.

    Maxima and minima need no order: NaN wins, and +0 is above -0.

    Attributes:
        lanes: a power of two.
        segment: elements of a segment, a multiple of `lanes`.
        version: version of the contract's meaning.
    """

    lanes: int = 1024
    segment: int = 8192
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.lanes & (self.lanes - 1):
            raise ValueError(f"RowContract.lanes must be a power of two, got {self.lanes}")
        if self.segment < self.lanes or self.segment % self.lanes:
            raise ValueError(f"RowContract.segment must be a multiple of lanes = {self.lanes}, got {self.segment}")
        if self.version != VERSION:
            raise ValueError(f"RowContract.version is {self.version}, this library implements {VERSION}")

    def segments(self, n: int) -> int:
        """Segments of a row of `n` elements; an empty row has one."""
        return max(1, -(-n // self.segment))

    def lanes_for(self, n: int) -> int:
        """The fewest lanes that give the bits of a row of `n` elements."""
        return min(self.lanes, 1 << max(0, n - 1).bit_length())


ROW_CONTRACT = RowContract()

Formula = Callable[[Arithmetic, SimpleNamespace], Value]
"""A formula `(f, e) -> value`: `f` is the engine's arithmetic, `e` holds the program's inputs and scalars, the reductions
so far and `count` (N as float32), `column` (the element's index in its row, int32) by name. Of a `sum_exp`, a formula of an
output [R, N] may read the element's `term` and `weight` (`shared_specs.sum_exp`)."""


@dataclass(frozen=True)
class Reduction:
    """A reduction along the row; later formulas read its result as `e.<name>`, the same value for the whole row.

    `sum`, `max` and `min` reduce the values of `of`. `sum_exp` reduces to a `SumExp`, in one pass over the row: each segment
    has its own maximum and its own sum of exponentials relative to it (`shared_specs.sum_exp` says how).
    """

    name: str
    kind: Literal["sum", "max", "min", "sum_exp"]
    of: Formula


@dataclass(frozen=True, eq=False)
class RowProgram:
    """What is computed, element by element and row by row. A program without reductions is an elementwise operation.

    Programs compare by identity: each stands once in `shared_specs.programs`.

    Attributes:
        name: unique among programs; names a variant too, such as "layer_norm(weight)".
        elements: inputs [R, N], float32 to the formulas.
        columns: inputs [N], the same for every row, float32 to the formulas.
        rows: float32 inputs [R], one value a row.
        ids: int32 inputs [R], one a row.
        scalars: float32 values of a call, such as eps.
        integers: int32 values of a call.
        gathered: float32 inputs {name: (element, id)}: `element` at column `id` of the row. An id outside 0..N-1 gives NaN.
        reductions: in the order of computation; a formula may read those before it.
        outputs: formulas of outputs [R, N].
        row_outputs: formulas of float32 outputs [R]; they read no element, column, nor `e.column`.
    """

    name: str
    elements: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    gathered: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reductions: tuple[Reduction, ...] = ()
    outputs: Mapping[str, Formula] = field(default_factory=dict)
    row_outputs: Mapping[str, Formula] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ColumnProgram:
    """Sums over the rows of [R, N], one for every column: `RowContract` with the row's index in the place of the element's.

    Attributes:
        name: unique among programs.
        elements, columns, rows, scalars: as in `RowProgram`.
        sums: formulas of what is summed for each output [N]; they do not read `e.count` nor `e.column`.
    """

    name: str
    elements: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    sums: Mapping[str, Formula] = field(default_factory=dict)
