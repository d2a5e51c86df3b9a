"""The Mosaic GPU kernel itself, run on a CPU, against the reference model: bit for bit for every legal schedule."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bi_jax.gemm import mosaic, mosaic_kernel
from shared_specs import GemmSchedule, gemm_contract, schedule_table
from shared_specs.formats import FloatFormat, float_format
from shared_specs.inputs import KINDS, gemm_inputs, operand_bits
from shared_specs.reference import gemm as reference
from tests.interpreters.mosaic import interpreted

DECODE = GemmSchedule(block_m=8, block_n=32, block_k=128, warps=4, stages=4)
LARGE = GemmSchedule(block_m=128, block_n=128, block_k=64, warps=8, stages=3, persistent=True, group_m=2)
FLOAT32 = GemmSchedule(block_m=64, block_n=64, block_k=64, warps=4, stages=2)
SPLIT_IN_REGISTERS = [
    GemmSchedule(block_m=8, block_n=64, block_k=128, warps=4, stages=3, swap=True),
    GemmSchedule(block_m=32, block_n=64, block_k=64, warps=8, stages=2, swap=True),
    GemmSchedule(block_m=24, block_n=128, block_k=128, warps=8, stages=2, swap=True, persistent=True, group_m=2),
    GemmSchedule(block_m=8, block_n=32, block_k=256, warps=4, stages=2, swap=True, persistent=True, group_m=2),
]
"""One warpgroup; two that share a tile by rows of A; by rows of B; one with tiles that are folded."""
TABLE = {(row.dtypes[0], row.schedule) for row in schedule_table("sm_90") if row.engine == "mosaic"}


@pytest.fixture(autouse=True)
def _few_sms(monkeypatch):
    """A persistent kernel then walks over several tiles, even in a small problem."""
    monkeypatch.setattr(mosaic_kernel, "SMS", 2)


def to_jax(bits: np.ndarray, fmt: FloatFormat) -> jax.Array:
    return jnp.asarray(np.ascontiguousarray(bits).view(jnp.dtype(fmt.name)))


@functools.cache
def compiled(schedule, contract, swapped, alpha, beta, out_dtype):
    """Traced and compiled once for every kind of value."""

    def run(a, b, c):
        options = {"alpha": alpha, "beta": beta, "contract": contract, "out_dtype": out_dtype, "schedule": schedule}
        return mosaic.gemm(a, b, c, transpose_lhs=swapped[0], transpose_rhs=swapped[1], **options)

    return jax.jit(run)


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
    swapped=(False, True),
    bias=None,
    out_dtype=None,
    alpha=1.0,
    beta=1.0,
):
    fmt, out_fmt, contract = float_format(dtype), float_format(out_dtype or dtype), gemm_contract(dtype)
    drawn = [gemm_inputs(kind, m, k, n, fmt, seed + i) for i in range(batch)]
    a_bits, b_bits = (np.stack(x) for x in zip(*drawn, strict=True))
    bias_bits = None if bias is None else operand_bits(kind, bias, fmt, seed + 99)
    expected = reference(a_bits, b_bits, contract, bias_bits=bias_bits, alpha=alpha, beta=beta, out_format=out_fmt)

    a, b = (to_jax(x.swapaxes(1, 2) if swap else x, fmt) for x, swap in zip((a_bits, b_bits), swapped, strict=True))
    with interpreted():
        run = compiled(schedule, contract, swapped, alpha, beta, out_fmt.name)
        out = np.asarray(run(a, b, None if bias_bits is None else to_jax(bias_bits, fmt))).view(out_fmt.storage)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("dtype", "schedule"), sorted(TABLE, key=repr), ids=repr)
def test_every_schedule_in_the_table(dtype, schedule):
    check(dtype, min(schedule.block_m, 70) + 3, 2 * schedule.block_k + 8, schedule.block_n + 24, schedule)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "schedule"), [("bfloat16", DECODE), ("float16", DECODE), ("float32", FLOAT32)])
def test_every_kind_of_value(dtype, schedule, kind):
    check(dtype, 5, 72, 40, schedule, kind=kind)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (7, 33, 9), (9, 200, 33)])
@pytest.mark.parametrize("schedule", [DECODE, LARGE])
def test_ragged_shapes(shape, schedule):
    check("bfloat16", *shape, schedule)


@pytest.mark.parametrize("shape", [(100, 40, 72), (130, 136, 200)])
def test_several_tiles(shape):
    check("bfloat16", *shape, LARGE)


@pytest.mark.parametrize("swapped", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize(("dtype", "schedule"), [("float16", LARGE), ("bfloat16", DECODE), ("float32", FLOAT32)])
def test_operands_stored_either_way(dtype, schedule, swapped):
    check(dtype, 20, 72, 72, schedule, swapped=swapped, batch=2)


@pytest.mark.parametrize("bias", [(1, 1, 40), (2, 1, 40), (1, 20, 40), (2, 20, 40), (1, 20, 1)])
@pytest.mark.parametrize("schedule", [DECODE, LARGE])
def test_epilogue(bias, schedule):
    check("bfloat16", 20, 72, 40, schedule, batch=2, bias=bias, alpha=0.3, beta=1.7)
    check("bfloat16", 20, 72, 40, schedule, batch=2, bias=bias, out_dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value_split_in_registers(kind):
    check("float32", 5, 136, 72, SPLIT_IN_REGISTERS[0], kind=kind)


@pytest.mark.parametrize("kind", ["wide", "special", "bits"])
def test_folded_tiles_with_k_of_a_outermost(kind):
    check("float32", 7, 600, 40, SPLIT_IN_REGISTERS[3], kind=kind, swapped=(True, True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (34, 136, 130)])
@pytest.mark.parametrize("schedule", SPLIT_IN_REGISTERS)
def test_shapes_split_in_registers(shape, schedule):
    check("float32", *shape, schedule, batch=2)


@pytest.mark.parametrize("swapped", list(itertools.product((False, True), repeat=2)))
def test_a_swapped_schedule_serves_every_storage(swapped):
    check("float32", 20, 72, 72, SPLIT_IN_REGISTERS[1], swapped=swapped)


@pytest.mark.parametrize("kind", ["subnormal", "tiny"])
def test_operands_that_are_transposed_split_and_padded_keep_subnormals(kind):
    check("float32", 2, 17, 1, SPLIT_IN_REGISTERS[0], kind=kind, swapped=(True, True), seed=35)


@pytest.mark.parametrize("bias", [(1, 1, 70), (2, 20, 70), (1, 20, 1)])
@pytest.mark.parametrize("schedule", SPLIT_IN_REGISTERS)
def test_epilogue_split_in_registers(bias, schedule):
    check("float32", 20, 40, 70, schedule, batch=2, bias=bias, alpha=0.3, beta=1.7)


@functools.cache
def legal(dtype, swapped):
    """The schedules on a grid that `mosaic.plan` accepts for operands stored so."""
    schedules = []
    tiles = itertools.product((8, 16, 32, 64, 128), (16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3))
    for tile, swap, persistent, group_m in itertools.product(tiles, (False, True), (False, True), (1, 3)):
        schedule = GemmSchedule(*tile, swap=swap, persistent=persistent, group_m=group_m)
        with contextlib.suppress(ValueError):
            mosaic.plan(schedule, gemm_contract(dtype), transpose_lhs=swapped[0], transpose_rhs=swapped[1])
            schedules.append(schedule)
    return schedules


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(("bfloat16", "float16", "float32")),
    swapped=st.tuples(st.booleans(), st.booleans()),
    m=st.integers(1, 150),
    k=st.integers(1, 150),
    n=st.integers(1, 150),
    kind=st.sampled_from(KINDS),
)
def test_random_legal_schedules(data, dtype, swapped, m, k, n, kind):
    schedule = data.draw(st.sampled_from(legal(dtype, swapped)))
    check(dtype, m, k, n, schedule, kind=kind, swapped=swapped, seed=m * k + n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swap": True}, "swap"),
        ({"loads": "pointer"}, "TMA"),
        ({"warps": 2}, "warps"),
        ({"block_k": 16}, "block_k"),
        ({"block_n": 8}, "tile"),
        ({"block_m": 256, "block_n": 256}, "registers"),
        ({"block_m": 128, "block_n": 256, "block_k": 256, "warps": 8}, "shared memory"),
    ],
)
def test_illegal_schedules_raise(change, message):
    base = {"block_m": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 2}
    with pytest.raises(ValueError, match=message):
        mosaic.plan(GemmSchedule(**(base | change)), gemm_contract("bfloat16"), transpose_rhs=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loads": "pointer"}, "TMA"),
        ({"block_k": 96}, "block_k"),
        ({"block_n": 128}, "tile"),
        ({"block_m": 72}, "tile"),
        ({"block_m": 8, "warps": 8}, "tile"),
        ({"block_m": 64, "block_k": 256}, "shared memory"),
        ({"block_m": 8, "block_n": 32}, "8 by 32 by 256"),
        ({"block_m": 16, "block_n": 32, "block_k": 256}, "8 by 32 by 256"),
        ({"block_m": 8, "block_n": 16, "block_k": 256}, "8 by 32 by 256"),
        ({"block_m": 8, "block_n": 32, "block_k": 256, "warps": 8}, "8 by 32 by 256"),
    ],
)
def test_illegal_schedules_split_in_registers_raise(change, message):
    base = {"block_m": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 2, "swap": True}
    with pytest.raises(ValueError, match=message):
        mosaic.plan(GemmSchedule(**(base | change)), gemm_contract("float32"), transpose_rhs=True)


def test_aligned_shapes_need_no_workspace():
    assert mosaic.workspace_bytes((1, 100, 4096), (1, 4096, 4096), "bfloat16", transpose_rhs=True) == 0
    assert mosaic.workspace_bytes((1, 512, 4096), (1, 512, 1024), "bfloat16", transpose_lhs=True) == 0
    assert mosaic.workspace_bytes((1, 3, 8), (1, 5, 8), "bfloat16", transpose_rhs=True) == 3 * 8 * 2
    assert mosaic.workspace_bytes((1, 3, 7), (1, 8, 7), "bfloat16", transpose_rhs=True) == (3 + 8) * 8 * 2
