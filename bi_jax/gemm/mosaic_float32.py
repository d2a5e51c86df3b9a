"""float32 on Hopper with B split in registers: the chains of the GEMM contract, the product transposed.

B, stored with K innermost, stays float32 until it is in registers: 4 bytes an element instead of 6 as parts, and no pass
over it beforehand. A computing warpgroup loads [64 of N, 64 of K] as a register operand of `wgmma`, cuts it into the three
parts, and multiplies them with the parts of A in shared memory, which were cut beforehand. So a tile of the output is
[64 of N, block_m of M] for every warpgroup, and is stored transposed.

Why the bits are right: parts, chains and sums are those of `Float32Split`. A product does not depend on the order of its
factors. The chains of different chunks do not depend on each other, so some are under way together, and what they give is
added in ascending order.

- Parts 1 and 2 of an infinity or a NaN are NaN here and zero in the contract. They enter the cross sum only, which does not
  count where the high sum is not finite; and there it is not.
- Two warpgroups share a tile by rows of B if it has 128 of them, else by rows of A.

Few columns of the output occupy every SM only in tiles of 32 rows of B, half of what `wgmma` reads. `FoldedPlan` folds them:
the 64 rows of the instruction are those of two chunks of K, one below the other, and its columns are the 8 rows of A of both
chunks, side by side. Of its result

            A, chunk 0   A, chunk 1
    B, 0    chains 0     not used
    B, 1    not used     chains 1

the second block moves up to the rows of the first by way of shared memory, and both are added up there. What the lower rows
hold is never stored. A tile of A is so small that a warpgroup of its own cuts it, stage by stage, while another multiplies:
no kernel has to run before this one.
"""

import math
from collections.abc import Callable, Iterator
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
from jaxlib.mlir.dialects import llvm

from bi_jax import exact
from bi_jax.gemm.mosaic_kernel import (
    ROWS,
    SHARED_MEMORY,
    SWIZZLE,
    TILE,
    Chains,
    Multiply,
    Operand,
    Plan,
    copy_bias,
    first_tile,
    full_array,
    plain_rows,
    promoted_chains,
    store_rows,
    tiled_smem,
)
from bi_jax.gemm.split import split
from bi_jax.index import affine
from shared_specs import ptx
from shared_specs.contract import Float32Split

Ref = Any

FLOAT32_SLAB = SWIZZLE // 4
"""Elements of K in a swizzled row of float32."""
HALVES = 2
"""Slabs of float32 in a chunk of K."""
CUTTING_REGISTERS = 104
"""Registers per thread of the warpgroup that cuts A."""


