"""The row functions of PyTorch and JAX, on CPUs: the same bits, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bi_jax
import bi_torch
from bi_jax import transform
from bi_torch import mode
from shared_specs.formats import FORMATS
from tests.arrays import NAMES, draw, to_bits
from tests.row_calls import ROW_CALLS

CALLS = [call for call in ROW_CALLS if not call.name.endswith("_")]  # JAX has no functions that work in place


def to_jax(x):
    """Tensors, in lists too, with their bits; anything else as it is."""
    if isinstance(x, list):
        return [to_jax(y) for y in x]
    if not isinstance(x, torch.Tensor):
        return x
    return jnp.asarray(to_bits(x).view(jnp.dtype(NAMES[x.dtype])) if x.dtype in NAMES else x.numpy().astype(np.int32))


def leaves(x):
    """The outputs of a call; None is none."""
    return [x] if isinstance(x, torch.Tensor) else [y for part in x or () for y in leaves(part)]


def assert_same(actual, expected):
    assert (actual.shape, actual.dtype.name) == (tuple(expected.shape), NAMES[expected.dtype])
    np.testing.assert_array_equal(np.asarray(actual).view(to_bits(expected).dtype), to_bits(expected))


def test_every_function_is_in_both():
    functions = set(bi_torch.__all__) - set(mode.__all__)
    in_place = {name for name in functions if name.endswith("_")}
    assert set(bi_jax.__all__) - set(transform.__all__) - {"workspace_bytes"} == functions - in_place
    products = {"addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "scaled_dot_product_attention"}
    assert {call.name for call in ROW_CALLS} | products == functions


def call_in(module, call, tensors):
    options, tensors = dict(call.options), list(tensors)
    if "normalized_shape" in options:
        tensors.insert(1, options.pop("normalized_shape"))
    return getattr(module, call.name)(*tensors, **options)


def with_gradients(call, wanted):
    """A function (arguments, cotangents) -> (outputs, gradients of the wanted arguments), compiled once for all values."""

    @jax.jit
    def both(arguments, cotangents):
        def of(moved):
            return jax.tree.leaves(call_in(bi_jax, call, [moved.get(i, x) for i, x in enumerate(arguments)]))

        outputs, pullback = jax.vjp(of, {i: arguments[i] for i in wanted})
        return outputs, [pullback(cotangents)[0][i] for i in wanted] if wanted else []

    return both


def wanted_gradients(call):
    """Positions of the tensors that a gradient is asked for."""
    floats = [i for i, shape in enumerate(call.shapes) if shape is not None and call.ids != (i, *(call.ids or ())[1:])]
    return [i for i in floats if i not in call.fixed] if call.differentiable else []


@pytest.mark.parametrize(("call", "dtype"), [(call, list(FORMATS)[i % 3]) for i, call in enumerate(CALLS)], ids=str)
def test_outputs_and_gradients(call, dtype):
    wanted = wanted_gradients(call)
    both = with_gradients(call, wanted)
    for kind in ("normal", "wide", "bits"):
        args = call.arguments(dtype, kind)
        wide = to_jax(args)
        for i in wanted:
            args[i].requires_grad_()
        expected = leaves(call_in(bi_torch, call, args))
        cotangents = [draw(*y.shape, dtype=NAMES[y.dtype], kind=kind, seed=9 + i) for i, y in enumerate(expected)]
        gradients = torch.autograd.grad(expected, [args[i] for i in wanted], cotangents) if wanted else []
        outputs, pulled = both(wide, to_jax(cotangents))
        for got, want in zip((*outputs, *pulled), (*expected, *gradients), strict=True):
            assert_same(got, want)
