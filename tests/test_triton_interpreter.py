"""The Triton kernels themselves, run on a CPU, against the reference model: bit for bit for every legal schedule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bi_torch.gemm import cuda, triton_kernels
from shared_specs import GemmSchedule, gemm_contract, schedule_table
from shared_specs.formats import float_format
from shared_specs.inputs import KINDS, gemm_inputs, operand_bits
from shared_specs.reference import gemm as reference
from tests.arrays import DTYPES, to_bits, to_torch
from tests.interpreters.triton import gpu_arithmetic, interpreted

KERNELS = interpreted(triton_kernels)
MULTIPROCESSORS = 3
"""A persistent kernel then walks over several tiles, even in a small problem."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: MULTIPROCESSORS)


def run(a, b, bias, alpha, beta, out, contract, schedule, finite=False):
    """Launch what the CUDA path would launch, in the interpreter; operands are [B, M, K] and [B, K, N]."""
    plan = cuda._plan(a, b, bias, out, alpha != 1.0, contract, schedule, finite)
    with gpu_arithmetic():
        if plan.split_a is not None:
            split, shape = plan.split_a
            parts = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            launch(split, a, parts)
            a = parts
        launch(plan, a, b, bias, out, alpha, beta)


def launch(plan, *call):
    getattr(KERNELS, plan.kernel.__name__)[plan.grid](*plan.arguments(cuda._TensorMap.described, *call), **plan.options)


