"""bi_jax.batch_invariant: what it replaces, enters and composes with, on a CPU."""

import functools
import inspect
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec

import bi_jax
from bi_jax.transform import reset_uncovered, uncovered_counts
from bi_jax.transform.coverage import Options
from bi_jax.transform.rewrite import rewritten
from tests import test_jax_transformations
from tests.sharding import mesh_of, sharded

by_the_model = test_jax_transformations.by_the_model

invariant = bi_jax.batch_invariant
portable = functools.partial(bi_jax.batch_invariant, portable=True)


def draw(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same(actual, expected):
    """Equal in structure, shapes, dtypes and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (got, want)))


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in those inside it."""
    names = set()
    for eqn in jaxpr.eqns:
        names |= {eqn.primitive.name}.union(*map(primitives, jaxprs_in_params(eqn.params)))
    return names


STOCK = {"dot_general", "reduce_sum", "reduce_max", "exp", "log", "tanh"}


def left_over(f, *arguments):
    """Stock primitives that are left in what `invariant(f)` compiles."""
    return primitives(rewritten(jax.make_jaxpr(f)(*arguments), Options())) & STOCK


# ---------------------------------------------------------------------------------------------------------- the promise


def block(params, tokens):
    """Log-probabilities, in plain JAX."""
    x = params["embedding"][tokens]
    return jax.nn.log_softmax((x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))) @ params["head"].T)


@pytest.fixture(scope="module")
def params():
    return {"embedding": draw(50, 256, dtype="float32"), "head": draw(40, 256, dtype="float32", seed=1)}


def test_gradients_and_vmap_commute_with_it(params, by_the_model):
    def loss(params, tokens):
        return block(params, tokens)[:, 0].sum()

    tokens = np.arange(4)
    want = invariant(jax.value_and_grad(loss, argnums=0))(params, tokens)
    assert_same(jax.value_and_grad(invariant(loss))(params, tokens), want)
    rows = invariant(block)(params, tokens)
    assert_same(jax.vmap(invariant(block), (None, 0))(params, tokens), rows)
    assert_same(invariant(jax.vmap(block, (None, 0)))(params, tokens), rows)
    assert not left_over(jax.grad(invariant(loss)), params, tokens)


def test_higher_derivatives(by_the_model):
    x = draw(3, 4, dtype="float32")

    def f(x):
        return jnp.sum(jnp.tanh(x @ x.T)[0])

    for derivative in (jax.hessian, jax.linearize):
        got, want = (
            derivative(g)(f_x) if derivative is not jax.linearize else derivative(g, f_x)[0]
            for g, f_x in ((invariant(f), x), (f, x))
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- what it enters

W = draw(8, 8, seed=7)


@jax.custom_jvp
def own_jvp(x):
    return x @ W


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), tangents[0] @ W * 2))


@jax.custom_vjp
def own_vjp(x):
    return x @ W


own_vjp.defvjp(lambda x: (own_vjp(x), x), lambda x, g: (g @ W.T + x.sum(),))

PROGRAMS = {
    "jit": lambda x: jax.jit(lambda x: x @ W)(x),
    "scan": lambda x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.stack([W, W]))[0],
    "while": lambda x: lax.while_loop(lambda s: jnp.sum(s[1]) < 30, lambda s: (s[0] + 1, jnp.abs(s[1] @ W)), (0, x))[1],
    "fori": lambda x: lax.fori_loop(0, 2, lambda _, x: x @ W, x),
    "map": lambda x: lax.map(lambda row: row @ W, x),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ W, lambda x: x + x.sum(), x),
    "switch": lambda x: lax.switch(1, [lambda x: x, lambda x: x @ W, lambda x: x + x.sum()], x),
    "custom_jvp": own_jvp,
    "custom_vjp": own_vjp,
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ W) @ W)(x),
    "checkpoint of the transformed": lambda x: jax.checkpoint(invariant(lambda x: jnp.tanh(x @ W)))(x),
    "nested": lambda x: invariant(lambda x: lax.scan(lambda c, _: (jax.jit(jnp.tanh)(c @ W), None), x, None, length=2)[0])(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_entered(name, by_the_model):
    """Nothing is left inside; gradients and vmap commute with it; results are close to the stock ones."""
    f, x = PROGRAMS[name], draw(3, 8)
    transformed = invariant(f)
    result = transformed(x)
    np.testing.assert_allclose(result.astype("float32"), jax.jit(f)(x).astype("float32"), rtol=0.05, atol=0.1)
    assert not left_over(f, x)
    assert_same(jax.vmap(transformed)(x[None])[0], result)
    assert_same(invariant(jax.vmap(f))(x[None])[0], result)
    if name != "while":

        def loss(f):
            return lambda x: f(x).astype("float32").sum()

        assert_same(jax.jit(jax.grad(loss(transformed)))(x), invariant(jax.grad(loss(f)))(x))
        assert not left_over(jax.grad(loss(f)), x)


@pytest.mark.parametrize(
    ("kind", "check_vma"), [*itertools.product((AxisType.Auto, AxisType.Explicit), (True, False))], ids=str
)
def test_shard_map(kind, check_vma, by_the_model):
    """Inside and outside of it: the bits of one device."""
    x = draw(16, 8)

    def f(x, w):
        return jax.nn.softmax(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0])

    w = jnp.stack([W, W])
    want = invariant(f)(x, w)
    assert_same(sharded(invariant(f), x, w, kind, check_vma), want)
    assert_same(sharded(f, x, w, kind, check_vma, transform=invariant), want)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no vma"])
