"""PyTorch == JAX == the reference model on a CPU: the same bits for the same buffers, forward and backward."""

import functools

import jax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bi_jax
import bi_torch
from bi_bridge import to_jax as share
from bi_bridge import to_torch as from_jax
from shared_specs.formats import FORMATS
from shared_specs.inputs import KINDS
from tests.arrays import DTYPES, NAMES, assert_same, draw, model
from tests.calls import CALLS
from tests.model_engines import model_engines

ALIGNMENT = 64
"""Bytes at which JAX can share a CPU tensor's memory."""


def aligned(x):
    """A copy of x in memory that JAX can share."""
    memory = torch.empty(x.numel() + ALIGNMENT, dtype=x.dtype)
    start = -memory.data_ptr() % ALIGNMENT // x.element_size()
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


def tensors(*shapes, dtype="bfloat16", kind="normal", seed=0):
    return [aligned(draw(*shape, dtype=dtype, kind=kind, seed=seed + i)) for i, shape in enumerate(shapes)]


def in_jax(function, *args):
    """A function of JAX arrays, on the tensors' own memory."""
    return from_jax(jax.jit(function)(*map(share, args)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_kind_of_value(dtype, kind):
    """With a bias of the same kind, and without; one shape, so that JAX compiles once."""
    bias, a, b = tensors((5,), (7, 70), (70, 5), dtype=dtype, kind=kind)
    addmm = ADDMM[dtype]
    expected = model(a, b, bias, alpha=0.3, beta=-1.7, out_dtype=torch.float32)
    assert_same(bi_torch.addmm(bias, a, b, alpha=0.3, beta=-1.7, out_dtype=torch.float32), expected)
    assert_same(from_jax(addmm(*map(share, (bias, a, b)))), expected)


ADDMM = {dtype: jax.jit(functools.partial(bi_jax.addmm, alpha=0.3, beta=-1.7, out_dtype="float32")) for dtype in FORMATS}


@settings(max_examples=6, deadline=None)
@given(
    dtype=st.sampled_from(list(FORMATS)),
    wide_out=st.booleans(),
    wide_bias=st.booleans(),
    bias_shape=st.sampled_from(["none", "n", "1n", "m1", "mn", "scalar"]),
    m=st.integers(1, 40),
    k=st.integers(0, 150),
    n=st.integers(1, 40),
    alpha=st.sampled_from([1.0, 0.3, -2.0]),
    beta=st.sampled_from([1.0, 0.0, -1.7]),
)
def test_random_calls(dtype, wide_out, wide_bias, bias_shape, m, k, n, alpha, beta):
    """Each, which JAX compiles once, on every kind of value."""
    out_dtype = torch.float32 if wide_out else DTYPES[dtype]
    shape = {"none": None, "n": (n,), "1n": (1, n), "m1": (m, 1), "mn": (m, n), "scalar": ()}[bias_shape]
    scalars = {} if shape is None else {"alpha": alpha, "beta": beta}
    op = "mm" if shape is None else "addmm"
    in_jax = jax.jit(functools.partial(getattr(bi_jax, op), **scalars, out_dtype=NAMES[out_dtype]))
    for kind in KINDS:
        a, b = tensors((m, k), (k, n), dtype=dtype, kind=kind)
        bias = [] if shape is None else tensors(shape, dtype="float32" if wide_bias else dtype, kind=kind, seed=7)
        expected = model(a, b, bias[0] if bias and beta else None, **scalars, out_dtype=out_dtype)
        assert_same(getattr(bi_torch, op)(*bias, a, b, **scalars, out_dtype=out_dtype), expected)
        assert_same(from_jax(in_jax(*map(share, (*bias, a, b)))), expected)


PRODUCTS = {**CALLS, "matmul of vectors": ((40,), (2, 40, 5))}


@pytest.mark.parametrize(
    ("name", "dtype", "scalars"),
    [
        ("addmm", "bfloat16", {"alpha": 0.3, "beta": -1.7}),
        ("baddbmm", "bfloat16", {}),
        ("linear", "float16", {}),
        ("linear", "float32", {}),
    ],
)
def test_outputs_and_gradients(name, dtype, scalars):
    check_gradients(name, dtype, scalars)


@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_and_gradients_by_the_model(name):
    """Which products, of which matrices: the reference model is JAX's engine, so that XLA has little to compile."""
    with model_engines():
        check_gradients(name, "bfloat16", {})


def check_gradients(name, dtype, scalars):
    op = name.split()[0]
    args = [x.requires_grad_() for x in tensors(*PRODUCTS[name], dtype=dtype, kind="wide")]
    out = getattr(bi_torch, op)(*args, **scalars)
    (cotangent,) = tensors(out.shape, dtype=dtype, seed=9)
    expected = torch.autograd.grad(out, args, cotangent)

    def pull_back(g, *args):
        out, pullback = jax.vjp(functools.partial(getattr(bi_jax, op), **scalars), *args)
        return out, pullback(g)

    result, grads = jax.jit(pull_back)(*map(share, (cotangent, *args)))
    assert_same(from_jax(result), out.detach())
    for ours, theirs in zip(expected, grads, strict=True):
        assert_same(from_jax(theirs), ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_second_order_gradients(dtype):
    """Of the gradient of a weight, which JAX keeps transposed."""
    x, weight = (y.requires_grad_() for y in tensors((4, 20), (5, 20), dtype=dtype, kind="wide"))
    g, h = tensors((4, 5), (5, 20), dtype=dtype, kind="wide", seed=7)
    (grad,) = torch.autograd.grad(bi_torch.linear(x, weight), weight, g, create_graph=True)
    (second,) = torch.autograd.grad(grad, x, h)

    def first(x, weight, g):
        return jax.vjp(lambda weight: bi_jax.linear(x, weight), weight)[1](g)[0]

    theirs = in_jax(lambda x, weight, g, h: jax.vjp(lambda x: first(x, weight, g), x)[1](h)[0], x, weight, g, h)
    assert_same(theirs, second)


def test_a_chain_of_layers():
    """Two layers with a float32 head: each framework runs all of it on one copy of the weights."""
    x, w1, b1, w2, w3 = tensors((9, 40), (64, 40), (64,), (40, 64), (30, 40))
    hidden = bi_torch.linear(bi_torch.linear(x, w1, b1).relu(), w2)
    logits = bi_torch.linear(hidden, w3, out_dtype=torch.float32)

    def forward(x, w1, b1, w2, w3):
        hidden = bi_jax.linear(jax.nn.relu(bi_jax.linear(x, w1, b1)), w2)
        return bi_jax.linear(hidden, w3, out_dtype="float32")

    assert_same(in_jax(forward, x, w1, b1, w2, w3), logits)
