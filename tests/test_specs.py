"""Contract and schedule: validated, canonical in JSON both ways, with a stable identity; and M is no part of the contract."""

import dataclasses
import inspect
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_specs import (
    ARCHITECTURES,
    HOPPER_DOT,
    DotArithmetic,
    Float32Split,
    GemmContract,
    GemmSchedule,
    gemm_contract,
    gemm_schedule,
    schedule_table,
)
from shared_specs.formats import FORMATS
from shared_specs.schedule import ScheduleRow, bucket

DTYPES = tuple(FORMATS)
POWERS = st.integers(0, 8).map(lambda e: 1 << e)

EXTENTS = st.integers(1, 64).map(lambda n: 8 * n)
splits = st.builds(
    Float32Split,
    cross=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda p: p != (0, 0)), unique=True, max_size=8).map(
        tuple
    ),
    promote_k=st.integers(1, 16).map(lambda n: 16 * n),
)
contracts = st.sampled_from(DTYPES).flatmap(
    lambda operand: st.builds(
        GemmContract,
        operand=st.just(operand),
        dot=st.builds(
            DotArithmetic,
            name=st.just("test"),
            k=st.sampled_from((1, 2, 4, 8, 16)),
            fraction_bits=st.integers(1, 52),
            min_exponent=st.integers(-200, 0),
        ),
        split=splits if operand == "float32" else st.none(),
        k_leaves=POWERS,
    )
)
schedules = st.builds(
    GemmSchedule,
    block_m=EXTENTS,
    block_n=EXTENTS,
    block_k=EXTENTS,
    warps=POWERS,
    stages=st.integers(1, 8),
    swap=st.booleans(),
    loads=st.sampled_from(("tma", "pointer")),
    persistent=st.booleans(),
    group_m=st.integers(1, 16),
    store_split=st.integers(1, 4),
)


@given(contracts)
def test_contract_json_both_ways(contract: GemmContract) -> None:
    text = contract.to_json()
    assert GemmContract.from_json(text) == contract
    assert GemmContract.from_json(text).to_json() == text
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text


@given(contracts, contracts)
def test_equal_ids_mean_equal_contracts(one: GemmContract, other: GemmContract) -> None:
    assert (one.contract_id == other.contract_id) == (one == other)


@given(schedules)
def test_schedule_json_both_ways(schedule: GemmSchedule) -> None:
    text = schedule.to_json()
    assert GemmSchedule.from_json(text) == schedule
    assert GemmSchedule.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("bfloat16", "d1b17ea3624877ded1847d4b5cd6166cca27736aff8aedddcab0fa0870e250b4"),
        ("float16", "a945e255256a890cf2395991ad3fc78a00512981ebbe3a01ff552303c25cb46f"),
        ("float32", "3c793b2a333bd25cde7615782db65d44fe94f958261986eca49160ebc469edf7"),
    ],
)
def test_contract_ids_are_stable(dtype: str, digest: str) -> None:
    """What a trainer stored last year must still be equal; a contract with other bits needs another version."""
    assert gemm_contract(dtype).contract_id == f"gemm-v1-{dtype}-sm_90-wgmma-{digest}"


def test_contract_id_names_what_it_stands_for() -> None:
    contract = gemm_contract("bfloat16")
    version, operand, dot = f"v{contract.version}", contract.operand, contract.dot.name
    prefix, _, digest = contract.contract_id.rpartition("-")
    assert prefix == f"gemm-{version}-{operand}-{dot}"
    assert len(digest) == 64
    assert len({gemm_contract(dtype, leaves).contract_id for dtype in DTYPES for leaves in (1, 2, 8)}) == 9


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(GemmContract) if f.name not in ("operand", "version")])
def test_every_field_is_in_the_id(field: str) -> None:
    contract = gemm_contract("float32")
    other = {
        "dot": dataclasses.replace(HOPPER_DOT, fraction_bits=24),
        "split": Float32Split(promote_k=128),
        "k_leaves": 2,
    }[field]
    assert dataclasses.replace(contract, **{field: other}).contract_id != contract.contract_id


def test_the_contract_lookup_cannot_take_m() -> None:
    """Neither the lookup nor the contract has anything that a batch could enter through; the schedule lookup has."""
    assert set(inspect.signature(gemm_contract).parameters) == {"operand", "k_leaves"}
    assert {f.name for f in dataclasses.fields(GemmContract)} == {"operand", "dot", "split", "k_leaves", "version"}
    with pytest.raises(TypeError):
        gemm_contract("bfloat16", m=1)  # type: ignore[call-arg]
    assert {"m", "n", "k", "dtype", "arch", "op"} <= set(inspect.signature(gemm_schedule).parameters)


