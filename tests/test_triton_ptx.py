"""What the compiler makes of the Triton kernels for an H100, read from the PTX: no GPU is needed for that.

The interpreter shows that the kernels' bits are right; here is what it cannot see: contraction, flushing and TF32, which
would change bits, and the width of loads, on which the speed of every schedule rests.
"""

import re
from functools import cache

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from bi_torch.gemm import cuda
from shared_specs import GemmSchedule, gemm_contract, schedule_table
from tests.arrays import DTYPES

TARGET = GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _h100(monkeypatch):
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)


SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have on Hopper."""


def ptx(dtype: str, schedule: GemmSchedule, batch: int = 1, scaled: bool = False) -> str:
    """The PTX of `compiled`."""
    return compiled(dtype, schedule, batch, scaled).asm["ptx"]


@cache
def compiled(
    dtype: str, schedule: GemmSchedule, batch: int = 1, scaled: bool = False, finite: bool = False
) -> triton.compiler.CompiledKernel:
    """The launch of an aligned x @ W^T to float32 (with alpha, beta and a bias if `scaled`), specialised as Triton does it.

    With `finite` to the operands' dtype, and what is not finite then is NaN.
    """
    m, n, k = 2 * schedule.block_m, 2 * schedule.block_n, 2 * schedule.block_k
    a, weight = torch.empty(batch, m, k, dtype=DTYPES[dtype]), torch.empty(batch, n, k, dtype=DTYPES[dtype])
    out = torch.empty(batch, m, n, dtype=DTYPES[dtype] if finite else torch.float32)
    bias = torch.empty(batch, m, n) if scaled else None
    plan = cuda._plan(a, weight.mT, bias, out, scaled, gemm_contract(dtype), schedule, finite)
    if plan.split_a is not None:
        a = torch.empty(plan.split_a[1], dtype=torch.bfloat16)
    backend = make_backend(TARGET)
    binder = create_function_from_signature(plan.kernel.signature, plan.kernel.params, backend)
    bound, specialization, options = binder(
        *plan.arguments(cuda._TensorMap.described, a, weight.mT, bias, out, 0.3, -1.7), **plan.options
    )
    options, signature, constants, attributes = plan.kernel._pack_args(backend, plan.options, bound, specialization, options)
    source = ASTSource(plan.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=options.__dict__)


ROWS = [row for row in schedule_table("sm_90") if row.engine == "triton"]
CASES = sorted({(row.dtypes[0], row.schedule) for row in ROWS}, key=repr)
schedules = pytest.mark.parametrize(("dtype", "schedule"), CASES, ids=repr)


@schedules
def test_operands_are_loaded_by_tma_or_sixteen_bytes_at_a_time(dtype, schedule):
    text = ptx(dtype, schedule)
    if schedule.loads == "tma":
        assert "cp.async.bulk.tensor" in text
    else:
        assert "cp.async.cg.shared.global" in text
    assert "cp.async.ca" not in text
    assert "ld.global" not in text


def test_batches_are_loaded_sixteen_bytes_at_a_time():
    (schedule,) = {row.schedule for row in ROWS if (row.op, row.m) == ("mm_strided", None) and "bfloat16" in row.dtypes}
    assert "cp.async.cg.shared.global" in ptx("bfloat16", schedule, batch=3)


@schedules
@pytest.mark.parametrize("scaled", [False, True])
def test_the_widest_output_fits_shared_memory(dtype, schedule, scaled):
    assert compiled(dtype, schedule, scaled=scaled).metadata.shared <= SHARED_MEMORY


@schedules
def test_arithmetic_is_rounded_once_and_not_contracted(dtype, schedule):
    text = ptx(dtype, schedule, scaled=True)
    assert not re.search(r"\bfma\.|\.ftz|tf32|\b(add|sub|mul)\.f32|\bdiv\.\S*f32", text)
    assert re.search(r"\bmul\.rn\.f32", text)
    assert re.search(r"\badd\.rn\.f32", text)


@schedules
def test_products_run_on_the_tensor_core_of_the_contract(dtype, schedule):
    operand = {"bfloat16": "bf16", "float16": "f16", "float32": "bf16"}[dtype]
    assert re.search(rf"(wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k16\.\S*f32\.{operand}\.{operand}", ptx(dtype, schedule))


@pytest.mark.parametrize(("dtype", "op"), [("bfloat16", "mm"), ("float16", "mm_strided"), ("float32", "mm")])
def test_what_is_not_finite_becomes_the_nan_that_a_conversion_gives(dtype, op):
    (schedule,) = {row.schedule for row in ROWS if (row.op, row.m, row.n) == (op, None, None) and dtype in row.dtypes}
    kernel = compiled(dtype, schedule, finite=True)
    nan = r"0f7FFFFFFF|0x7FFFFFFF|2147483647" if dtype == "float32" else "0x7FFF|32767"
    assert re.search(rf"selp\.\w+\s+%\w+, (%\w+, ({nan})|({nan}), %\w+), %\w+;", kernel.asm["ptx"])
    assert not re.search(r"\bfma\.|\.ftz", kernel.asm["ptx"])
    assert kernel.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize(("out_shape", "block_n"), [((256, 512), 128), ((256, 515), 128), ((256, 640), 320)])
def test_kept_tensor_maps_are_what_triton_would_pass(out_shape, block_n, monkeypatch):
    """The arguments of a launch with encoded maps are those that Triton's own launcher makes of the descriptors."""

    def encode(descriptor, layout):
        return [("map", descriptor.base.data_ptr(), layout), *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(cuda, "make_tensordesc_arg", encode)
    m, n = out_shape
    a, weight, out = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((1, m, 64), (1, n, 64), (1, m, n)))
    schedule = GemmSchedule(128, block_n, 64, warps=8, stages=3)
    plan = cuda._plan(a, weight.mT, None, out, False, gemm_contract("bfloat16"), schedule)
    call = (a, weight.mT, None, out, 1.0, 1.0)
    described = plan.arguments(cuda._TensorMap.described, *call)
    signature = {i: "tensordesc<>" if isinstance(x, TensorDescriptor) else "i32" for i, x in enumerate(described)}
    layouts = [f"layout {i}" for i in range(len(plan.maps))]
    for tensor_map, layout in zip(plan.maps, layouts, strict=True):
        tensor_map.layout = layout
    head = tuple(range(driver._BASE_ARGS_FORMAT_LEN))
    launched = driver.wrap_handle_tensordesc(lambda *arguments: arguments, signature, layouts)(*head, *described)
    for _ in range(2):
        assert plan.arguments(cuda._TensorMap.encoded, *call) == launched[len(head) :]
