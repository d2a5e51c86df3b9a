"""Relative error of float32 products against float64, beside cuBLAS's IEEE float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

import bi_jax
import bi_torch
from bi_bridge import to_jax, to_torch

COLUMNS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cuBLAS": torch.mm,
    "bi_torch": bi_torch.mm,
    "bi_jax": lambda a, b: to_torch(bi_jax.mm(to_jax(a), to_jax(b))),
}


@dataclass(frozen=True)
class Accuracy:
    """Errors of one column: the 2-norm of the error over that of the result, and the largest error over (|A| @ |B|)."""

    inputs: str
    m: int
    n: int
    k: int
    column: str
    norm: float
    largest: float


def accuracy(k_values: Sequence[int] = (256, 4096, 28672), m: int = 256, n: int = 512) -> list[Accuracy]:
    """Errors on normal inputs and on all-positive ones, where a truncating accumulator would drift."""
    generator = torch.Generator("cuda").manual_seed(0)
    results = []
    for inputs in ("normal", "positive"):
        for k in k_values:
            a, b = (torch.randn(shape, device="cuda", generator=generator) for shape in ((m, k), (k, n)))
            if inputs == "positive":
                a, b = a.abs(), b.abs()
            exact = a.double() @ b.double()
            scale = a.double().abs() @ b.double().abs()
            for column, call in COLUMNS.items():
                error = call(a, b).double() - exact
                norm, largest = error.norm() / exact.norm(), (error.abs() / scale).max()
                results.append(Accuracy(inputs, m, n, k, column, norm.item(), largest.item()))
    return results


def accuracy_table(results: Sequence[Accuracy]) -> Table:
    """Each error with its ratio to the first column's."""
    table = Table(title="error against float64 (ratio to cuBLAS; below 1 is better)", title_justify="left")
    for name in ("inputs", "M", "N", "K", "column", "norm of the error / of the result", "largest error / (|A| @ |B|)"):
        table.add_column(name, justify="left" if name in ("inputs", "column") else "right")
    for r in results:
        base = next(b for b in results if (b.inputs, b.k) == (r.inputs, r.k))
        norm, largest = f"{r.norm:.2e} ({r.norm / base.norm:.2f})", f"{r.largest:.2e} ({r.largest / base.largest:.2f})"
        table.add_row(r.inputs, str(r.m), str(r.n), str(r.k), r.column, norm, largest)
    return table