def strided(x: torch.Tensor, storage: str) -> torch.Tensor:
    """The same matrix in another memory layout."""
    if storage == "transposed":
        return x.mT.contiguous().mT
    if storage == "padded":
        rows = torch.zeros(*x.shape[:-1], -(-x.shape[-1] // 8) * 8 + 8, dtype=x.dtype)
        rows[..., : x.shape[-1]] = x
        return rows[..., : x.shape[-1]]
    if storage == "transposed padded":
        return strided(x.mT, "padded").mT
    return x


def check(
    dtype,
    m,
    k,
    n,
    schedule,
    *,
    kind="normal",
    seed=0,
    batch=1,
    storage=("plain", "plain"),
    bias="none",
    out_dtype=None,
    alpha=1.0,
    beta=1.0,
    finite=False,
):
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    out_fmt = float_format(out_dtype or dtype)
    drawn = [gemm_inputs(kind, m, k, n, fmt, seed + i) for i in range(batch)]
    a_bits, b_bits = (np.stack(x) for x in zip(*drawn, strict=True))
    bias_shape = {"none": None, "row": (1, 1, n), "full": (batch, m, n)}[bias]
    bias_bits = None if bias_shape is None else operand_bits(kind, bias_shape, fmt, seed + 99)
    expected = reference(a_bits, b_bits, contract, bias_bits=bias_bits, alpha=alpha, beta=beta, out_format=out_fmt)
    if finite:
        expected = np.where(np.isfinite(out_fmt.decode(expected)), expected, out_fmt.encode(np.float32(np.nan)))

    a, b = strided(to_torch(a_bits, fmt), storage[0]), strided(to_torch(b_bits, fmt), storage[1])
    out = torch.full((batch, m, n), -7.0, dtype=DTYPES[out_fmt.name])
    bias_tensor = None if bias_bits is None else to_torch(bias_bits, fmt).expand(batch, m, n)
    run(a, b, bias_tensor, alpha, beta, out, contract, schedule, finite)
    np.testing.assert_array_equal(to_bits(out), expected)


def tma_storage(m, k, n):
    """Layouts in which a tensor map can describe both operands, whatever the extents."""
    return "padded", "transposed padded"


POINTER = GemmSchedule(block_m=16, block_n=16, block_k=32, warps=4, stages=2, loads="pointer")
TMA = GemmSchedule(block_m=16, block_n=32, block_k=16, warps=4, stages=2, group_m=2)
SPLIT = replace(POINTER, block_k=gemm_contract("float32").chain_k)
SPLIT_TMA = [replace(TMA, block_k=SPLIT.block_k, split_a=swap, swap=swap) for swap in (False, True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values(dtype, kind):
    check(dtype, 17, 70, 35, TMA, kind=kind, storage=tma_storage(17, 70, 35))
    check(dtype, 17, 70, 35, POINTER, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_split_float32(kind):
    check("float32", 17, 130, 35, SPLIT, kind=kind)
    for chunks, swap in ((2, False), (4, True)):
        check("float32", 17, 330, 35, replace(SPLIT, block_k=chunks * SPLIT.block_k, swap=swap), kind=kind)


@pytest.mark.parametrize("schedule", SPLIT_TMA, ids=repr)
def test_split_float32_by_tensor_maps(schedule):
    check("float32", 1, 64, 5, schedule, storage=tma_storage(1, 64, 5))
    a_storage = "plain" if schedule.split_a else "padded"
    check("float32", 17, 130, 33, schedule, kind="special", storage=(a_storage, "transposed padded"))
    wide = replace(schedule, block_k=2 * schedule.block_k)
    check("float32", 20, 72, 40, wide, storage=("transposed", "plain"), bias="full", alpha=0.3, beta=-1.7, finite=True)


def test_the_table_serves_what_tensor_maps_cannot_describe(monkeypatch):
    """An A that is split before is copied, so it may be stored in any way."""
    monkeypatch.setattr(cuda, "architecture", lambda index, name: "sm_90")

    def kernel(dtype, k, batch=1, pitch=None, m=64, n=64):
        a = torch.empty(batch, m, pitch or k, dtype=dtype)[..., :k]
        b, out = torch.empty(batch, n, k, dtype=dtype).mT, torch.empty(batch, m, n, dtype=dtype)
        return cuda._plan(a, b, None, out, False, gemm_contract(str(dtype).removeprefix("torch.")), None).kernel.__name__

    assert kernel(torch.float32, 68) == kernel(torch.float32, 68, pitch=69) == "gemm_split_tma"
    assert kernel(torch.float32, 66) == kernel(torch.float32, 68, batch=2) == kernel(torch.float32, 0) == "gemm_split"
    assert kernel(torch.float32, 68, m=24, n=4096) == "gemm_split_tma"
    assert kernel(torch.float32, 68, m=24, n=4096, pitch=69) == "gemm_split"
    assert kernel(torch.bfloat16, 72) == "gemm_tma"
    assert kernel(torch.bfloat16, 68) == kernel(torch.bfloat16, 72, pitch=73) == "gemm_pointer"


@pytest.mark.parametrize("block_n", [48, 40, 96])
@pytest.mark.parametrize("swap", [False, True])
def test_tiles_of_two_widths(block_n, swap):
    wide = replace(TMA, block_n=block_n, persistent=True, swap=swap)
    for n in (block_n // 2, 2 * block_n + 8):
        check("bfloat16", 20, 40, n, wide, storage=tma_storage(20, 40, n), bias="row", alpha=0.3)


@pytest.mark.parametrize("storage_a", ["plain", "transposed", "padded", "transposed padded"])
@pytest.mark.parametrize("storage_b", ["plain", "transposed", "padded", "transposed padded"])
@pytest.mark.parametrize("swap", [False, True])
def test_storage(storage_a, storage_b, swap):
    m, k, n = 24, 40, 48
    for schedule in (POINTER, TMA):
        check("bfloat16", m, k, n, replace(schedule, swap=swap), storage=(storage_a, storage_b))
    check("float32", m, k, n, replace(SPLIT, swap=swap), storage=(storage_a, storage_b))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 64, 5), (5, 17, 1), (33, 16, 31), (3, 15, 65), (2, 0, 3)])
def test_edges(m, k, n):
    for swap in (False, True):
        check("bfloat16", m, k, n, replace(POINTER, swap=swap), batch=2)
        check("float32", m, k, n, replace(SPLIT, swap=swap), batch=2)
        if k:
            check("float16", m, k, n, replace(TMA, swap=swap), storage=tma_storage(m, k, n))


@pytest.mark.parametrize("bias", ["none", "row", "full"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, -1.7), (1.0, 0.1)])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_epilogue(bias, alpha, beta, out_dtype):
    options = {"bias": bias, "alpha": alpha, "beta": beta, "out_dtype": out_dtype}
    check("bfloat16", 20, 48, 40, TMA, storage=tma_storage(20, 48, 40), **options)
    check("float16", 20, 48, 40, POINTER, **options)
    check("float32", 20, 48, 40, SPLIT, bias=bias, alpha=alpha, beta=beta)


@pytest.mark.parametrize("kind", ["special", "bits"])
def test_special_values_in_the_epilogue(kind):
    check("bfloat16", 20, 8, 40, POINTER, kind=kind, bias="full", alpha=0.3, beta=-1.7, out_dtype="float32")


@pytest.mark.parametrize("kind", ["special", "bits", "normal"])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_outputs_that_are_finite_or_nan(kind, out_dtype):
    """An output that the rounding to its dtype makes infinite, too."""
    options = {"kind": kind, "alpha": 3e4, "out_dtype": out_dtype, "finite": True}
    check("float16", 20, 48, 40, TMA, storage=tma_storage(20, 48, 40), **options)
    check("float16", 20, 48, 40, POINTER, **options)
    check("bfloat16", 20, 48, 40, POINTER, **options)
    check("float32", 20, 48, 40, SPLIT, kind=kind, alpha=1e38, finite=True)


TABLE = {(row.dtypes, row.schedule) for row in schedule_table("sm_90") if row.engine == "triton"}


@pytest.mark.parametrize(("dtypes", "schedule"), sorted(TABLE, key=repr), ids=repr)
def test_every_schedule_in_the_table(dtypes, schedule):
    m, k, n = schedule.block_m + 5, schedule.block_k + 24, schedule.block_n + 8
    storage = tma_storage(m, k, n) if schedule.loads == "tma" else ("plain", "plain")
    for dtype in dtypes:
        check(dtype, m, k, n, schedule, storage=storage, kind="wide")


powers = st.sampled_from
schedules = st.builds(
    GemmSchedule,
    block_m=powers([16, 32, 64]),
    block_n=powers([16, 32, 64]),
    block_k=powers([16, 32, 64, 128]),
    swap=st.booleans(),
    loads=powers(["tma", "pointer"]),
    persistent=st.booleans(),
    group_m=st.integers(1, 9),
    store_split=powers([1, 2]),
)


@settings(max_examples=30, deadline=None)
@given(
    schedule=schedules,
    m=st.integers(1, 80),
    k=st.integers(1, 150),
    n=st.integers(1, 80),
    kind=powers(KINDS),
    dtype=powers(["bfloat16", "float16"]),
    seed=st.integers(0, 1000),
)
def test_random_legal_schedules(schedule, m, k, n, kind, dtype, seed):
    storage = tma_storage(m, k, n) if schedule.loads == "tma" else ("plain", "plain")
    check(dtype, m, k, n, schedule, kind=kind, seed=seed, storage=storage)


def test_a_contract_that_the_kernels_do_not_implement_raises():
    contract = gemm_contract("bfloat16")
    other = replace(contract, dot=replace(contract.dot, fraction_bits=24))
    a, b, out = (torch.zeros(1, 16, 16, dtype=torch.bfloat16) for _ in range(3))
    for refused in (other, replace(contract, k_leaves=2)):
        with pytest.raises(NotImplementedError, match="kernels"):
            run(a, b, None, 1.0, 1.0, out, refused, POINTER)