def test_the_schedule_follows_m_while_the_contract_stays() -> None:
    for engine in ("triton", "mosaic"):
        small, large = (gemm_schedule(engine, "bfloat16", m, 4096, 4096, "sm_90") for m in (1, 8192))
        assert small != large
        small.check(gemm_contract("bfloat16"))
        large.check(gemm_contract("bfloat16"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gemm_contract("float64"), "unsupported dtype 'float64': expected one of bfloat16, float16, float32"),
        (lambda: gemm_contract("bfloat16", 3), "GemmContract.k_leaves must be a power of two, got 3"),
        (lambda: gemm_contract("bfloat16", 0), "k_leaves must be a power of two, got 0"),
        (lambda: GemmContract("float32"), "GemmContract.split must be given exactly for float32"),
        (lambda: GemmContract("bfloat16", split=Float32Split()), "GemmContract.split must be given exactly for float32"),
        (lambda: GemmContract("bfloat16", version=0), "GemmContract.version is 0, this library implements"),
        (lambda: GemmContract("float32", split=Float32Split(promote_k=24)), "must be a multiple of the dot's k = 16, got 24"),
        (lambda: DotArithmetic("", 16, 25, -133), "DotArithmetic.name must not be empty"),
        (lambda: DotArithmetic("x", 12, 25, -133), "DotArithmetic.k must be a power of two, got 12"),
        (lambda: DotArithmetic("x", 16, 53, -133), "DotArithmetic.fraction_bits must be in 1..52, got 53"),
        (lambda: Float32Split(part="int8"), "unsupported dtype 'int8'"),
        (lambda: Float32Split(parts=0), "Float32Split.parts must be positive, got 0"),
        (lambda: Float32Split(cross=((3, 0),)), r"Float32Split.cross names a part outside 0\.\.2"),
        (lambda: Float32Split(cross=((0, 0),)), "Float32Split.cross must not repeat a product"),
        (lambda: Float32Split(cross=((1, 0), (1, 0))), "Float32Split.cross must not repeat a product"),
        (lambda: Float32Split(promote_k=0), "Float32Split.promote_k must be positive, got 0"),
        (lambda: GemmSchedule(12, 16, 16), "GemmSchedule.block_m must be a positive multiple of 8, got 12"),
        (lambda: GemmSchedule(16, 0, 16), "GemmSchedule.block_n must be a positive multiple of 8, got 0"),
        (lambda: GemmSchedule(16, 16, 16, stages=0), "GemmSchedule.stages must be positive, got 0"),
        (lambda: GemmSchedule(16, 16, 16, loads="dma"), "GemmSchedule.loads must be 'tma' or 'pointer', got 'dma'"),  # type: ignore[arg-type]
        (lambda: GemmSchedule(16, 16, 8).check(gemm_contract("bfloat16")), "block_k = 8 must be a multiple of"),
        (lambda: GemmSchedule(16, 16, 16).check(gemm_contract("float32")), "block_k = 16 must be a multiple of"),
        (lambda: GemmSchedule(16, 16, 64, loads="pointer", split_a=True), "GemmSchedule.split_a needs loads = 'tma'"),
        (lambda: GemmSchedule(16, 16, 64, split_a=True).check(gemm_contract("float16")), "split_a is for float32 operands"),
        (
            lambda: ScheduleRow("mosaic", "mm", ("float32",), None, None, None, GemmSchedule(16, 16, 64, split_a=True)),
            "split_a is for Triton, the row is for mosaic",
        ),
        (lambda: schedule_table("sm_80"), "no kernels for GPU architecture 'sm_80': supported are sm_90"),
        (lambda: gemm_schedule("triton", "int8", 1, 1, 1, "sm_90"), "table of sm_90 has no row for triton mm int8"),
        (lambda: GemmContract.from_json("[]"), "GemmContract needs a JSON object, got list"),
        (lambda: GemmContract.from_json('{"operand":"bfloat16"}'), "GemmContract needs the fields"),
        (lambda: GemmSchedule.from_json('{"block_m":16}'), "GemmSchedule needs the fields"),
        (lambda: GemmSchedule.from_json("3"), "GemmSchedule needs the fields"),
    ],
)  # fmt: skip
def test_invalid_specs_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("dot"),
        lambda d: d.update(m=1),
        lambda d: d["dot"].update(lanes=4),
        lambda d: d["split"].pop("promote_k"),
        lambda d: d.update(k_leaves=3),
    ],
)
def test_edited_json_is_refused(edit) -> None:
    data = json.loads(gemm_contract("float32").to_json())
    edit(data)
    with pytest.raises(ValueError, match="needs the fields|must be a power of two"):
        GemmContract.from_json(json.dumps(data))


@given(st.sampled_from(DTYPES), POWERS, st.integers(0, 100_000))
def test_leaves_cut_k_at_chain_boundaries(dtype: str, leaves: int, k: int) -> None:
    contract = gemm_contract(dtype, leaves)
    bounds = contract.leaf_bounds(k)
    assert len(bounds) == leaves
    assert bounds[0][0] == 0
    assert bounds[-1][1] == k
    for (_, stop), (start, _) in itertools.pairwise(bounds):
        assert stop == start
        assert stop % contract.chain_k == 0 or stop == k
    assert len({stop - start for start, stop in bounds if stop < k}) <= 1


@given(st.integers(0, 1 << 40))
def test_a_bucket_has_three_significant_bits(extent: int) -> None:
    size = bucket(extent)
    assert max(extent, 1) <= size <= max(extent, 1) * 5 / 4
    assert size == bucket(size)
    assert size % (1 << max(size.bit_length() - 3, 0)) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_serve_every_shape_with_legal_schedules(arch: str) -> None:
    for row in schedule_table(arch):
        for dtype in row.dtypes:
            row.schedule.check(gemm_contract(dtype))
    for engine in ("triton", "mosaic"):
        for dtype in DTYPES:
            for m, n, k in [(0, 0, 0), (1, 1, 1), (7, 4096, 14336), (1 << 20, 1 << 20, 1 << 20)]:
                assert isinstance(gemm_schedule(engine, dtype, m, n, k, arch), GemmSchedule)
