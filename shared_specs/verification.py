"""The check behind `python -m bi_torch.verify` and `python -m bi_jax.verify`: an engine against the reference model.

A case is one call of one public op. Its rows of A and columns of B cycle through every kind of `shared_specs.inputs`, so
that each case holds random values beside wide exponents, cancellation, subnormals, infinities, NaN and random bits. Small
cases are compared in full; large ones, which only a GPU runs, in a sample of rows and columns, since an output depends on
nothing but its row, its column and its bias.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from shared_specs.contract import gemm_contract
from shared_specs.formats import FORMATS, FloatFormat, float_format
from shared_specs.inputs import KINDS, gemm_inputs, operand_bits
from shared_specs.reference import gemm

Op = Literal["mm", "addmm", "bmm", "baddbmm", "matmul", "linear"]
OPS: tuple[Op, ...] = ("mm", "addmm", "linear", "bmm", "baddbmm", "matmul")
SCALES = ((1.0, 1.0), (0.7, -1.3), (-2.0, 0.0), (1e-3, 3.0))
"""alpha and beta of the ops that take them."""

SMALL_M = (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 130)
SMALL_N = (1, 2, 7, 8, 16, 24, 31, 32, 65, 72, 128, 129, 264)
SMALL_K = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    72,
    80,
    100,
    127,
    128,
    129,
    192,
    255,
    256,
    257,
    520,
    1024,
    4100,
)
LARGE = (
    (1, 4096, 4096),
    (8, 1024, 8192),
    (64, 3072, 4096),
    (100, 3000, 2000),
    (300, 4100, 1000),
    (2048, 1024, 1024),
    (512, 256, 16384),
)
SMALL_CASES_PER_DTYPE = 120
MULTIPLY_ADDS = {16: 1 << 18, 32: 1 << 15}
"""Most multiply-adds of a small case, by the operand's bits: the model is slow."""

SAMPLE = 12
"""Rows and columns of a large case that are compared."""


@dataclass(frozen=True)
class Case:
    """One call: op(A [batch, m, k], B [batch, k, n]); ops without a batch have batch = 1."""

    op: Op
    operand: str
    out: str
    batch: int
    m: int
    n: int
    k: int
    alpha: float
    beta: float
    seed: int
    sampled: bool = False


@dataclass(frozen=True)
class Operands:
    """Bits of a case's operands, in the shapes that the op takes; bias is None for the ops without one."""

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class Engine:
    """What is verified.

    Attributes:
        name: what runs the ops, such as "triton".
        environment: device and versions, for the report.
        run: the op of a case on its operands; returns the output's bits.
        large: run the large cases too.
        every: of the small cases, take every `every`-th.
        jobs: cases in flight, where calls spend their time in a compiler.
    """

    name: str
    environment: dict[str, str]
    run: Callable[[Case, Operands], np.ndarray]
    large: bool
    every: int = 1
    jobs: int = 1


@dataclass(frozen=True)
class Outcome:
    """How one case came out."""

    case: Case
    outputs: int
    differing_outputs: int
    differing_bits: int


@dataclass(frozen=True)
class Row:
    """All cases of one op and dtype."""

    op: str
    dtype: str
    engine: str
    cases: int
    outputs: int
    differing_outputs: int
    differing_bits: int


