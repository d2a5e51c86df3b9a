"""One row of a matrix product, alone and in a batch, with the mode off and on: `python -m examples.linspace_mm`.

a is linspace(-100, 100, 2048 * 4096) as [2048, 4096] and b the same as [4096, 4096]. `torch.mm(a[:1], b)` and
`torch.mm(a, b)[:1]` are one row times one matrix, and stock torch gives two answers. Under the batch-invariant mode the
difference is 0, and nothing in the program changes but the context. On a CPU, where the tensor core's arithmetic is emulated,
the first 64 rows of a and columns of b stand for all of them.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bi_torch.mode import set_batch_invariant_mode

ROWS, INNER, COLUMNS = 2048, 4096, 4096
CPU_SIZE = 64
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Difference:
    """Between a row alone and the row in the batch: the outputs whose bits differ, of how many, and the largest difference."""

    outputs: int
    total: int
    largest: float


def matrices(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of a and the first columns of b: [rows, 4096] and [4096, columns]."""
    a = torch.linspace(-100, 100, ROWS * INNER, device=device).reshape(ROWS, INNER)[:rows]
    b = torch.linspace(-100, 100, INNER * COLUMNS, device=device).reshape(INNER, COLUMNS)[:, :columns]
    return a.to(dtype), b.to(dtype)


def difference(a: torch.Tensor, b: torch.Tensor, enabled: bool) -> Difference:
    """The first row of a [M, K] times b [K, N], alone against in the batch of M, with the mode on or off."""
    with set_batch_invariant_mode(enabled):
        alone = torch.mm(a[:1], b)
        batch = torch.mm(a, b)[:1]
    bits = {2: torch.int16, 4: torch.int32}[alone.itemsize]
    unequal = alone.view(bits) != batch.view(bits)
    return Difference(int(unequal.sum()), alone.numel(), float((alone.double() - batch.double()).abs().max()))


def main(arguments: list[str] | None = None) -> int:
    """Multiply, compare, print; 1 if the mode leaves a difference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m examples.linspace_mm")
    parser.add_argument("--rows", type=int, default=ROWS if device == "cuda" else CPU_SIZE, help="of a, at most 2048")
    parser.add_argument("--columns", type=int, default=COLUMNS if device == "cuda" else CPU_SIZE, help="of b, at most 4096")
    args = parser.parse_args(arguments)

    table = Table("dtype", "mode", title=f"torch.mm(a[:1], b) against torch.mm(a, b)[:1] on {device}")
    for name in ("outputs that differ", "largest difference"):
        table.add_column(name, justify="right")
    broken = 0
    for dtype in DTYPES:
        a, b = matrices(args.rows, args.columns, dtype, device)
        for enabled in (False, True):
            found = difference(a, b, enabled)
            broken += found.outputs if enabled else 0
            name = str(dtype).removeprefix("torch.")
            table.add_row(name, "on" if enabled else "off", f"{found.outputs:,} of {found.total:,}", f"{found.largest:g}")
    Console().print(table)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
