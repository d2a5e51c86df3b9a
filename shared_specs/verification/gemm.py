"""GEMM cases.

A case is one call of one public op. Its rows of A and columns of B cycle through every kind of `shared_specs.inputs`, so
that each case holds random values beside wide exponents, cancellation, subnormals, infinities, NaN and random bits. Small
cases are compared in full; large ones, which only a GPU runs, in a sample of rows and columns, since an output depends on
nothing but its row, its column and its bias.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
class GemmCase:
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

    @property
    def group(self) -> tuple[str, str]:
        """The line of the report that the case belongs to."""
        return self.op, self.operand


@dataclass(frozen=True)
class Operands:
    """Bits of a case's operands, in the shapes that the op takes; bias is None for the ops without one."""

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None


def cases(*, large: bool, every: int = 1) -> Iterator[GemmCase]:
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
            yield GemmCase(op, operand, operand if i // len(OPS) % 2 else "float32", batch, m, n, k, alpha, beta, seed=i)
        if large:
            for i, (m, n, k) in enumerate(LARGE):
                yield GemmCase(("mm", "linear")[i % 2], operand, operand, 1, m, n, k, 1.0, 1.0, seed=1000 + i, sampled=True)


def operands(case: GemmCase) -> Operands:
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


Run = Callable[[GemmCase, Operands], np.ndarray]
"""An engine: the op of a case on its operands; returns the output's bits."""


def compare(case: GemmCase, run: Run) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(actual, expected) bits of the output, or of a sample of it."""
    args = operands(case)
    actual = run(case, args)
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
    yield actual, gemm(a, b, contract, bias_bits=bias, alpha=case.alpha, beta=case.beta, out_format=out_format)


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
