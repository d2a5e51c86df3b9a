"""The GEMM contract on Hopper tensor cores, with Pallas Mosaic GPU.

One kernel serves every shape. A CTA computes [block_m, block_n] tiles of the output; one warpgroup loads K slabs of
both operands by TMA into a ring of stages, one or two warpgroups run `wgmma` on them.

Why the bits are right: `wgmma` takes 16 elements of K at a time in ascending order and adds them to one float32
accumulator; nothing splits K, and TMA fills what lies outside an operand with zeros. So neither the tile nor the grid
enters the result. What the epilogue and the float32 promotion add, they add by `bi_jax.exact`.

- A slab is 64 elements of K: 128 bytes a row, the widest swizzle that TMA and `wgmma` share. For float32 it is one chain.
- `wgmma` reads 64 rows. A tile of fewer rows of A occupies only its own rows in shared memory; the instruction reads on
  into the next slab, and the rows that come of it are never stored. So decoding streams the weights through tiles as
  narrow as 16 columns, and shared memory is left to loads in flight.
- Operands may be stored with K innermost or outermost; `wgmma` reads either from shared memory, so gradients need no
  transposed copies.
- float32 operands arrive as bfloat16 parts, one array of parts after another.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from bi_jax import exact
from bi_jax.branch import when
from bi_jax.index import affine, quotient_and_rest
from shared_specs.contract import GemmContract
from shared_specs.schedule import GemmSchedule

ROWS = 64
"""Rows that one `wgmma` computes."""
TILE = 8
"""Rows of a swizzled tile of shared memory."""
SWIZZLE = 128
"""Bytes of the widest swizzle, and of a row that the epilogue stores at a time."""
SHARED_MEMORY = 231_424
"""Bytes of shared memory for a CTA's arrays; 1 KiB is left to barriers."""
SMS = 132
"""CTAs of a persistent kernel: the SMs of an H100."""
MEMORY_REGISTERS = 40
"""Registers per thread that the loading warpgroup keeps where the computing ones need more than their share."""

Ref = Any
Multiply = Callable[[Ref, int, int], None]
"""Adds the product of a part of A and a part of B to an accumulator."""
Chains = tuple[jax.Array, Callable[[], jax.Array]]
"""float32: the chain of part 0, and what waits for the chain of all the rest."""


