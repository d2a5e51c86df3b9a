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
"""

from dataclasses import dataclass
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
    Multiply,
    Operand,
    Plan,
    copy_bias,
    full_array,
    promoted_chains,
)
from bi_jax.gemm.split import split
from bi_jax.index import affine
from shared_specs import ptx
from shared_specs.contract import Float32Split

Ref = Any

FLOAT32_SLAB = SWIZZLE // 4
"""Elements of K in a swizzled row of float32."""


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
        return max(1, 128 // (48 + self.cols))

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
        if s.block_n not in (ROWS, ROWS * self.warpgroups) or s.block_m % 8 or self.cols % 8 or not 8 <= self.cols <= 64:
            raise ValueError(f"a warpgroup's tile must be 8 j up to 64 by 64, got {s.block_m} by {s.block_n}, {s.warps} warps")
        if self.shared_memory() > SHARED_MEMORY:
            raise ValueError(f"needs {self.shared_memory()} bytes of shared memory, there are {SHARED_MEMORY}: {s}")

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
            halves = [affine(slot, self.rhs.slabs, 2 * index + half) for half in range(2)]
            rows = [pl.ds(affine(half, self.rhs.block, affine(row, ROWS)), ROWS) for half in halves]
            b_smem = scratch["b_smem"]
            b = jnp.concatenate([plgpu.load(b_smem.at[half], layout=plgpu.Layout.WGMMA) for half in rows], axis=1)
            b_parts = _split(b, rule)

            def multiply(acc: Ref, i_part: int, j_part: int) -> None:
                a_part = self.lhs.tile(scratch["a_smem"], slot, i_part, index, col, self.cols)
                plgpu.wgmma(acc, b_parts[j_part], a_part.transpose((1, 0)))

            return multiply

        acc = promoted_chains(self, scratch["full"], scratch["empty"], first, steps, chunk)
        _store(self, acc, bias, out, scratch, wg, corner)


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
    plan: Plan, value: jax.Array, bias: Ref | None, out: Ref, scratch: dict[str, Ref], wg: Any, corner: tuple[Any, Any, Any]
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
    tile = scratch["out_smem"].at[wg]
    tile.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out.at[batch, pl.ds(row, plan.cols), pl.ds(col, ROWS)])


def _bias(plan: Plan, bias: Ref) -> jax.Array:
    """A warpgroup's bias as [rows of B, rows of A]."""
    if plan.bias_rows:
        turned = plgpu.load(bias.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        return plgpu.layout_cast(turned, plgpu.Layout.WGMMA)
    one = plgpu.load(bias.at[0], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(one, (ROWS, plan.cols), (0,))
