"""The golden cases. Inputs are drawn again from their names (`shared_specs.inputs`); only outputs are recorded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_specs.formats import FLOAT32, FloatFormat, float_format
from shared_specs.inputs import KINDS, gemm_inputs, operand_bits

FILE = Path(__file__).with_name("h100.npz")
ACCUMULATORS = ("none", "zeros", "normal", "wide", "subnormal", "bits")
"""What one recorded instruction adds to: nothing (issued without an accumulator), or float32 values of a kind."""


@dataclass(frozen=True)
class DotCase:
    """One or two tensor-core instructions on [64, k] x [k, 32]."""

    dtype: str
    kind: str
    k: int
    accumulator: str
    m: int = 64
    n: int = 32

    @property
    def name(self) -> str:
        """Key in the file."""
        return f"dot-{self.dtype}-{self.kind}-{self.k}-{self.accumulator}"

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Bits of A, B and the accumulator."""
        a, b = gemm_inputs(self.kind, self.m, self.k, self.n, self.format, seed=1)
        if self.kind == "zeros" and self.accumulator in ("none", "zeros"):
            a, b = negative_zero_products(a, b, self.format)
        acc = None if self.accumulator == "none" else operand_bits(self.accumulator, (self.m, self.n), FLOAT32, 7)
        return a, b, acc

    @property
    def format(self) -> FloatFormat:
        """Operand format."""
        return float_format(self.dtype)


@dataclass(frozen=True)
class GemmCase:
    """alpha * (A @ B) + beta * bias with [16, k] x [k, 16] operands and float32 or operand-dtype output."""

    dtype: str
    kind: str
    k: int
    out_dtype: str
    alpha: float = 1.0
    beta: float = 0.0
    m: int = 16
    n: int = 16

    @property
    def name(self) -> str:
        """Key in the file."""
        return f"gemm-{self.dtype}-{self.kind}-{self.k}-{self.out_dtype}-{self.alpha}-{self.beta}"

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits of A, B and the bias."""
        fmt = float_format(self.dtype)
        a, b = gemm_inputs(self.kind, self.m, self.k, self.n, fmt, seed=self.k)
        return a, b, operand_bits(self.kind, (self.m, self.n), fmt, 11)


def negative_zero_products(a: np.ndarray, b: np.ndarray, fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """A of -0 and B of positive numbers: every product is -0."""
    negative_zero = fmt.storage.type(1 << (fmt.bits - 1))
    return np.full_like(a, negative_zero), operand_bits("positive", b.shape, fmt, 3)


def dot_cases() -> Iterator[DotCase]:
    """Single instructions, and two in a row."""
    for dtype in ("bfloat16", "float16"):
        for kind in KINDS:
            for accumulator in ACCUMULATORS:
                yield DotCase(dtype, kind, 16, accumulator)
            yield DotCase(dtype, kind, 32, "none")


def gemm_cases() -> Iterator[GemmCase]:
    """Whole products, short and long, aligned and not; and the epilogue."""
    for dtype in ("bfloat16", "float16", "float32"):
        for kind in KINDS:
            for k in (1, 7, 15, 16, 17, 31, 64, 65, 100, 1000, 4096, 4099, 16384):
                yield GemmCase(dtype, kind, k, "float32")
            yield GemmCase(dtype, kind, 200, dtype)
            yield GemmCase(dtype, kind, 72, "float32", alpha=0.3, beta=-1.7)
            yield GemmCase(dtype, kind, 72, dtype, alpha=0.3, beta=-1.7)
