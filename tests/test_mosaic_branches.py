"""What Mosaic kernels are lowered from, beside their results: no conversion of a bool, which makes Mosaic start ptxas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params

from bi_jax.branch import when
from bi_jax.gemm import mosaic as gemm
from bi_jax.rows import embedding_kernel
from bi_jax.rows import mosaic as rows
from shared_specs import gemm_contract
from shared_specs.programs import norm, softmax
from shared_specs.row_schedule import RowSchedule


def product(dtype, m):
    run = functools.partial(gemm.gemm, contract=gemm_contract(dtype), transpose_rhs=True)
    return run, ((1, m, 512), dtype), ((1, 1024, 512), dtype)


def row_softmax(n, schedule=None):
    def run(x):
        return rows.run_rows(softmax.SOFTMAX, {"x": x}, {}, {"y": "bfloat16"}, schedule=schedule)

    return run, ((300, n), "bfloat16")


def column_sum(x):
    return rows.run_columns(norm.COLUMN_SUM, {"x": x}, {}, {"y": "float32"})


KERNELS = {
    "product": product("bfloat16", 8),
    "product of float32": product("float32", 512),
    "product of float32, split in registers": product("float32", 8),
    "short rows": row_softmax(100),
    "rows of waiting segments": row_softmax(16_384),
    "rows of several warpgroups": row_softmax(16_384, RowSchedule(warps=8)),
    "rows of several blocks": row_softmax(151_936, RowSchedule(warps=16, blocks_per_row=2)),
    "columns": (column_sum, ((5000, 300), "float32")),
    "embedding": (
        functools.partial(embedding_kernel.gradient, rows=100, out_dtype=jnp.dtype("float32")),
        ((300, 64), "float32"),
        ((300,), "int32"),
        ((300,), "int32"),
    ),
}


def conversions(jaxpr, inside=False):
    """The operations of kernels in a jaxpr that convert bools."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name == "convert_element_type" and eqn.invars[0].aval.dtype == jnp.bool_:
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from conversions(inner, inside or eqn.primitive.name == "mpmd_map")


@pytest.mark.parametrize("name", KERNELS)
def test_no_bool_is_converted(name):
    run, *arguments = KERNELS[name]
    jaxpr = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(*x) for x in arguments))
    assert "mpmd_map" in str(jaxpr)
    assert not list(conversions(jaxpr.jaxpr))


def test_when():
    @jax.jit
    def run(x):
        ref = jax.new_ref(x)

        def double():
            ref[...] = 2 * ref[...]

        when(x > 2)(double)
        when(True)(double)
        when(False)(double)
        return ref[...]

    np.testing.assert_array_equal([run(jnp.int32(x)) for x in (2, 3)], [4, 12])