def test_sums_over_devices(check_vma, by_the_model):
    """Of the parts of all devices in their order; a gradient of what the devices share is such a sum."""
    mesh = mesh_of(AxisType.Auto)
    x, cases = draw(2 * jax.device_count(), 8), (PartitionSpec("x"), PartitionSpec())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=cases, out_specs=PartitionSpec(), check_vma=check_vma)
    def loss(x, w):
        return lax.psum(jnp.square(x @ w).astype("float32").sum(), "x")

    parts = [
        invariant(jax.value_and_grad(lambda w, x: jnp.square(x @ w).astype("float32").sum()))(W, x[i : i + 2])
        for i in range(0, len(x), 2)
    ]
    want = jax.tree.map(lambda *each: bi_jax.sum(jnp.stack(each), 0), *parts)
    assert_same(invariant(jax.value_and_grad(loss, 1))(x, W), want)
    assert_same(jax.value_and_grad(invariant(loss), 1)(x, W), want)
    total = [row for row in bi_jax.explain(loss, x, W).rows if row.primitive.startswith("psum")]
    assert [row.contract.startswith("devices in order, sum-v3-") for row in total] == [True]


def test_sums_over_an_axis_of_vmap(by_the_model):
    x = draw(5, 8)
    want = bi_jax.sum(x, 0)
    for f in (
        jax.vmap(invariant(lambda row: lax.psum(row, "i")), axis_name="i"),
        invariant(jax.vmap(lambda row: lax.psum(row, "i"), axis_name="i")),
    ):
        assert_same(f(x), jnp.stack([want] * 5))


def test_names_of_inner_functions_stay():
    f = invariant(lambda x: jax.jit(jnp.tanh)(x))
    assert "tanh" in f.lower(jnp.ones(3)).as_text(debug_info=True)


# ------------------------------------------------------------------------------------------------------ how it is called


def test_decorator_static_arguments_and_pytrees(by_the_model):
    @bi_jax.batch_invariant
    def plain(x):
        """A docstring."""
        return x @ x.T

    @bi_jax.batch_invariant(portable=True, static_argnums=1, static_argnames=("scale",))
    def configured(tree, axis, *, scale=1.0):
        return {"sum": tree["x"].sum(axis) * scale, "none": None, "list": [tree["y"][0], 3]}

    class Model:
        @bi_jax.batch_invariant(static_argnums=0)
        def __call__(self, x):
            return x.sum(-1)

    x = draw(4, 8)
    assert plain.__doc__ == "A docstring."
    assert inspect.signature(plain).parameters.keys() == {"x"}
    assert_same(plain(x), bi_jax.mm(x, x.T))
    got = configured({"x": x, "y": (x, 1)}, 0, scale=2.0)
    assert_same(got["sum"], bi_jax.sum(x, 0) * 2)
    assert got["none"] is None
    assert int(got["list"][1]) == 3
    assert_same(Model()(x), bi_jax.sum(x, -1))
    captured = jax.grad(lambda w: invariant(lambda x: (x @ w).astype("float32").sum())(x))(W)  # closes over a tracer
    assert_same(captured, jax.grad(lambda w: bi_jax.mm(x, w).astype("float32").sum())(W))


