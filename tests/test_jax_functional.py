"""`bi_jax.functional`: the names, arguments and bits of `bi_torch.functional`."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bi_jax
import bi_torch.functional
from bi_jax import functional
from bi_jax.functional import BatchInvariantOps
from tests import test_jax_transformations
from tests.arrays import to_bits
from tests.test_frameworks_rows import to_jax
from tests.test_functional import CASES, METHODS

by_the_model = test_jax_transformations.by_the_model


def in_jax(arguments):
    return [to_jax(x) if isinstance(x, torch.Tensor) else "float32" if x is torch.float32 else x for x in arguments]


def assert_same(actual, expected):
    """A JAX array and a tensor."""
    assert (actual.shape, actual.dtype.name) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch."))
    bits = to_bits(expected)
    np.testing.assert_array_equal(np.asarray(actual).view(bits.dtype), bits)


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", CASES)
def test_function(name, by_the_model):
    arguments, expected = CASES[name]
    assert_same(jax.jit(lambda: getattr(functional, name)(*in_jax(arguments)))(), expected())
    assert parameters(getattr(functional, name)) == parameters(getattr(bi_torch.functional, name))


@pytest.mark.parametrize("name", METHODS)
def test_the_container_counts(name, by_the_model):
    arguments, rows, elements = METHODS[name]
    ops = BatchInvariantOps(jnp.float16)
    result = getattr(ops, name)(*in_jax(arguments))
    assert_same(result, getattr(bi_torch.functional.BatchInvariantOps(), name)(*arguments))
    assert ops.get_stats() == {name: {"calls": 1, "rows": rows, "elements": elements}}
    names = [name for name, _, _ in parameters(getattr(ops, name))]
    assert names == [name for name, _, _ in parameters(getattr(bi_torch.functional.BatchInvariantOps(), name))]
    ops.reset_stats()
    assert ops.get_stats() == {}


def test_the_container_in_threads_and_under_jit(by_the_model):
    """Under jit a call counts when it is traced."""
    ops = BatchInvariantOps()
    f = jax.jit(lambda x: ops.mean(x, 0))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ops.mean(jnp.ones(4), 0), range(8)))
    assert ops.get_stats()["mean"]["calls"] == 8
    f(jnp.ones(5))
    f(jnp.ones(5))
    assert ops.get_stats()["mean"] == {"calls": 9, "rows": 9, "elements": 9}


def test_dtypes(by_the_model):
    ops = BatchInvariantOps("float16")
    assert ops.gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
    assert ops.gelu(np.ones(3)).dtype == jnp.float16
    assert functional.mean_dim(jnp.arange(4), 0).dtype == jnp.float32
    with pytest.raises(TypeError, match=r"bi_jax.BatchInvariantOps: dtype must be one of .*, got int32"):
        BatchInvariantOps("int32")
    with pytest.raises(TypeError, match="bi_jax.mm_batch_invariant: out must be None"):
        functional.mm_batch_invariant(jnp.ones((2, 2)), jnp.ones((2, 2)), out=jnp.ones((2, 2)))
    assert bi_jax.functional is functional
