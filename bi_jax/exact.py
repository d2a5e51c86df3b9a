"""float32 arithmetic inside Mosaic GPU kernels that is rounded to nearest once and never contracted.

Mosaic leaves `a * b + c` to ptxas, which fuses it into one rounding. Inline PTX with `.rn` is final. Interpret mode cannot
run PTX and XLA on a CPU flushes subnormals, so under `emulated` a host function evaluates the same operations.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

Evaluate = Callable[[np.ufunc, np.ndarray, np.ndarray], np.ndarray]

_evaluate: ContextVar[Evaluate | None] = ContextVar("evaluate", default=None)


@contextlib.contextmanager
def emulated(evaluate: Evaluate) -> Iterator[None]:
    """In kernels traced in this context, `evaluate(ufunc, x, y)` on the host stands for each operation."""
    token = _evaluate.set(evaluate)
    try:
        yield
    finally:
        _evaluate.reset(token)


def is_emulated() -> bool:
    """The kernel is traced for interpret mode: inline PTX needs a stand-in."""
    return _evaluate.get() is not None


def add(x: jax.Array, y: jax.Array, layout: plgpu.Layout = plgpu.Layout.WGMMA) -> jax.Array:
    """x + y, float32 register arrays of one shape and of `layout`."""
    return _binary("add.rn.f32", np.add, x, y, layout)


def sub(x: jax.Array, y: jax.Array, layout: plgpu.Layout = plgpu.Layout.WGMMA) -> jax.Array:
    """x - y, float32 register arrays of one shape and of `layout`."""
    return _binary("sub.rn.f32", np.subtract, x, y, layout)


def mul(x: jax.Array, y: jax.Array, layout: plgpu.Layout = plgpu.Layout.WGMMA) -> jax.Array:
    """x * y, float32 register arrays of one shape and of `layout`."""
    return _binary("mul.rn.f32", np.multiply, x, y, layout)


def _binary(ptx: str, ufunc: np.ufunc, x: jax.Array, y: jax.Array, layout: plgpu.Layout) -> jax.Array:
    if evaluate := _evaluate.get():
        return jax.pure_callback(functools.partial(evaluate, ufunc), jax.ShapeDtypeStruct(x.shape, jnp.float32), x, y)
    out = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=out)
    def instruction(_: Any, a: mgpu.FragmentedArray, b: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = np.empty_like(a.registers)
        for i in np.ndindex(registers.shape):
            registers[i] = _per_element(ptx, a.registers[i], b.registers[i])
        return mgpu.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    return instruction(x, y)


def _per_element(ptx: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """`ptx` on every element of two vector registers."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    result = llvm.mlir_undef(a.type)
    for i in range(ir.VectorType(a.type).shape[0]):
        at = llvm.mlir_constant(ir.IntegerAttr.get(i32, i))
        pair = [llvm.extractelement(a, at), llvm.extractelement(b, at)]
        element = llvm.inline_asm(f32, pair, f"{ptx} $0, $1, $2;", "=f,f,f", has_side_effects=False)
        result = llvm.insertelement(result, element, at)
    return result
