"""Attention in one launch: its kernels on a CPU, against the CPU engine, bit for bit; and compiled for an H100."""

import math
import re

import pytest
import torch

import bi_torch
from bi_torch.attention import calls, library, triton_fused
from bi_torch.attention.fused import Fused, FusedSchedule, fused_schedule, strides_of
from tests import test_triton_attention
from tests.arrays import DTYPES, assert_same, draw
from tests.interpreters.triton import interpreted, interpreted_launches
from tests.test_triton_attention import test_triton_interpreter, test_triton_rows
from tests.test_triton_rows import INEXACT, for_an_h100

KERNELS = interpreted(triton_fused, test_triton_attention.KERNELS, test_triton_interpreter.KERNELS, test_triton_rows.KERNELS)
STORED, RECOMPUTED = FusedSchedule(True, 8, 64, 4, 3), FusedSchedule(False, 32, 64, 4, 3)
LONG = [
    (1025, (FusedSchedule(True, 2, 512, 4, 1), FusedSchedule(False, 16, 256, 4, 1))),
    (1024, (FusedSchedule(False, 16, 512, 4, 1),)),
    (2300, (FusedSchedule(True, 4, 1024, 4, 1), FusedSchedule(False, 16, 512, 4, 1))),
]
"""Keys and schedules that take few steps of the interpreter."""


_interpreted = interpreted_launches(KERNELS)


def prepared(query, key, value, mask=None, *, is_causal=False, scale=0.3, schedule=None):
    """The launch, and the lengths of rows and order of keys that it is to have."""
    layout = library.layout_of(query, key, value, mask, True)
    strides = strides_of(layout, query, key, value)
    assert strides is not None
    call = calls.Call(layout, strides, (), is_causal, scale, True)
    lengths, order = (None, None) if mask is None else call._rows(mask)
    shape, head = (*layout.out, layout.queries, value.shape[-1]), (key.shape[-1], value.shape[-1])
    asked = is_causal, lengths is not None, order is not None
    return Fused.of(shape, layout, strides, head, scale, *asked, schedule), lengths, order


def check(query, key, value, mask=None, *, is_causal=False, scale=0.3, schedules=(STORED, RECOMPUTED)):
    expected = bi_torch.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    for schedule in schedules:
        plan, lengths, order = prepared(query, key, value, mask, is_causal=is_causal, scale=scale, schedule=schedule)
        assert_same(plan(query, key, value, lengths, order, scale), expected)
    return expected


def operands(queries, keys, heads=2, kv_heads=1, e=16, d=16, batch=1, dtype="bfloat16", kind="normal"):
    shapes = (batch, heads, queries, e), (batch, kv_heads, keys, e), (batch, kv_heads, keys, d)
    return [draw(*shape, dtype=dtype, kind=kind, seed=i) for i, shape in enumerate(shapes)]


def left_padded(queries, keys, *padding):
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return causal & (torch.arange(keys) >= torch.tensor(padding)[:, None])[:, None, None]


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "wide"), ("float16", "normal")])
def test_rows_that_admit_all_keys(dtype, kind):
    check(*operands(1, 70, e=24, d=40, dtype=dtype, kind=kind))


@pytest.mark.usefixtures("_interpreted")
def test_causal():
    """Fewer and more keys than queries; blocks of rows across the heads of a group."""
    check(*operands(9, 70, dtype="float16"), is_causal=True)
    check(*operands(70, 21), is_causal=True, schedules=(RECOMPUTED,))


@pytest.mark.usefixtures("_interpreted")
def test_masks():
    """Lengths alone, an order of the keys as well, and rows that admit nothing."""
    query, key, value = operands(3, 70, batch=2)
    check(query, key, value, left_padded(3, 70, 0, 0), schedules=(STORED,))
    check(query, key, value, left_padded(3, 70, 0, 69))
    check(query, key, value, torch.rand(2, 1, 1, 70) < 0.5, schedules=(RECOMPUTED,))


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("keys", "schedules"), LONG)
def test_lanes_of_several_chunks(keys, schedules):
    """Tiles of keys go from chunk to chunk, lane by lane; the last one is not full, or in fewer chunks than others."""
    check(*operands(1, keys), scale=2.0, schedules=schedules)


