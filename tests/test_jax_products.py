"""Products of `bi_jax`: how operands broadcast, gradients and vmap. The reference model is the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bi_jax
from tests.calls import CALLS
from tests.model_engines import model_engines
from tests.test_jax_api import STOCK, arguments, assert_same, draw, model


@pytest.fixture(scope="module", autouse=True)
def _by_the_model():
    with model_engines():
        yield


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((7,), (7,)),
        ((7,), (7, 5)),
        ((4, 7), (7,)),
        ((7,), (3, 7, 5)),
        ((3, 4, 7), (7, 5)),
        ((1, 4, 7), (3, 7, 5)),
        ((2, 1, 4, 7), (3, 7, 5)),
        ((2, 3, 4, 7), (2, 3, 7, 5)),
        ((0, 4, 7), (7, 5)),
        ((2, 0, 4, 7), (1, 7, 5)),
        ((0,), (0,)),
        ((3, 4, 0), (0, 5)),
    ],
)
def test_matmul_broadcasts_as_jnp_does(left, right):
    a, b = draw(*left), draw(*right, seed=1)
    shape = np.matmul(np.zeros(left), np.zeros(right)).shape
    wide_a, wide_b = (a[None] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)
    assert_same(bi_jax.matmul(a, b), model(wide_a, wide_b).reshape(shape))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7)])
def test_linear_takes_any_number_of_dimensions(shape):
    x, weight, bias = draw(*shape), draw(5, 7, seed=1), draw(5, seed=2)
    expected = model(x[None] if x.ndim == 1 else x, weight.T, bias).reshape(*shape[:-1], 5)
    assert_same(bi_jax.linear(x, weight, bias), expected)


@pytest.mark.parametrize(("op", "dtype"), [*((op, "bfloat16") for op in CALLS), ("linear", "float32")])
def test_gradients(op, dtype):
    """Against JAX's own products in float64; the bound is a few roundings of the products and of the operand dtype."""
    args = arguments(op, dtype)
    out, pullback = jax.vjp(getattr(bi_jax, op), *args)
    g = draw(*out.shape, dtype=dtype, seed=9)
    actual = jax.jit(pullback)(g)
    with jax.enable_x64(True):
        stock = {"linear": lambda x, w, c: x @ w.T + c}.get(op, STOCK[op] if len(args) == 3 else jnp.matmul)
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*args, g)]
        pull_back = jax.jit(lambda *x: jax.vjp(stock, *x[:-1])[1](x[-1]))
        expected, terms = (pull_back(*x) for x in (wide, [abs(x) for x in wide]))
        expected, terms = [np.asarray(x) for x in expected], [np.asarray(x) for x in terms]
    chain = 2.0**-21 if dtype == "float32" else 2.0**-18
    for x, got, want, size in zip(args, actual, expected, terms, strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        bound = float(jnp.finfo(dtype).eps) * abs(want) + chain * size
        assert (abs(np.asarray(got, np.float64) - want) <= bound).all()


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_gradients_of_empty_extents(m, k, n):
    a, b, bias = draw(m, k), draw(k, n, seed=1), draw(m, n, seed=2)
    grads = jax.grad(lambda *args: bi_jax.addmm(*args, out_dtype="float32").sum(), argnums=(0, 1, 2))(bias, a, b)
    assert [g.shape for g in grads] == [(m, n), (m, k), (k, n)]
    assert not any(np.asarray(g, np.float32).any() for g in grads[1:])


def test_gradients_are_products_under_the_contract():
    a, b, bias, g = draw(6, 20), draw(20, 5, seed=1), draw(5, seed=2), draw(6, 5, seed=3)
    _, pullback = jax.vjp(functools.partial(bi_jax.addmm, alpha=0.3, beta=1.7), bias, a, b)
    grad_bias, grad_a, grad_b = pullback(g)
    assert_same(grad_a, model(g, b.T, alpha=0.3))
    assert_same(grad_b, model(a.T, g, alpha=0.3))
    assert_same(grad_bias, model(jnp.ones((1, 6), g.dtype), g, alpha=1.7)[0])


def test_gradient_of_float32_outputs_is_rounded_to_the_operands_dtype():
    a, b, g = draw(6, 20), draw(20, 5, seed=1), draw(6, 5, dtype="float32", seed=3)
    _, pullback = jax.vjp(lambda a: bi_jax.mm(a, b, out_dtype="float32"), a)
    assert_same(pullback(g)[0], model(g.astype(a.dtype), b.T))


def test_second_order_gradients():
    """Reverse over reverse."""
    a, b = draw(4, 7, dtype="float32"), draw(3, 7, 5, dtype="float32", seed=1)

    def second(matmul, a, b):
        def first(a, b):
            grads = jax.grad(lambda a, b: jnp.square(matmul(a, b)).sum(), argnums=(0, 1))(a, b)
            return sum((g**3).sum() for g in grads)

        return jax.grad(first, argnums=(0, 1))(a, b)

    actual = jax.jit(functools.partial(second, bi_jax.matmul))(a, b)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in (a, b))
        expected = [np.asarray(x) for x in second(jnp.matmul, *wide)]
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 2), (-1, None)])
def test_vmap(axes):
    shapes = [(4, 7), (7, 5)]
    a, b = (
        draw(*s, seed=i) if axis is None else jnp.moveaxis(draw(3, *s, seed=i), 0, axis)
        for i, (s, axis) in enumerate(zip(shapes, axes, strict=True))
    )
    stacked = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip((a, b), axes, strict=True))
    assert_same(jax.jit(jax.vmap(bi_jax.mm, axes))(a, b), model(*stacked))


def test_vmap_over_biases_batches_and_twice():
    a, b, bias = draw(3, 4, 7), draw(3, 7, 5, seed=1), draw(3, 5, seed=2)
    assert_same(jax.vmap(bi_jax.addmm)(bias, a, b), model(a, b, bias[:, None]))
    assert_same(jax.vmap(bi_jax.addmm, (0, None, None))(bias, a[0], b[0]), model(a[0], b[0], bias[:, None]))
    assert_same(jax.vmap(bi_jax.addmm, (None, 0, None))(bias[0], a, b[0]), model(a, b[0], bias[0]))
    twice = jax.vmap(jax.vmap(bi_jax.mm, (None, 0)), (0, None))(a, b)
    assert_same(twice, model(a[:, None], b[None]))
    batched = jax.vmap(bi_jax.bmm, (None, 0))(a, jnp.stack([b, b[::-1]]))
    assert_same(batched, model(a, jnp.stack([b, b[::-1]])))
    assert jax.vmap(bi_jax.mm)(jnp.zeros((0, 2, 3)), jnp.zeros((0, 3, 4))).shape == (0, 2, 4)
