"""GEMM schedules: tile shapes, warps, stages, operand order. They decide speed and never a bit.

Schedules are data (`schedules/<arch>.json`), looked up by engine, op, dtype, GPU architecture and the bucket of
(M, N, K). Any schedule that passes `check` computes the same bits; tests hold every one in the tables to that.
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, Self

from shared_specs.contract import GemmContract

ARCHITECTURES = ("sm_90",)
"""GPU architectures that have kernels and a schedule table."""

Engine = Literal["triton", "mosaic"]


@dataclass(frozen=True)
class GemmSchedule:
    """One way to run a GEMM on a GPU.

    Attributes:
        block_m, block_n, block_k: elements of M, N and K in one CTA's tile.
        warps: warps that compute (Mosaic: four to a warpgroup).
        stages: K tiles in flight.
        swap: compute the transposed tile, so that N feeds the 64-row side of the instruction (few rows of A).
        loads: "tma" for tensor-map copies, "pointer" for masked loads that take any stride.
        persistent: one CTA per SM walks over the output tiles.
        group_m: tiles of M that neighbouring CTAs take before they move along N (L2 reuse).
        store_split: parts along N in which a tile is stored, so that the epilogue needs less shared memory.
        split_a: float32 by tensor maps in Triton: a kernel of its own cuts A into its parts, rather than every CTA its tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    swap: bool = False
    loads: Literal["tma", "pointer"] = "tma"
    persistent: bool = False
    group_m: int = 8
    store_split: int = 1
    split_a: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 1 or value % 8:
                raise ValueError(f"GemmSchedule.{name} must be a positive multiple of 8, got {value}")
        if self.warps < 1 or self.warps & (self.warps - 1):
            raise ValueError(f"GemmSchedule.warps must be a power of two, got {self.warps}")
        for name in ("stages", "group_m", "store_split"):
            if getattr(self, name) < 1:
                raise ValueError(f"GemmSchedule.{name} must be positive, got {getattr(self, name)}")
        if self.loads not in ("tma", "pointer"):
            raise ValueError(f"GemmSchedule.loads must be 'tma' or 'pointer', got {self.loads!r}")
        if self.split_a and self.loads != "tma":
            raise ValueError("GemmSchedule.split_a needs loads = 'tma'")

    def check(self, contract: GemmContract) -> None:
        """Raise ValueError unless this schedule can evaluate the chains of `contract`."""
        if self.block_k % contract.chain_k:
            raise ValueError(f"block_k = {self.block_k} must be a multiple of the contract's chain_k = {contract.chain_k}")
        if self.split_a and contract.split is None:
            raise ValueError(f"split_a is for float32 operands, the contract's are {contract.operand}")

    def to_json(self) -> str:
        """Canonical form: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The schedule whose canonical form is `text`; ValueError for an unknown or missing field."""
        data = json.loads(text)
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"GemmSchedule needs the fields {sorted(names)}, got {text}")
        return cls(**data)


def bucket(extent: int) -> int:
    """`extent` rounded up to three significant bits: eight buckets to an octave."""
    unit = 1 << max(extent.bit_length() - 3, 0)
    rounded = -(-extent // unit) * unit
    return max(rounded, 1)


@dataclass(frozen=True)
class ScheduleRow:
    """One row of a table: the schedule for every bucket up to (m, n, k); None admits any."""

    engine: Engine
    op: str
    dtypes: tuple[str, ...]
    m: int | None
    n: int | None
    k: int | None
    schedule: GemmSchedule

    def __post_init__(self) -> None:
        if self.schedule.split_a and self.engine != "triton":
            raise ValueError(f"split_a is for Triton, the row is for {self.engine}")

    def admits(self, engine: str, op: str, dtype: str, m: int, n: int, k: int) -> bool:
        """True if this row serves the bucket (m, n, k)."""
        within = all(limit is None or x <= limit for x, limit in ((m, self.m), (n, self.n), (k, self.k)))
        return within and engine == self.engine and op == self.op and dtype in self.dtypes


@lru_cache
def schedule_table(arch: str) -> tuple[ScheduleRow, ...]:
    """Every row of the table of `arch`, in the order in which rows are tried.

    Raises:
        ValueError: there are no kernels for `arch`.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no kernels for GPU architecture {arch!r}: supported are {', '.join(ARCHITECTURES)}")
    rows = json.loads(files("shared_specs").joinpath("schedules", f"{arch}.json").read_text())
    return tuple(_row(**row) for row in rows)


@lru_cache(maxsize=4096)
def _lookup(engine: str, op: str, dtype: str, m: int, n: int, k: int, arch: str) -> GemmSchedule:
    for row in schedule_table(arch):
        if row.admits(engine, op, dtype, m, n, k):
            return row.schedule
    raise ValueError(f"the schedule table of {arch} has no row for {engine} {op} {dtype} ({m}, {n}, {k})")


def gemm_schedule(engine: Engine, dtype: str, m: int, n: int, k: int, arch: str, op: str = "mm") -> GemmSchedule:
    """The schedule for an [m, k] x [k, n] product: the first row of the table whose limits admit its bucket."""
    return _lookup(engine, op, dtype, bucket(m), bucket(n), bucket(k), arch)


def _row(
    *, engine: Engine, op: str, dtypes: list[str], schedule: dict[str, Any], m: int | None, n: int | None, k: int | None
) -> ScheduleRow:
    return ScheduleRow(engine, op, tuple(dtypes), m, n, k, GemmSchedule(**schedule))
