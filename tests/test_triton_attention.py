"""The Triton kernels of attention beside products and softmax: on a CPU, against the CPU engine, and compiled for an H100."""

import math
import re

import pytest
import torch

from bi_torch.attention import cuda, library, triton_kernels
from tests import test_triton_interpreter, test_triton_rows
from tests.arrays import DTYPES, assert_same, draw
from tests.interpreters.triton import interpreted, interpreted_launches
from tests.test_triton_rows import INEXACT, for_an_h100

KERNELS = interpreted(triton_kernels, test_triton_interpreter.KERNELS, test_triton_rows.KERNELS)


_interpreted = interpreted_launches(KERNELS)


def values(*shape, dtype="bfloat16"):
    """With what is not finite in some columns, once or several times."""
    x = draw(*shape, dtype=dtype, kind="wide")
    for i, lost in enumerate((math.nan, math.inf, -math.inf)):
        x[i % shape[0], i::31, i] = lost
        x[-1, -1 - i, -1 - i] = lost
    return x


SHAPES = [(2, 37, 5), (1, 2100, 130), (3, 64, 64)]
"""The second has more keys than its parts have at a time, and two blocks of columns: for one dtype, it takes long."""


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES if shape[1] < 2000 or dtype == "bfloat16"],
)
def test_take_and_settle(shape, dtype):
    n, keys, d = shape
    x = values(*shape, dtype=dtype)
    transposed = x.mT.contiguous().mT
    order = torch.rand(n, keys, generator=torch.Generator().manual_seed(0)).argsort(1).to(torch.int32)
    taken = x.gather(1, order[..., None].expand(x.shape).long())
    plain, _, _ = cuda.Take.of(transposed, order, finite=False)(0, transposed, order)
    torch.testing.assert_close(plain, taken, rtol=0, atol=0, equal_nan=True)
    rows, queries = 3 * n * 7, 7
    for given, places, wanted in ((transposed, None, x), (x, order, taken)):
        take = cuda.Take.of(given, places, finite=True, causal=(rows, queries))
        y, first, lengths = take(0, given, places)
        expected, least = library.CPU.values(wanted)
        assert_same(y, expected)
        assert_same(first.amin(1, keepdim=True), least)
        assert_same(lengths, (torch.arange(rows, dtype=torch.int32) % queries + 1).clamp(max=keys))
    admitted = (torch.arange(n * 40, dtype=torch.int32) * 13 % (keys + 1)).view(n, 40)
    out = values(n, 40, d, dtype=dtype)
    settled = library.CPU.settle(out.clone(), least, admitted)
    cuda.Settle.of(tuple(out.shape), first.shape[1])(0, out, first, admitted)
    assert_same(out, settled)
    assert out.isnan().any()
    assert out.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_for_an_h100(dtype):
    """Nothing is flushed, and what has to be aligned is read sixteen bytes at a time."""
    x, order = torch.empty(8, 4096, 128, dtype=DTYPES[dtype]), torch.empty(8, 4096, dtype=torch.int32)
    take = cuda.Take.of(x, order, finite=True, causal=(8 * 64, 64))
    first, lengths = torch.empty(8, 64, 128, dtype=torch.int32), torch.empty(8 * 64, dtype=torch.int32)
    settle = cuda.Settle.of((8, 64, 128), 64)
    for kernel in (
        for_an_h100(take.launch, (x, order, torch.empty_like(x), first, lengths)),
        for_an_h100(settle.launch, (x[:, :64].contiguous(), first, lengths)),
    ):
        ptx = kernel.asm["ptx"]
        assert not re.search(INEXACT, ptx)
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert re.search(r"st\.global\S*\.v(4|2)\.b32", ptx)
