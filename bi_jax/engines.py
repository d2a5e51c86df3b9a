"""What the primitives of this package have in common: types, engines by platform, evaluation outside of jit.

The engine is chosen by the platform that a computation is lowered for, whatever devices this machine has: a CPU engine, or
Mosaic kernels for CUDA. Other platforms raise. Inside `jax.shard_map` an operation runs on the shards of a device; an array
that is sharded in its type, over an axis of an explicit mesh that is not manual, raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, PartitionSpec, use_abstract_mesh

from bi_jax.platforms import ARCHITECTURE, check_capability

Shape = tuple[int, ...]


def varying(arrays: Sequence[Any]) -> list[Any]:
    """The arrays, marked in their types as varying over each manual mesh axis that one of them varies over; None stays.

    The marks have gradients: that of an array which all devices share is summed over them.
    """
    axes: dict[str, None] = {}
    for x in arrays:
        axes |= dict.fromkeys(sorted(_varying_axes(x)))

    def mark(x: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in _varying_axes(x))
        return x if x is None or not missing else lax.pcast(x, missing, to="varying")

    return [mark(x) for x in arrays]


def _varying_axes(x: Any) -> frozenset[str]:
    return frozenset() if x is None else jax.typeof(x).manual_axis_type.varying


def result_type(name: str, shape: Shape, dtype: Any, operands: Sequence[Any]) -> core.ShapedArray:
    """The type of a result of the operation `name` on operands of these types."""
    for x in operands:
        if any(axis is not None for axis in x.sharding.spec):
            raise NotImplementedError(
                f"bi_jax.{name}: an operand is sharded over an explicit mesh axis, {x.str_short(short_dtypes=True)}; "
                "use jax.shard_map"
            )
    like = max(operands, key=lambda x: not x.sharding.mesh.empty)
    sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=like.manual_axis_type)


def define(primitive: Primitive, name: Callable[..., str], on_cpu: Callable[..., Any], on_cuda: Callable[..., Any]) -> None:
    """Lower `primitive` to functions of arrays and its parameters, and evaluate it as a jitted function outside of jit.

    Args:
        primitive: with `abstract_eval` defined; its parameters are hashable.
        name: of the operation, from the parameters.
        on_cpu: the CPU engine.
        on_cuda: the CUDA engine.
    """

    def unsupported(ctx: mlir.LoweringRuleContext, *_: Any, **params: Any) -> Any:
        raise NotImplementedError(
            f"bi_jax: no {name(**params)} for {ctx.module_context.platforms}: supported are cpu and cuda ({ARCHITECTURE})"
        )

    def checked(*operands: jax.Array, **params: Any) -> Any:
        check_capability()
        return on_cuda(*operands, **params)

    jitted = jax.jit(lambda operands, params: primitive.bind(*operands, **dict(params)), static_argnums=1)

    def evaluated(*operands: jax.Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # a primitive has no other way to be computed
            return jitted(operands, tuple(sorted(params.items())))

    primitive.def_impl(evaluated)
    mlir.register_lowering(primitive, unsupported)
    for platform, engine in (("cpu", _isolated(on_cpu)), ("cuda", checked)):
        mlir.register_lowering(primitive, lowering(engine, primitive.multiple_results), platform=platform)


def _isolated(engine: Callable[..., Any]) -> Callable[..., Any]:
    """`engine` behind barriers. Fused with other operations on its patterns, its arithmetic takes LLVM minutes to compile."""

    def run(*operands: jax.Array, **params: Any) -> Any:
        return lax.optimization_barrier(engine(*lax.optimization_barrier(operands), **params))

    return run


def lowering(engine: Callable[..., Any], multiple_results: bool) -> Any:
    """The lowering rule that runs `engine`. An engine knows no mesh: it sees the shards of a device as its arrays."""
    lower = mlir.lower_fun(engine, multiple_results=multiple_results)

    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        local = [core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in if isinstance(x, core.ShapedArray)]
        with use_abstract_mesh(AbstractMesh((), ())):
            return lower(ctx.replace(avals_in=local), *operands, **params)

    return rule