@dataclass(frozen=True)
class Operand:
    """One operand's tiles in shared memory: `block` rows (of M or N) by `slabs` slabs of K, `stages` times.

    Attributes:
        slab: elements of K in a slab.
        k_inner: stored [rows, K] rather than [K, rows].
        overhang: rows past the last tile that `wgmma` may read.
        parts: arrays that make up the operand (3 for float32 in parts, else 1).
        dtype: of an element.
    """

    block: int
    slab: int
    slabs: int
    stages: int
    k_inner: bool
    overhang: int
    parts: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        slabs = self.stages * self.parts * self.slabs
        return (slabs * self.block + self.overhang, self.slab) if self.k_inner else (slabs * self.slab, self.block)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copies(self) -> int:
        """TMA copies per stage."""
        return self.parts * (self.slabs if self.k_inner else 1)

    def load(self, gmem: Ref, smem: Ref, barrier: Ref, slot: Any, batch: Any, row: Any, k: Any) -> None:
        """Start the copies of the tile at (row, k) into stage `slot`."""
        batches = gmem.shape[0] // self.parts
        for part in range(self.parts):
            source = gmem.at[part * batches + (batch if batches > 1 else 0)]
            if self.k_inner:
                for j in range(self.slabs):
                    to = plain_rows(smem, self._first_tile(slot, part, j), self.block)
                    of = source.at[pl.ds(row, self.block), pl.ds(affine(k, 1, j * self.slab), self.slab)]
                    plgpu.copy_gmem_to_smem(of, to, barrier)
            else:
                size = self.slabs * self.slab
                of = source.at[pl.ds(k, size), pl.ds(row, self.block)]
                plgpu.copy_gmem_to_smem(of, swizzled_rows(smem, self._first_tile(slot, part, 0), size), barrier)

    def tile(self, smem: Ref, slot: Any, part: int, j: int, place: Any, rows: int) -> Ref:
        """The `place`-th `rows` rows of slab `j`, as it is stored."""
        if self.k_inner:
            return swizzled_rows(smem, self._first_tile(slot, part, j, affine(place, rows // TILE)), rows)
        return swizzled_rows(smem, self._first_tile(slot, part, j), self.slab, place, rows)

    def _first_tile(self, slot: Any, part: int, j: int, offset: Any = 0) -> Any:
        """Where slab `j` of a part begins in shared memory, and `offset` tiles on."""
        tiles = (self.block if self.k_inner else self.slab) // TILE
        return affine(slot, self.parts * self.slabs * tiles, affine(offset, 1, (part * self.slabs + j) * tiles))


@dataclass(frozen=True)
class Plan:
    """Everything static about one kernel; `plan` makes and checks it.

    Attributes:
        bias_dtype: None without a bias.
        bias_rows: the bias has a row for every row of the output, rather than one for all.
    """

    contract: GemmContract
    schedule: GemmSchedule
    transpose_lhs: bool
    transpose_rhs: bool
    out_dtype: Any
    alpha: float
    beta: float
    bias_dtype: Any
    bias_rows: bool

    @property
    def operand_dtype(self) -> Any:
        """What `wgmma` multiplies."""
        rule = self.contract.split
        return jnp.dtype(self.contract.operand if rule is None else rule.part)

    @property
    def parts(self) -> int:
        return 1 if self.contract.split is None else self.contract.split.parts

    @property
    def slab(self) -> int:
        """Elements of K in a row of shared memory."""
        return SWIZZLE // self.operand_dtype.itemsize

    @property
    def slabs(self) -> int:
        return self.schedule.block_k // self.slab

    @property
    def lhs(self) -> Operand:
        s = self.schedule
        overhang = max(ROWS - s.block_m, 0)
        return Operand(
            s.block_m, self.slab, self.slabs, s.stages, not self.transpose_lhs, overhang, self.parts, self.operand_dtype
        )

    @property
    def rhs(self) -> Operand:
        s = self.schedule
        return Operand(s.block_n, self.slab, self.slabs, s.stages, self.transpose_rhs, 0, self.parts, self.operand_dtype)

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.schedule.warps // 4

    @property
    def split_rows(self) -> bool:
        """Two warpgroups share a tile by rows if it has enough of them, else by columns."""
        return self.schedule.block_m >= ROWS * self.warpgroups

    @property
    def rows(self) -> int:
        """Rows of a warpgroup's accumulator."""
        return max(self.schedule.block_m // (self.warpgroups if self.split_rows else 1), ROWS)

    @property
    def cols(self) -> int:
        """Columns of a warpgroup's accumulator."""
        return self.schedule.block_n // (1 if self.split_rows else self.warpgroups)

    @property
    def piece(self) -> int:
        """Columns that the epilogue stores at a time."""
        return math.gcd(self.cols, SWIZZLE // self.out_dtype.itemsize)

    @property
    def out_slots(self) -> int:
        """Pieces of a warpgroup that may be on their way to memory; tile after tile, they take turns in shared memory."""
        return 2 if self.cols // self.piece % 2 == 0 else 1

    @property
    def bias_shape(self) -> tuple[int, int]:
        """A warpgroup's bias in shared memory: a piece, or all its columns (to a multiple of 128 bytes)."""
        return (self.rows, self.piece) if self.bias_rows else (1, round_up(self.cols, SWIZZLE // self.bias_dtype.itemsize))

    @property
    def accumulators(self) -> int:
        """float32 registers of a thread that hold accumulators."""
        return self.rows * self.cols // 128 * (1 if self.contract.split is None else 4)

    @property
    def fold(self) -> int:
        """float32: chunks of `promote_k` whose chains lie side by side in one accumulator."""
        return 1

    @property
    def chunks_in_flight(self) -> int:
        """Pairs of accumulators, of `fold` chunks each, that a warpgroup has under way together."""
        return 1

    @property
    def cutting(self) -> int:
        """Warpgroups that cut A into its parts, beside those that load and compute."""
        return 0

    @property
    def crowded(self) -> bool:
        """The computing warpgroups need registers of the loading one."""
        return self.accumulators > 64

    def scratch(self) -> dict[str, Any]:
        """The kernel's shared memory and barriers."""
        wgs, stages = self.warpgroups, self.schedule.stages
        arrays = {
            "a_smem": tiled_smem(self.lhs.shape, self.lhs.dtype, self.lhs.slab),
            "b_smem": tiled_smem(self.rhs.shape, self.rhs.dtype, self.rhs.slab),
            "out_smem": self.out_smem(),
            "full": plgpu.Barrier(num_arrivals=self.lhs.copies + self.rhs.copies, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        }
        if self.bias_dtype is not None:
            arrays["bias_smem"] = plgpu.SMEM((wgs, *self.bias_shape), self.bias_dtype)
            arrays["bias_full"] = plgpu.Barrier(num_barriers=wgs)
        return arrays

    def out_smem(self) -> Any:
        """Shared memory for the pieces of the output."""
        return tiled_smem((self.warpgroups * self.out_slots * self.rows, self.piece), self.out_dtype, self.piece)

    def shared_memory(self) -> int:
        """Bytes of shared memory for arrays."""
        sizes = [
            self.lhs.bytes,
            self.rhs.bytes,
            self.warpgroups * self.out_slots * self.rows * self.piece * self.out_dtype.itemsize,
        ]
        if self.bias_dtype is not None:
            sizes.append(self.warpgroups * math.prod(self.bias_shape) * self.bias_dtype.itemsize)
        return sum(-(-size // 1024) * 1024 for size in sizes)

    def check(self) -> None:
        """Raise ValueError for a schedule that this kernel cannot run."""
        s = self.schedule
        if s.block_k % self.slab or s.block_k % self.contract.chain_k or s.block_k > 256:
            raise ValueError(
                f"block_k must be a multiple of {max(self.slab, self.contract.chain_k)} up to 256, got {s.block_k}"
            )
        if self.contract.k_leaves != 1:
            raise ValueError(f"the kernel evaluates one leaf of K, the contract has {self.contract.k_leaves}")
        if s.swap or s.loads != "tma":
            raise ValueError(f"this kernel loads by TMA and does not swap, got swap={s.swap}, loads={s.loads!r}")
        if self.contract.split is not None and self.contract.split.promote_k != self.slab:
            raise ValueError(f"a chunk of float32 must be a slab, {self.slab}, got {self.contract.split.promote_k}")
        if s.warps not in (4, 8):
            raise ValueError(f"Mosaic schedules compute with 4 or 8 warps, got {s.warps}")
        if not (8 <= s.block_m <= 256 and 16 <= s.block_n <= 256 and self.cols % 16 == 0):
            raise ValueError(f"a tile must be 8..256 by 16..256, 16 j columns a warpgroup, got {s.block_m} by {s.block_n}")
        if s.block_m % 8 or self.rows % ROWS:
            raise ValueError(f"block_m must be a multiple of 8, or of {ROWS} a warpgroup above that, got {s.block_m}")
        if self.accumulators > 192:
            raise ValueError(f"{self.accumulators} accumulator registers a thread do not fit, tile {s.block_m} by {s.block_n}")
        if self.shared_memory() > SHARED_MEMORY:
            raise ValueError(f"needs {self.shared_memory()} bytes of shared memory, there are {SHARED_MEMORY}: {s}")

    def compute(
        self, bias: Ref | None, out: Ref, scratch: dict[str, Ref], wg: Any, first: Any, steps: int, at: tuple[Any, Any, Any]
    ) -> None:
        """A computing warpgroup's share of one tile: accumulate over the ring from step `first`, then store."""
        _compute(self, bias, out, scratch, wg, first, steps, at)

    def cut_lhs(self, scratch: dict[str, Ref], steps: Any) -> None:
        """The cutting warpgroup, for all steps of a CTA."""
        raise NotImplementedError


def kernel(plan: Plan, batch: int, m: int, n: int, k: int, padded_n: int) -> Callable[..., jax.Array]:
    """The compiled kernel's entry: operands, then the bias if there is one, to [batch, m, padded_n]."""
    s = plan.schedule
    tiles_m, tiles_n = pl.cdiv(m, s.block_m), pl.cdiv(n, s.block_n)
    tiles, steps = batch * tiles_m * tiles_n, pl.cdiv(max(k, 1), s.block_k)
    ctas = min(tiles, SMS) if s.persistent else tiles

    def body(a: Ref, b: Ref, *refs: Ref, **scratch: Ref) -> None:
        *bias, out = refs
        warpgroup = lax.axis_index("warpgroup")
        cta = lax.axis_index("cta")
        local_tiles = lax.div(lax.sub(np.int32(tiles + ctas - 1), cta), np.int32(ctas)) if ctas < tiles else 1

        def tile_at(i: Any) -> tuple[Any, Any, Any]:
            return _tile(affine(i, ctas, cta), tiles_m, tiles_n, s.group_m)

        @when(lax.eq(warpgroup, np.int32(plan.warpgroups)))
        def _() -> None:
            if plan.crowded:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            _load(plan, a, b, scratch, local_tiles, steps, tile_at)

        @when(lax.gt(warpgroup, np.int32(plan.warpgroups)) if plan.cutting else False)
        def _() -> None:
            plan.cut_lhs(scratch, affine(local_tiles, steps))

        @when(lax.lt(warpgroup, np.int32(plan.warpgroups)))
        def _() -> None:
            if plan.crowded:
                plgpu.set_max_registers(_compute_registers(plan.warpgroups), action="increase")

            def tile(i: Any, _: None) -> None:
                at = tile_at(i)
                plan.compute(bias[0] if bias else None, out, scratch, warpgroup, affine(i, steps), steps, at)

            lax.fori_loop(0, local_tiles, tile, None)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, m, padded_n), plan.out_dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1 + plan.cutting,
        thread_name="warpgroup",
        kernel_name="bi_gemm",
        scratch_types=plan.scratch(),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _load(plan: Plan, a: Ref, b: Ref, scratch: dict[str, Ref], local_tiles: Any, steps: int, tile_at: Callable) -> None:
    """The loading warpgroup: fill the ring, tile after tile, as far ahead as it reaches."""
    s = plan.schedule
    full, empty = scratch["full"], scratch["empty"]

    def tile(i: Any, _: None) -> None:
        batch, tile_m, tile_n = tile_at(i)

        def step(k: Any, _: None) -> None:
            count = affine(i, steps, k)
            slot = lax.rem(count, np.int32(s.stages))

            @when(lax.ge(count, np.int32(s.stages)))
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            plan.rhs.load(b, scratch["b_smem"], full.at[slot], slot, batch, affine(tile_n, s.block_n), affine(k, s.block_k))
            plan.lhs.load(a, scratch["a_smem"], full.at[slot], slot, batch, affine(tile_m, s.block_m), affine(k, s.block_k))

        lax.fori_loop(0, steps, step, None)

    def drain(count: Any, _: None) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(count, np.int32(s.stages))])

    lax.fori_loop(0, local_tiles, tile, None)
    total = affine(local_tiles, steps)
    left = affine(total, 1, -s.stages)
    lax.fori_loop(max(left, 0) if isinstance(left, int) else lax.max(left, np.int32(0)), total, drain, None)


def _compute(
    plan: Plan, bias: Ref | None, out: Ref, scratch: dict[str, Ref], wg: Any, first: Any, steps: int, at: tuple[Any, Any, Any]
) -> None:
    s = plan.schedule
    batch, tile_m, tile_n = at
    row, col = (wg, 0) if plan.split_rows else (0, wg)
    row_bias = bias is not None and not plan.bias_rows
    corner = (batch, affine(tile_m, s.block_m, affine(row, plan.rows)), affine(tile_n, s.block_n, affine(col, plan.cols)))
    if row_bias:
        copy_bias(plan, bias, scratch, wg, corner)

    def multiply(acc: Ref, slot: Any, j: int, i_part: int, j_part: int) -> None:
        lhs = plan.lhs.tile(scratch["a_smem"], slot, i_part, j, row, plan.rows)
        rhs = plan.rhs.tile(scratch["b_smem"], slot, j_part, j, col, plan.cols)
        lhs = lhs.transpose((1, 0)) if plan.transpose_lhs else lhs
        rhs = rhs.transpose((1, 0)) if plan.transpose_rhs else rhs
        plgpu.wgmma(acc, lhs, rhs)

    def chunk(slot: Any, index: int) -> Multiply:
        def product(acc: Ref, i_part: int, j_part: int) -> None:
            multiply(acc, slot, index, i_part, j_part)

        return product

    full, empty = scratch["full"], scratch["empty"]
    if plan.contract.split is None:
        acc = _chain(plan, full, empty, first, steps, multiply)
    else:
        acc = promoted_chains(plan, full, empty, first, steps, chunk)
    if row_bias:
        plgpu.barrier_wait(scratch["bias_full"].at[wg])
    _store(plan, acc, bias, out, scratch, wg, corner)


def _chain(plan: Plan, full: Ref, empty: Ref, first: Any, steps: int, multiply: Callable) -> jax.Array:
    """One accumulator over all of K. A stage is released when the next one's instructions are under way."""
    stages = np.int32(plan.schedule.stages)

    def scope(acc: Ref) -> jax.Array:
        def step(k: Any, _: None) -> None:
            slot = lax.rem(affine(k, 1, first), stages)
            plgpu.barrier_wait(full.at[slot])
            for j in range(plan.slabs):
                multiply(acc, slot, j, 0, 0)
            plgpu.wgmma_wait(plan.slabs)

            @when(lax.gt(k, np.int32(0)))
            def _() -> None:
                plgpu.barrier_arrive(empty.at[lax.rem(affine(k, 1, affine(first, 1, -1)), stages)])

        lax.fori_loop(0, steps, step, None)
        return acc[...]

    acc = pl.run_scoped(scope, plgpu.ACC((plan.rows, plan.cols)))
    plgpu.barrier_arrive(empty.at[lax.rem(affine(first, 1, steps - 1), stages)])
    return acc


def promoted_chains(
    plan: Plan,
    full: Ref,
    empty: Ref,
    first: Any,
    steps: int,
    chunk: Callable[[Any, int], Multiply],
    unfold: Callable[[Chains], Iterable[Chains]] = lambda chains: [chains],
) -> jax.Array:
    """float32: two chains per `promote_k` elements of K, added up as `Float32Split` says.

    `chunk(slot, index)` loads what it needs of a stage's chunk, or `plan.fold` chunks, and returns how to multiply a part of A
    with a part of B; `unfold` gives the chains of each of these chunks, in ascending order. `plan.chunks_in_flight` pairs of
    accumulators are under way before the first of them is waited for.
    """
    rule = plan.contract.split
    assert rule is not None
    stages, products = np.int32(plan.schedule.stages), 1 + len(rule.cross)
    chunks = plan.schedule.block_k // (rule.promote_k * plan.fold)

    def together(slot: Any, indices: range, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def scope(*accs: Ref) -> tuple[jax.Array, jax.Array]:
            high, cross = sums
            for high_acc, cross_acc, index in zip(accs[::2], accs[1::2], indices, strict=True):
                multiply = chunk(slot, index)
                multiply(high_acc, 0, 0)
                for i_part, j_part in rule.cross:
                    multiply(cross_acc, i_part, j_part)
            pending = len(indices) * products
            for high_acc, cross_acc in zip(accs[::2], accs[1::2], strict=True):
                high_chains = plgpu.wgmma_accumulator_load(high_acc, wait_n=pending - 1)
                pending -= products
                cross_chains = partial(plgpu.wgmma_accumulator_load, cross_acc, wait_n=pending)
                for high_chain, cross_chain in unfold((high_chains, cross_chains)):
                    total = exact.add(high, high_chain)
                    error = exact.sub(high_chain, exact.sub(total, high))
                    cross = exact.add(cross, exact.add(cross_chain(), error))
                    high = total
            return high, cross

        return pl.run_scoped(scope, *[plgpu.ACC((plan.rows, plan.fold * plan.cols))] * (2 * len(indices)))

    def step(k: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot = lax.rem(affine(k, 1, first), stages)
        plgpu.barrier_wait(full.at[slot])
        for start in range(0, chunks, plan.chunks_in_flight):
            sums = together(slot, range(start, min(start + plan.chunks_in_flight, chunks)), sums)
        plgpu.barrier_arrive(empty.at[slot])
        return sums

    zero = full_array((plan.rows, plan.cols), 0.0)
    high, cross = lax.fori_loop(0, steps, step, (zero, zero))
    return jnp.where(jnp.abs(high) < jnp.inf, exact.add(high, cross), high)


def _store(
    plan: Plan, acc: jax.Array, bias: Ref | None, out: Ref, scratch: dict[str, Ref], wg: Any, corner: tuple[Any, Any, Any]
) -> None:
    """alpha * acc + beta * bias, rounded to the output dtype and stored in pieces; TMA drops what lies outside."""
    batch, row, col = corner
    stored = min(plan.rows, plan.schedule.block_m)
    for piece in range(plan.cols // plan.piece):
        columns = slice(piece * plan.piece, (piece + 1) * plan.piece)
        value = acc[:, columns]
        if plan.alpha != 1:
            value = exact.mul(value, full_array(value.shape, plan.alpha))
        if bias is not None:
            if plan.bias_rows:
                copy_bias(plan, bias, scratch, wg, (batch, row, affine(col, 1, piece * plan.piece)))
                plgpu.barrier_wait(scratch["bias_full"].at[wg])
            addend = _bias_piece(plan, scratch["bias_smem"].at[wg], columns)
            if plan.beta != 1:
                addend = exact.mul(addend, full_array(value.shape, plan.beta))
            value = exact.add(value, addend)
        first = affine(wg, plan.out_slots * plan.rows // TILE, piece % plan.out_slots * plan.rows // TILE)
        plgpu.wait_smem_to_gmem(plan.out_slots - 1, wait_read_only=True)
        store_rows(scratch["out_smem"], first, lax.convert_element_type(value, plan.out_dtype))
        plgpu.commit_smem()
        source = plain_rows(scratch["out_smem"], first, stored)
        columns = pl.ds(affine(col, 1, piece * plan.piece), plan.piece)
        plgpu.copy_smem_to_gmem(source, out.at[batch, pl.ds(row, stored), columns])


def copy_bias(plan: Plan, bias: Ref, scratch: dict[str, Ref], wg: Any, corner: tuple[Any, Any, Any]) -> None:
    """Start the copy of a warpgroup's bias, from `corner` on."""
    batch, row, col = corner
    rows, cols = plan.bias_shape
    source = bias.at[batch if bias.shape[0] > 1 else 0, pl.ds(row if plan.bias_rows else 0, rows), pl.ds(col, cols)]
    plgpu.copy_gmem_to_smem(source, scratch["bias_smem"].at[wg], scratch["bias_full"].at[wg])


def _bias_piece(plan: Plan, bias: Ref, columns: slice) -> jax.Array:
    """The bias of one piece as float32 [rows, piece]."""
    if plan.bias_rows:
        return plgpu.load(bias, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
    row = plgpu.load(bias.at[0, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False).astype(jnp.float32)
    return lax.broadcast_in_dim(row, (plan.rows, plan.piece), (1,))


def _tile(index: Any, tiles_m: int, tiles_n: int, group_m: int) -> tuple[Any, Any, Any]:
    """(batch, tile of M, tile of N): within groups of `group_m` tiles of M, M runs fastest, for reuse in the L2 cache."""
    batch, index = quotient_and_rest(index, tiles_m * tiles_n)
    group, index = quotient_and_rest(index, group_m * tiles_n)
    height = lax.min(affine(group, -group_m, np.int32(tiles_m)), np.int32(group_m))
    return batch, affine(group, group_m, lax.rem(index, height)), lax.div(index, height)


def full_array(shape: tuple[int, ...], value: float) -> jax.Array:
    """A register array of `value`, in the layout of accumulators."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def _compute_registers(warpgroups: int) -> int:
    """What the 512 registers of a thread column leave to each computing warpgroup, in steps of 8 up to 240."""
    return min(240, (512 - MEMORY_REGISTERS) // warpgroups // 8 * 8)


def tiled_smem(shape: tuple[int, int], dtype: Any, width: int) -> Any:
    """Shared memory in the order that `wgmma` reads: swizzled tiles of 8 rows of `width`."""
    transforms = plgpu.TilingTransform((TILE, width)), plgpu.SwizzleTransform(width * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def swizzled_rows(smem: Ref, first: Any, rows: int, place: Any = 0, columns: int | None = None) -> Ref:
    """`rows` rows from tile `first` on, and of them the `place`-th `columns` columns.

    Tiles are indexed as they lie in memory, and what hides them comes after: an index of rows would have to be moved before
    each step of that, for which Mosaic traces a function each time.
    """
    if exact.is_emulated():  # it keeps no tiles
        every = smem.shape[1] if columns is None else columns
        return smem.at[pl.ds(affine(first, TILE), rows), pl.ds(affine(place, every), every)]
    tiles = _tiles(smem, first, rows, place, columns)
    return type(smem)(tiles.ref, (*tiles.transforms, *smem.transforms))


def plain_rows(smem: Ref, first: Any, rows: int) -> Ref:
    """`rows` rows from tile `first` on for TMA: tiles of 8 rows, one tile wide, lie in memory as plain rows.

    A copy of plain rows may reach past any edge of an array; a copy of tiles needs an array that is made of tiles.
    """
    if exact.is_emulated():
        return swizzled_rows(smem, first, rows)
    tiles = _tiles(smem, first, rows).reshape(rows, smem.shape[1])
    return type(smem)(tiles.ref, (*tiles.transforms, *smem.transforms[:1]))


def first_tile(smem: Ref, width: int) -> Ref:
    """The first 8 rows of `width` for TMA, of an array of such tiles."""
    if exact.is_emulated():
        return swizzled_rows(smem, 0, TILE, 0, width)
    tile = smem.ref.at[0, 0]
    return type(smem)(tile.ref, (*tile.transforms, *smem.transforms[:1]))


def store_rows(smem: Ref, first: Any, value: jax.Array) -> None:
    """Store a register array in the rows from tile `first` on. An assignment would load what was there before, too."""
    if exact.is_emulated():
        swizzled_rows(smem, first, len(value))[...] = value
        return
    swizzle = smem.transforms[0].swizzle

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_: Any, tiles: ir.Value, array: mgpu.FragmentedArray) -> None:
        mgpu.warpgroup_barrier()
        array.store_tiled(tiles, swizzle=swizzle)
        mgpu.warpgroup_barrier()

    store(_tiles(smem, first, len(value)), value)


def _tiles(smem: Ref, first: Any, rows: int, place: Any = 0, columns: int | None = None) -> Ref:
    """Tiles as they lie in memory: [rows / 8, columns / width, 8, width]."""
    width = smem.ref.shape[-1]
    across = smem.ref.shape[1] if columns is None else columns // width
    return smem.ref.at[pl.ds(first, rows // TILE), pl.ds(affine(place, across), across)]


def round_up(x: int, multiple: int) -> int:
    """The least positive multiple of `multiple` that is not below x."""
    return -(-max(x, 1) // multiple) * multiple