@pytest.mark.usefixtures("_interpreted")
def test_what_is_not_finite():
    """Values that some rows of a block admit and others do not; keys that none does; scores; sums that overflow."""
    query, key, value = operands(9, 30)
    for i, lost in enumerate((math.nan, math.inf, -math.inf)):
        value[0, 0, 3 * i, i] = value[0, 0, -1 - i, -1 - i] = lost
    expected = check(query, key, value, is_causal=True)
    assert expected.isnan().any()
    assert expected.isfinite().any()
    check(query[:, :, :1], key, value)
    mask = left_padded(9, 30, 4)
    key[0, 0, :4], key[0, 0, -1, 0], value[0, 0, :4] = math.nan, math.inf, math.nan
    expected = check(query, key, value, mask)
    assert expected.isnan().any()
    assert expected.isfinite().any()
    query, key, value = operands(2, 30, dtype="float16")
    check(query, key, torch.full_like(value, 65504.0), is_causal=True)


@pytest.mark.usefixtures("_interpreted")
def test_operands_where_they_are():
    """Transposed, strided and expanded views, as decoders have them."""
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(3, 20, kv_heads=2, batch=2))
    check(query, key, value, is_causal=True, schedules=(RECOMPUTED,))
    both = torch.stack([key, value], -1)
    check(query, both[..., 0], both[..., 1], schedules=(STORED,))
    check(query, key[:, :1].expand(-1, 2, -1, -1), value[:, :1].expand(-1, 2, -1, -1), schedules=(RECOMPUTED,))


def test_what_it_does_not_take():
    def taken(query, key, value):
        return strides_of(library.layout_of(query, key, value, None, False), query, key, value) is not None

    x = torch.empty(2, 3, 8, 16, dtype=torch.bfloat16)
    assert taken(x, x, x)
    assert not taken(x.float(), x.float(), x.float())
    assert taken(x[..., :1, :], *2 * (x[..., :1, :].expand(2, 3, 8192, 16),))
    assert not taken(x[..., :1, :], *2 * (x[..., :1, :].expand(2, 3, 8193, 16),))
    assert not taken(*3 * (x.new_empty(2, 3, 8, 136),))
    for pitch, fits in ((1 << 27, True), (1 << 29, False)):
        far = torch.empty_strided((1, 1, 8, 16), (1, 1, pitch, 1), dtype=x.dtype, device="meta")
        assert taken(x[:1, :1], far, far) == fits
    permuted = x.new_empty(3, 4, 2, 8, 16).permute(2, 1, 0, 3, 4)
    assert not taken(permuted, permuted, permuted)


@pytest.mark.parametrize(("queries", "kv_heads", "head"), [(2048, 32, 64), (1, 8, 128)])
def test_compiled_for_an_h100(queries, kv_heads, head):
    """Nothing is flushed or contracted, and operands are loaded sixteen bytes at a time."""
    shapes, is_causal = ((1, 32, queries, head), (1, kv_heads, 2048, head)), queries > 1
    query, key = (torch.empty(shape, dtype=DTYPES["bfloat16"]) for shape in shapes)
    plan, lengths, order = prepared(query, key, key, is_causal=is_causal)
    scores = () if plan.scores is None else (torch.empty(plan.scores),)
    kernel = for_an_h100(plan.launch, (query, key, key, lengths, order, torch.empty(plan.shape, dtype=query.dtype), *scores))
    ptx = kernel.asm["ptx"]
    assert not re.search(INEXACT, ptx)
    assert "cp.async.cg.shared.global" in ptx
    assert re.search(r"(wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k16\.\S*f32\.bf16\.bf16", ptx)
    assert kernel.metadata.shared <= 227 * 1024


def test_schedules():
    for rows in (1, 3, 16, 17, 64, 65, 5000):
        for head in (16, 64, 128):
            schedule = fused_schedule(rows, head)
            assert schedule.stored == (rows <= 16)
            assert 1024 % schedule.block_keys == 0