def test_ahead_of_time_and_without_jit(by_the_model):
    x = draw(4, 8)
    f = invariant(lambda x: x.sum(-1))
    assert_same(f.lower(x).compile()(x), bi_jax.sum(x, -1))
    with jax.disable_jit():
        assert_same(f(x), bi_jax.sum(x, -1))


# ----------------------------------------------------------------------------------------------------- what it replaces


DOTS = {
    "mm": ((3, 20), (20, 5), (((1,), (0,)), ((), ()))),
    "stored transposed": ((20, 3), (5, 20), (((0,), (1,)), ((), ()))),
    "batch": ((2, 3, 20), (2, 20, 5), (((2,), (1,)), ((0,), (0,)))),
    "batch anywhere": ((3, 2, 20), (20, 5, 2), (((2,), (0,)), ((1,), (2,)))),
    "two contracted": ((4, 3, 5), (5, 4, 6), (((0, 2), (1, 0)), ((), ()))),
    "many free": ((2, 3, 20), (20, 2, 2), (((2,), (0,)), ((), ()))),
    "vectors": ((20,), (20,), (((0,), (0,)), ((), ()))),
    "nothing contracted": ((3,), (4,), (((), ()), ((), ()))),
    "empty": ((3, 0), (0, 4), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", DOTS)
def test_dot_general(name, by_the_model):
    """Against the product of matrices that NumPy arranges."""
    a, b, numbers = DOTS[name]
    (ka, kb), (ba, bb) = numbers
    lhs, rhs = draw(*a), draw(*b, seed=1)

    def matrices(x, batch, contracted, last):
        free = [d for d in range(x.ndim) if d not in (*batch, *contracted)]
        order = (*batch, *free, *contracted) if last else (*batch, *contracted, *free)
        k = int(np.prod([x.shape[d] for d in contracted]))
        moved = np.asarray(x).transpose(order)
        shape = [x.shape[d] for d in batch], [x.shape[d] for d in free]
        rows = int(np.prod(shape[1]))
        return moved.reshape(*shape[0], *((rows, k) if last else (k, rows))), shape

    (x, (batch, rows)), (y, (_, columns)) = matrices(lhs, ba, ka, True), matrices(rhs, bb, kb, False)
    want = bi_jax.matmul(x, y).reshape(*batch, *rows, *columns)
    assert_same(invariant(lambda a, b: lax.dot_general(a, b, numbers))(lhs, rhs), want)


def test_types_and_precision_of_products(by_the_model):
    x, y = draw(3, 20), draw(20, 5, seed=1)
    wide = x.astype("float32")
    product = functools.partial(lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
    cases = [
        (x, y, {"preferred_element_type": "float32"}, bi_jax.mm(x, y, out_dtype="float32")),
        (wide, y, {}, bi_jax.mm(wide, y.astype("float32"))),
        (wide, wide.T, {"preferred_element_type": "bfloat16"}, bi_jax.mm(wide, wide.T).astype("bfloat16")),
        (wide, wide.T, {"precision": "highest"}, bi_jax.mm(wide, wide.T)),
        (wide, wide.T, {"precision": "BF16_BF16_F32"}, bi_jax.mm(wide, wide.T)),
    ]
    for a, b, options, want in cases:
        assert_same(invariant(functools.partial(product, **options))(a, b), want)
    integers = jnp.arange(12).reshape(3, 4)
    assert_same(invariant(lambda x: x @ x.T)(integers), integers @ integers.T)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2), ()], ids=str)
def test_reductions(axes, by_the_model):
    x = draw(5, 3, 7, dtype="float32")
    got = invariant(lambda x: (lax.reduce_sum(x, axes), lax.reduce_max(x, axes), lax.reduce_min(x, axes)))(x)
    want = (bi_jax.sum(x, axes), bi_jax.amax(x, axes), bi_jax.amin(x, axes)) if axes else (x, x, x)
    assert_same(got, want)


def test_extremes_follow_the_contract(by_the_model):
    x = jnp.array([[0.0, -0.0, -1], [-0.0, 0.0, 1], [1, np.nan, np.inf]])
    assert_same(invariant(lambda x: (x.max(-1), x.min(-1)))(x), (bi_jax.amax(x, -1), bi_jax.amin(x, -1)))