@dataclass(frozen=True)
class RegisterSplitPlan(Plan):
    """A plan whose `rhs` is float32 and whose accumulators are transposed: [rows of B, rows of A]."""

    @property
    def lhs(self) -> Operand:
        s = self.schedule
        return Operand(s.block_m, self.slab, self.slabs, s.stages, True, 0, self.parts, self.operand_dtype)

    @property
    def rhs(self) -> Operand:
        s = self.schedule
        return Operand(s.block_n, FLOAT32_SLAB, s.block_k // FLOAT32_SLAB, s.stages, True, 0, 1, jnp.dtype("float32"))

    @property
    def split_rows(self) -> bool:
        return self.schedule.block_n == ROWS * self.warpgroups

    @property
    def rows(self) -> int:
        return ROWS

    @property
    def cols(self) -> int:
        return self.schedule.block_m // (1 if self.split_rows else self.warpgroups)

    @property
    def bias_shape(self) -> tuple[int, int]:
        """A warpgroup's bias in shared memory, not transposed."""
        return (self.cols if self.bias_rows else 1, ROWS)

    @property
    def chunks_in_flight(self) -> int:
        """As many as have their parts and their accumulators in about 128 registers."""
        return max(1, 128 // (48 + self.fold * self.cols))

    @property
    def crowded(self) -> bool:
        return self.warpgroups > 1 or self.cols > 32

    def out_smem(self) -> Any:
        return plgpu.SMEM((self.warpgroups, self.cols, ROWS), self.out_dtype)

    @property
    def piece(self) -> int:
        return self.cols

    @property
    def out_slots(self) -> int:
        return 1

    def check(self) -> None:
        s, rule = self.schedule, self.contract.split
        if rule is None or not self.transpose_rhs:
            raise ValueError("this kernel splits a float32 B with K innermost")
        if rule.promote_k != self.slab or s.block_k % self.slab or s.block_k > 256:
            raise ValueError(f"block_k must be a multiple of {rule.promote_k} up to 256, got {s.block_k}")
        if self.contract.k_leaves != 1:
            raise ValueError(f"the kernel evaluates one leaf of K, the contract has {self.contract.k_leaves}")
        if not s.swap or s.loads != "tma" or s.warps not in (4, 8):
            raise ValueError(f"this kernel swaps, loads by TMA and computes with 4 or 8 warps, got {s}")
        self.check_tile()
        if self.shared_memory() > SHARED_MEMORY:
            raise ValueError(f"needs {self.shared_memory()} bytes of shared memory, there are {SHARED_MEMORY}: {s}")

    def check_tile(self) -> None:
        """Raise ValueError for a tile that this kernel does not have."""
        s = self.schedule
        if s.block_n not in (ROWS, ROWS * self.warpgroups) or s.block_m % 8 or self.cols % 8 or not 8 <= self.cols <= 64:
            raise ValueError(f"a warpgroup's tile must be 8 j up to 64 by 64, got {s.block_m} by {s.block_n}, {s.warps} warps")

    def compute(
        self, bias: Ref | None, out: Ref, scratch: dict[str, Ref], wg: Any, first: Any, steps: int, at: tuple[Any, Any, Any]
    ) -> None:
        rule = self.contract.split
        assert rule is not None
        batch, tile_m, tile_n = at
        row, col = (wg, 0) if self.split_rows else (0, wg)
        block_m, block_n = self.schedule.block_m, self.schedule.block_n
        corner = (batch, affine(tile_m, block_m, affine(col, self.cols)), affine(tile_n, block_n, affine(row, ROWS)))
        if bias is not None:
            copy_bias(self, bias, scratch, wg, corner)

        def chunk(slot: Any, index: int) -> Multiply:
            halves = [affine(slot, self.rhs.slabs, HALVES * index + half) for half in range(HALVES)]
            rows = [pl.ds(affine(half, self.rhs.block, affine(row, ROWS)), ROWS) for half in halves]
            b_smem = scratch["b_smem"]
            b = jnp.concatenate([plgpu.load(b_smem.at[half], layout=plgpu.Layout.WGMMA) for half in rows], axis=1)
            b_parts = _split(b, rule)

            def multiply(acc: Ref, i_part: int, j_part: int) -> None:
                a_part = self.lhs_part(scratch, slot, i_part, index, col)
                plgpu.wgmma(acc, b_parts[j_part], a_part.transpose((1, 0)))

            return multiply

        _store(self, self.product(scratch, first, steps, chunk), bias, out, scratch, wg, corner)

    def lhs_part(self, scratch: dict[str, Ref], slot: Any, part: int, index: int, col: Any) -> Ref:
        """What a warpgroup multiplies of a part of A, for the `index`-th `fold` chunks of a stage."""
        return self.lhs.tile(scratch["a_smem"], slot, part, index, col, self.cols)

    def product(self, scratch: dict[str, Ref], first: Any, steps: int, chunk: Callable[[Any, int], Multiply]) -> jax.Array:
        """A warpgroup's part of the product."""
        return promoted_chains(self, scratch["full"], scratch["empty"], first, steps, chunk)

    def out_tile(self, scratch: dict[str, Ref], wg: Any) -> tuple[Ref, Ref]:
        """Shared memory for a warpgroup's accumulator, transposed, and the part of it that is stored."""
        tile = scratch["out_smem"].at[wg]
        return tile, tile


@dataclass(frozen=True)
class FoldedOperand(Operand):
    """A float32 operand of which `fold` chunks of K lie one below the other, `block // fold` rows each."""

    fold: int

    @property
    def copies(self) -> int:
        return self.fold * super().copies

    def load(self, gmem: Ref, smem: Ref, barrier: Ref, slot: Any, batch: Any, row: Any, k: Any) -> None:
        source, rows = gmem.at[batch if gmem.shape[0] > 1 else 0], self.block // self.fold
        for j in range(self.fold * self.slabs):
            chunk, half = divmod(j, HALVES)
            index, place = divmod(chunk, self.fold)
            to = plain_rows(smem, self._first_tile(slot, 0, HALVES * index + half, place * rows // TILE), rows)
            of = source.at[pl.ds(row, rows), pl.ds(affine(k, 1, j * self.slab), self.slab)]
            plgpu.copy_gmem_to_smem(of, to, barrier)


@dataclass(frozen=True)
class FoldedPlan(RegisterSplitPlan):
    """A plan for 8 rows of A and 32 of B; `lhs` is float32, too, all four chunks of a stage one below the other."""

    @property
    def fold(self) -> int:
        return ROWS // self.schedule.block_n

    @property
    def lhs(self) -> Operand:
        """The cutting warpgroup loads 64 rows of it at a time, of which the first `block` count."""
        rows = self.slabs * self.schedule.block_m
        overhang, dtype = max(ROWS - rows, 0), jnp.dtype("float32")
        return FoldedOperand(rows, FLOAT32_SLAB, HALVES, self.schedule.stages, True, overhang, 1, dtype, self.slabs)

    @property
    def lhs_parts(self) -> Operand:
        """A in its parts, and what a store of 64 rows writes below the last one."""
        rows, parts = self.fold * self.schedule.block_m, self.parts + 1
        return Operand(rows, self.slab, self.slabs // self.fold, self.schedule.stages, True, 0, parts, self.operand_dtype)

    @property
    def rhs(self) -> Operand:
        slabs, stages = HALVES * self.slabs // self.fold, self.schedule.stages
        return FoldedOperand(ROWS, FLOAT32_SLAB, slabs, stages, True, 0, 1, jnp.dtype("float32"), self.fold)

    @property
    def chains_shape(self) -> tuple[int, int]:
        """Of the array by way of which two chains move up, and what is read below it."""
        return (2 * ROWS + self.schedule.block_n, self.cols)

    @property
    def crowded(self) -> bool:
        return True

    @property
    def cutting(self) -> int:
        return 1

    def scratch(self) -> dict[str, Any]:
        parts = self.lhs_parts
        return super().scratch() | {
            "a_parts_smem": tiled_smem(parts.shape, parts.dtype, parts.slab),
            "chains_smem": plgpu.SMEM(self.chains_shape, jnp.float32),
            "cut": plgpu.Barrier(num_barriers=self.schedule.stages),
        }

    def shared_memory(self) -> int:
        return super().shared_memory() + self.lhs_parts.bytes + 4 * math.prod(self.chains_shape)

    def out_smem(self) -> Any:
        return tiled_smem((self.cols, ROWS), self.out_dtype, self.schedule.block_n)

    def check_tile(self) -> None:
        s = self.schedule
        if (s.block_m, s.block_n, s.block_k, s.warps) != (8, 32, 256, 4):
            raise ValueError(f"a tile of fewer than {ROWS} rows of B must be 8 by 32 by 256, of 4 warps, got {s}")

    def cut_lhs(self, scratch: dict[str, Ref], steps: Any) -> None:
        rule, rows, stored = self.contract.split, self.lhs.block, self.lhs_parts
        assert rule is not None
        plgpu.set_max_registers(CUTTING_REGISTERS, action="decrease")

        def step(k: Any, _: None) -> None:
            slot = lax.rem(k, np.int32(self.schedule.stages))
            plgpu.barrier_wait(scratch["full"].at[slot])
            halves = [scratch["a_smem"].at[pl.ds(affine(slot, HALVES * rows, i * rows), ROWS)] for i in range(HALVES)]
            a = jnp.concatenate([plgpu.load(half, layout=plgpu.Layout.WGMMA) for half in halves], axis=1)
            for part, value in enumerate(_split(a, rule)):
                # The 64 rows of a store reach into the next part, which comes later.
                store_rows(scratch["a_parts_smem"], affine(slot, stored.parts * rows // TILE, part * rows // TILE), value)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch["cut"].at[slot])

        lax.fori_loop(0, steps, step, None)

    def lhs_part(self, scratch: dict[str, Ref], slot: Any, part: int, index: int, col: Any) -> Ref:
        return self.lhs_parts.tile(scratch["a_parts_smem"], slot, part, index, 0, self.lhs_parts.block)

    def product(self, scratch: dict[str, Ref], first: Any, steps: int, chunk: Callable[[Any, int], Multiply]) -> jax.Array:
        unfold = partial(_unfold, self, scratch["chains_smem"])
        return promoted_chains(self, scratch["cut"], scratch["empty"], first, steps, chunk, unfold)

    def out_tile(self, scratch: dict[str, Ref], wg: Any) -> tuple[Ref, Ref]:
        return scratch["out_smem"], first_tile(scratch["out_smem"], self.schedule.block_n)


def _unfold(plan: FoldedPlan, smem: Ref, chains: Chains) -> Iterator[Chains]:
    """The chains of both chunks in two accumulators, from the first row on."""
    high, cross = chains[0], chains[1]()
    _store_chains(smem, high[:, plan.cols :], cross[:, plan.cols :])

    def second(i: int) -> jax.Array:
        moved = smem.at[pl.ds(i * ROWS + plan.schedule.block_n, ROWS)]
        return plgpu.load(moved, layout=plgpu.Layout.WGMMA, optimized=False)

    yield high[:, : plan.cols], lambda: cross[:, : plan.cols]
    yield second(0), partial(second, 1)


def _store_chains(smem: Ref, *chains: jax.Array) -> None:
    """Store register arrays one below the other. An assignment would load what was there before, too."""
    if exact.is_emulated():
        smem[: len(chains) * ROWS] = jnp.concatenate(chains)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plgpu.Layout.WGMMA] * len(chains)))
    def store(_: Any, ref: ir.Value, *chains: mgpu.FragmentedArray) -> None:
        mgpu.warpgroup_barrier()
        for i, chain in enumerate(chains):
            chain.store_untiled(mgpu.memref_slice(ref, slice(i * ROWS, (i + 1) * ROWS)), optimized=False)
        mgpu.warpgroup_barrier()

    store(smem, *chains)


def _split(x: jax.Array, rule: Float32Split) -> list[jax.Array]:
    """The parts of a register array, `split` in PTX; interpret mode runs `split`."""
    if exact.is_emulated():
        return split(x, rule)
    assert (rule.part, rule.parts) == ("bfloat16", 3), rule
    part = plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=[part] * 3)
    def instructions(_: Any, array: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
        registers = [np.empty_like(array.registers) for _ in range(3)]
        for i in np.ndindex(array.registers.shape):
            for to, value in zip(registers, _split_pair(array.registers[i]), strict=True):
                to[i] = value
        return [mgpu.FragmentedArray(_registers=r, _layout=array.layout, _is_signed=None) for r in registers]

    return instructions(x)


def _split_pair(pair: ir.Value) -> list[ir.Value]:
    i32 = ir.IntegerType.get_signless(32)
    elements = [llvm.extractelement(pair, llvm.mlir_constant(ir.IntegerAttr.get(i32, i))) for i in range(2)]
    struct = llvm.StructType.get_literal([i32] * 3)
    parts = llvm.inline_asm(struct, elements, ptx.SPLIT, ptx.SPLIT_REGISTERS, has_side_effects=False)
    bf16_pair = ir.VectorType.get((2,), ir.BF16Type.get())
    return [llvm.bitcast(bf16_pair, llvm.extractvalue(i32, parts, [i])) for i in range(3)]


def _store(
    plan: RegisterSplitPlan,
    value: jax.Array,
    bias: Ref | None,
    out: Ref,
    scratch: dict[str, Ref],
    wg: Any,
    corner: tuple[Any, Any, Any],
) -> None:
    """alpha * acc + beta * bias, transposed and stored; TMA drops what lies outside."""
    batch, row, col = corner
    if plan.alpha != 1:
        value = exact.mul(value, full_array(value.shape, plan.alpha))
    if bias is not None:
        plgpu.barrier_wait(scratch["bias_full"].at[wg])
        addend = _bias(plan, scratch["bias_smem"].at[wg])
        if plan.beta != 1:
            addend = exact.mul(addend, full_array(value.shape, plan.beta))
        value = exact.add(value, addend)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile, source = plan.out_tile(scratch, wg)
    tile.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(source, out.at[batch, pl.ds(row, plan.cols), pl.ds(col, source.shape[1])])


def _bias(plan: Plan, bias: Ref) -> jax.Array:
    """A warpgroup's bias as [rows of B, rows of A]."""
    if plan.bias_rows:
        turned = plgpu.load(bias.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        return plgpu.layout_cast(turned, plgpu.Layout.WGMMA)
    one = plgpu.load(bias.at[0], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(one, (ROWS, plan.cols), (0,))
