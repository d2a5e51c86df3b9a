"""The check behind `python -m bi_torch.verify` and `python -m bi_jax.verify`: an engine against the reference model."""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shared_specs.contract import gemm_contract
from shared_specs.formats import FORMATS
from shared_specs.trace import contract_id
from shared_specs.verification import gemm, rows
from shared_specs.verification.gemm import GemmCase, Operands
from shared_specs.verification.rows import RowCase

__all__ = ["Case", "Engine", "GemmCase", "Operands", "RowCase", "cases", "check", "command_line", "main"]

Case = GemmCase | RowCase


@dataclass(frozen=True)
class Engine:
    """What is verified.

    Attributes:
        name: what runs the ops, such as "triton".
        environment: device and versions, for the report.
        gemm: the op of a case on its operands; returns the output's bits.
        rows: the program of a case on its inputs; returns the bits of every output by name.
        large: run the large cases too.
        every: of the small cases, take every `every`-th.
        jobs: cases in flight, where calls spend their time in a compiler.
    """

    name: str
    environment: dict[str, str]
    gemm: gemm.Run
    rows: rows.Run
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
    """All cases of one op, or family of ops, and dtype."""

    op: str
    dtype: str
    engine: str
    cases: int
    outputs: int
    differing_outputs: int
    differing_bits: int


def cases(engine: Engine) -> Iterator[Case]:
    """Every case that `engine` asks for."""
    yield from gemm.cases(large=engine.large, every=engine.every)
    yield from rows.cases(large=engine.large, every=engine.every)


def check(engine: Engine, case: Case) -> Outcome:
    """Run `case` on the engine and on the reference model, and count what differs."""
    pairs = gemm.compare(case, engine.gemm) if isinstance(case, GemmCase) else rows.compare(case, engine.rows)
    outputs = differing_outputs = differing_bits = 0
    for actual, expected in pairs:
        flipped = actual ^ expected
        outputs += expected.size
        differing_outputs += int(np.count_nonzero(flipped))
        differing_bits += int(np.bitwise_count(flipped).sum(dtype=np.int64))
    return Outcome(case, outputs, differing_outputs, differing_bits)


def summarise(engine: Engine, outcomes: Sequence[Outcome]) -> list[Row]:
    """One line for each op, or family, and dtype, in the order of the cases."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.group, []).append(outcome)
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
    todo = list(cases(engine))
    with ThreadPoolExecutor(engine.jobs) as pool:
        in_flight = pool.map(lambda case: check(engine, case), todo)
        outcomes = list(track(in_flight, "verifying", total=len(todo), console=console, transient=True))

    lines = summarise(engine, outcomes)
    table = Table()
    for name in ("op", "dtype", "engine"):
        table.add_column(name)
    for name in ("cases", "outputs compared", "differing outputs", "differing bits"):
        table.add_column(name, justify="right")
    for row in lines:
        style = "bold red" if row.differing_bits else None
        counts = (row.cases, row.outputs, row.differing_outputs, row.differing_bits)
        table.add_row(row.op, row.dtype, row.engine, *(f"{count:,}" for count in counts), style=style)
    console.print(table)
    failures = [o for o in outcomes if o.differing_bits]
    for failure in failures[:10]:
        console.print(f"differs: {failure.case}", style="red", highlight=False)
    total = sum(row.outputs for row in lines)
    console.print(f"{len(outcomes)} cases, {total:,} outputs, {sum(row.differing_bits for row in lines):,} differing bits")
    if json_file:
        contracts = {f"gemm {name}": gemm_contract(name).contract_id for name in FORMATS}
        contracts |= {name: contract_id(program) for name, program in rows.PROGRAMS.items()}
        result = {"environment": engine.environment, "contracts": contracts, "rows": [asdict(row) for row in lines]}
        json_file.write_text(json.dumps({**result, "failures": [asdict(f) for f in failures]}, indent=1) + "\n")
    return 1 if failures else 0