def test_what_is_exact_passes():
    """Integers and bools, logical reductions, argmax, sort, gather and scatter."""
    x = draw(4, 6, dtype="float32")

    def f(x):
        i = x.astype(jnp.int32)
        sums = i.sum(), jnp.cumsum(i), (x > 0).sum(), i @ i.T, i.at[jnp.array([0, 0])].add(1), i.prod()
        found = jnp.argmax(x, -1), jnp.sort(x, -1), (x > 0).any(-1), jnp.take_along_axis(x, i % 6, 1), lax.top_k(x, 2)
        return sums, found, x.at[1:3].set(0.0), jnp.concatenate([x, x])[::2], jax.random.bits(jax.random.key(0), (3,))

    assert_same(invariant(f)(x), jax.jit(f)(x))


# ------------------------------------------------------------------------------------------------------ what it refuses

UNCOVERED = {
    "conv_general_dilated": lambda x: lax.conv_general_dilated(x[None, None], x[None, None], (1, 1), "SAME"),
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x),
    "reduce_window_sum": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "VALID"),
    "fft": lambda x: jnp.fft.rfft(x),
    "cholesky": lambda x: jnp.linalg.cholesky(x @ x.T),
    "atan": jnp.arctan,
    "convert_element_type": lambda x: x * 1j,
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered(name):
    x = draw(4, 4, dtype="float32")
    with pytest.raises(bi_jax.UncoveredOperationError, match=rf"^{name}\(.*\) at .*test_transform.py:\d+.*does not cover it"):
        jax.jit(invariant(UNCOVERED[name])).trace(x)


def test_float64_is_not_covered():
    with jax.enable_x64(True):
        for f in (lambda x: x.sum(), lambda x: x @ x, lambda x: x + 1, jnp.exp):
            with pytest.raises(bi_jax.UncoveredOperationError, match=r"f64\[4,4\].*there is no contract for float64"):
                jax.jit(invariant(f)).trace(jnp.ones((4, 4)))


def test_warn_and_ignore():
    x = draw(4, 4, dtype="float32")

    def f(x):
        return jnp.cumsum(x, 0), jnp.cumsum(x, 1)

    reset_uncovered()
    with pytest.warns(bi_jax.UncoveredOperationWarning, match=r"cumsum\(f32\[4,4\]\) at") as caught:
        assert_same(invariant(f, on_uncovered="warn")(x), jax.jit(f)(x))
    assert len(caught) == 1
    assert uncovered_counts() == {"cumsum": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invariant(lambda x: f(x + 1), on_uncovered="ignore")(x)
    assert uncovered_counts() == {"cumsum": 1}
    with pytest.raises(ValueError, match="on_uncovered is one of raise, warn, ignore, not 'no'"):
        invariant(f, on_uncovered="no")


# ------------------------------------------------------------------------------------------------------------- explain


def test_explain():
    x = draw(2, 8)

    def f(x):
        return jnp.cumsum(jax.nn.softmax(x @ W), -1)

    rows = {row.primitive: row for row in bi_jax.explain(f, x).rows}
    assert rows["dot_general"].shapes == "bf16[2,8], bf16[8,8] -> bf16[2,8]"
    assert rows["dot_general"].contract.startswith("gemm-v1-bfloat16-")
    assert rows["exp"].contract.endswith(" on a CPU")
    assert rows["reduce_sum"].contract.startswith("sum-v3-")
    assert "test_transform.py" in rows["cumsum"].contract
    assert (rows["cumsum"].treatment, rows["div"].treatment, rows["broadcast_in_dim"].treatment) == (
        "uncovered",
        "pinned",
        "kept",
    )
    by_contract = bi_jax.explain(f, x, portable=True).rows
    assert {row.treatment for row in by_contract if row.primitive in ("exp", "div", "sub")} == {"contract"}
    twice = bi_jax.explain(invariant(lambda x: lax.scan(lambda c, _: (c @ W, None), x, None, length=3)[0] @ W), x)
    assert [row.count for row in twice.rows if row.primitive == "dot_general"] == [2]
    assert "dot_general" in str(twice)
    assert "broadcast_in_dim" not in str(twice)
    only = bi_jax.explain(lambda x: invariant(jnp.tanh)(jnp.sin(x)), x).rows
    assert [row.primitive for row in only] == ["tanh"]