def cases(*, large: bool, every: int = 1) -> Iterator[Case]:
    """Every case, or of the small ones every `every`-th, in a fixed order."""
    for operand, fmt in FORMATS.items():
        for i in range(0, SMALL_CASES_PER_DTYPE, every):
            op = OPS[i % len(OPS)]
            batch = 3 if op in ("bmm", "baddbmm", "matmul") else 1
            k = SMALL_K[i % len(SMALL_K)]
            m = SMALL_M[(7 * i + i // len(SMALL_M)) % len(SMALL_M)]
            n = SMALL_N[(5 * i + i // len(SMALL_N)) % len(SMALL_N)]
            while batch * m * n * k > MULTIPLY_ADDS[fmt.bits]:
                m, n = (m, -(-n // 2)) if n > m else (-(-m // 2), n)
            alpha, beta = SCALES[i % len(SCALES)] if op in ("addmm", "baddbmm") else (1.0, 1.0)
            yield Case(op, operand, operand if i // len(OPS) % 2 else "float32", batch, m, n, k, alpha, beta, seed=i)
        if large:
            for i, (m, n, k) in enumerate(LARGE):
                yield Case(("mm", "linear")[i % 2], operand, operand, 1, m, n, k, 1.0, 1.0, seed=1000 + i, sampled=True)


def operands(case: Case) -> Operands:
    """The operands of `case`, the same on every machine."""
    fmt = float_format(case.operand)
    pairs = [_mixed(case.m, case.k, case.n, fmt, 1000 * case.seed + i) for i in range(case.batch)]
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    bias_shape = {"addmm": (case.m, case.n), "baddbmm": (case.batch, case.m, case.n), "linear": (case.n,)}.get(case.op)
    bias = None if bias_shape is None else operand_bits(KINDS[case.seed % len(KINDS)], bias_shape, fmt, 1 << 40 | case.seed)
    if case.op == "matmul":
        b = b[0]
    elif case.batch == 1:
        a, b = a[0], b[0]
    return Operands(a, b.T.copy() if case.op == "linear" else b, bias)


def check(engine: Engine, case: Case) -> Outcome:
    """Run `case` on the engine and on the reference model, and count what differs."""
    args = operands(case)
    actual = engine.run(case, args)
    a, b, bias = args.a, args.b.T if case.op == "linear" else args.b, args.bias
    out_format = float_format(case.out)
    shape = (*a.shape[:-1], b.shape[-1])
    if actual.shape != shape or actual.dtype != out_format.storage:
        raise AssertionError(f"{case}: got {actual.dtype}{list(actual.shape)}, expected {out_format.storage}{list(shape)}")
    if case.sampled:
        rows, columns = _sample(case.m), _sample(case.n)
        a, b, actual = a[rows], b[:, columns], actual[np.ix_(rows, columns)]
        bias = None if bias is None else bias[columns]
    contract = gemm_contract(case.operand)
    expected = gemm(a, b, contract, bias_bits=bias, alpha=case.alpha, beta=case.beta, out_format=out_format)
    flipped = actual ^ expected
    return Outcome(case, expected.size, int(np.count_nonzero(flipped)), int(np.bitwise_count(flipped).sum(dtype=np.int64)))


def summarise(engine: Engine, outcomes: Sequence[Outcome]) -> list[Row]:
    """One row for each op and dtype, in the order of the cases."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.case.op, outcome.case.operand), []).append(outcome)
    return [
        Row(
            op,
            dtype,
            engine.name,
            len(group),
            sum(o.outputs for o in group),
            sum(o.differing_outputs for o in group),
            sum(o.differing_bits for o in group),
        )
        for (op, dtype), group in groups.items()
    ]


def command_line(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that both frameworks' commands share."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--every", type=int, metavar="N", help="run every N-th small case")
    return parser


def main(engine: Engine, json_file: Path | None) -> int:
    """Verify with a progress bar, print the table, write the JSON; 1 if a bit differs, else 0."""
    from rich.console import Console  # the one place that prints: the specs themselves need NumPy alone
    from rich.progress import track
    from rich.table import Table

    console = Console()
    console.print(*(f"{key}: {value}" for key, value in engine.environment.items()), sep="\n", highlight=False)
    todo = list(cases(large=engine.large, every=engine.every))
    with ThreadPoolExecutor(engine.jobs) as pool:
        in_flight = pool.map(lambda case: check(engine, case), todo)
        outcomes = list(track(in_flight, "verifying", total=len(todo), console=console, transient=True))

    rows = summarise(engine, outcomes)
    table = Table()
    for name in ("op", "dtype", "engine"):
        table.add_column(name)
    for name in ("cases", "outputs compared", "differing outputs", "differing bits"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "bold red" if row.differing_bits else None
        counts = (row.cases, row.outputs, row.differing_outputs, row.differing_bits)
        table.add_row(row.op, row.dtype, row.engine, *(f"{count:,}" for count in counts), style=style)
    console.print(table)
    failures = [o for o in outcomes if o.differing_bits]
    for failure in failures[:10]:
        console.print(f"differs: {failure.case}", style="red", highlight=False)
    total = sum(row.outputs for row in rows)
    console.print(f"{len(outcomes)} cases, {total:,} outputs, {sum(row.differing_bits for row in rows):,} differing bits")
    if json_file:
        contracts = {name: gemm_contract(name).contract_id for name in FORMATS}
        result = {"environment": engine.environment, "contracts": contracts, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps({**result, "failures": [asdict(f) for f in failures]}, indent=1) + "\n")
    return 1 if failures else 0


def _mixed(m: int, k: int, n: int, fmt: FloatFormat, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A [m, k] and B [k, n] whose rows and columns take turns through the kinds, from one that the seed picks."""
    a, b = np.zeros((m, k), fmt.storage), np.zeros((k, n), fmt.storage)
    for i in range(len(KINDS)):
        kind = KINDS[(i + seed) % len(KINDS)]
        rows, columns = slice(i, None, len(KINDS)), slice(i, None, len(KINDS))
        a[rows], b[:, columns] = gemm_inputs(kind, len(range(m)[rows]), k, len(range(n)[columns]), fmt, len(KINDS) * seed + i)
    return a, b


def _sample(extent: int) -> np.ndarray:
    """Both ends of an axis and places between them, at no regular distance."""
    places = np.arange(SAMPLE) ** 2 * (extent - 1) // (SAMPLE - 1) ** 2
    return np.unique(np.concatenate([places, extent - 1 - places // 3]))
