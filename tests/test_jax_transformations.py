"""Every op of `bi_jax` under every transformation of JAX, on a CPU: the bits of the op called by itself.

What is under test are types, rules and lowering, so NumPy's reference model stands for the CPU engines here: little to compile.
`test_jax_devices` has programs as XLA compiles them.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import bi_jax
from tests.arrays import draw
from tests.calls import CALLS
from tests.model_engines import model_engines, patterns
from tests.row_calls import ALIKE, ROW_CALLS, RowCall
from tests.sharding import sharded
from tests.test_frameworks_rows import call_in, to_jax

PRODUCTS = [RowCall(name, shapes) for name, shapes in CALLS.items()]
ROWS = {call.name: call for call in reversed(ROW_CALLS) if not call.name.endswith("_") and None not in call.shapes}
HEADS = ((2, 4, 3, 16), (2, 2, 3, 16), (2, 2, 3, 16))
ATTENTION = RowCall("scaled_dot_product_attention", HEADS, {"is_causal": True, "enable_gqa": True})
OPS = {call.name: call for call in (*PRODUCTS, ATTENTION)} | ROWS

FORWARD = {*CALLS, "sum", "mean", "softmax", "rotary_embedding", "embedding"}
FORWARD |= {"exp", "log", "sin", "cos", "erf", "tanh", "sigmoid", "rsqrt", "silu", "gelu"}
"""Ops that have a rule for forward-mode differentiation."""


def each_of(names):
    return pytest.mark.parametrize("name", names)


DIFFERENTIABLE = [name for name, call in OPS.items() if call.differentiable]


def test_every_op_is_here():
    others = {"batch_invariant", "explain", "workspace_bytes"}
    assert OPS.keys() == {name for name in bi_jax.__all__ if name.islower()} - others


@pytest.fixture(scope="module")
def by_the_model():
    with model_engines():
        yield


# ----------------------------------------------------------------------------------------------------------------- calls


def dtype_of(name):
    return "bfloat16" if name in CALLS else "float32"


def function(name):
    """The op as a function of its arrays."""
    call = OPS[name]
    if call.listed:
        return lambda *arrays: call_in(bi_jax, call, [list(arrays)])
    return lambda *arrays: call_in(bi_jax, call, arrays)


def loss(name):
    """A number that depends on each element of the results differently, and the results."""

    def value(*arrays):
        results = function(name)(*arrays)
        leaves = jax.tree.leaves(results)
        return sum(
            (y.astype("float32") * np.cos(np.arange(y.size, dtype="float32")).reshape(y.shape)).sum() for y in leaves
        ), results

    return value


def floats(name):
    """Positions of the arrays that have a gradient."""
    call = OPS[name]
    ids = call.ids[0] if call.ids else None
    return tuple(i for i in range(len(call.shapes)) if i != ids and i not in call.fixed)


def partially(name, arrays):
    """The op as a function of the arrays that have a gradient, with the others of `arrays`."""
    wanted = floats(name)
    return lambda *moved: function(name)(*(moved[wanted.index(i)] if i in wanted else x for i, x in enumerate(arrays)))


@functools.cache
def jitted(name):
    return jax.jit(function(name))


@functools.cache
def jitted_gradient(name):
    return jax.jit(jax.grad(loss(name), floats(name), has_aux=True))


def examples(name, count):
    """The arrays of `count` calls, each stacked along a new first dimension."""
    call = OPS[name]
    drawn = replace(call, shapes=tuple((count, *shape) for shape in call.shapes))
    arrays = to_jax(drawn.arguments(dtype_of(name)))
    return [np.asarray(x) for x in (arrays[0] if call.listed else arrays)]


def arguments(name):
    return [np.asarray(x[0]) for x in examples(name, 1)]


def assert_same(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(patterns(got), patterns(want))


def stacked(results):
    return jax.tree.map(lambda *each: np.stack(each), *results)


# ------------------------------------------------------------------------------------------------------- transformations


@each_of(OPS)
def test_jit_and_compilation_ahead_of_time_with_a_donated_buffer(name, by_the_model):
    arrays = arguments(name)
    expected = function(name)(*arrays)
    assert_same(jitted(name)(*arrays), expected)
    given = [jnp.asarray(x) for x in arrays]
    reused = (given[0].shape, given[0].dtype) in [(y.shape, y.dtype) for y in jax.tree.leaves(expected)]
    compiled = jax.jit(function(name), donate_argnums=(0,) if reused else ()).lower(*given).compile()
    assert_same(compiled(*given), expected)
    assert given[0].is_deleted() == reused


@each_of(DIFFERENTIABLE)
def test_gradients(name, by_the_model):
    """value_and_grad under jit, and the gradient under jax.checkpoint, are the pullback."""
    arrays, wanted = arguments(name), floats(name)
    results, pullback = jax.vjp(partially(name, arrays), *(arrays[i] for i in wanted))
    weights = jax.tree.map(lambda y: np.cos(np.arange(y.size, dtype="float32")).reshape(y.shape).astype(y.dtype), results)
    gradients = pullback(weights)
    assert any(np.asarray(g, np.float32).any() for g in gradients)

    @jax.jit
    def both(*arrays):
        (_, results), gradients = jax.value_and_grad(loss(name), wanted, has_aux=True)(*arrays)
        return results, gradients, jax.grad(jax.checkpoint(loss(name)), wanted, has_aux=True)(*arrays)[0]

    assert_same(both(*arrays), (results, gradients, gradients))


@each_of(DIFFERENTIABLE)
def test_forward_mode(name, by_the_model):
    """Where there is a rule, tangents are dual to gradients; the others say so, when evaluated or lowered."""
    arrays, wanted = arguments(name), floats(name)
    of = partially(name, arrays)
    primals = [arrays[i] for i in wanted]
    tangents = [np.asarray(to_jax(draw(*x.shape, dtype=dtype_of(name), seed=5))) for x in primals]
    push = lambda p, t: jax.jvp(of, p, t)  # noqa: E731
    if name not in FORWARD:
        for evaluate in (push, jax.jit(push)):
            with pytest.raises(TypeError, match=rf"bi_jax\.{name}: no forward-mode derivative"):
                evaluate(primals, tangents)
        return
    out, moved = jax.jit(push)(primals, tangents)
    assert_same(out, jitted(name)(*arrays))
    g = np.asarray(to_jax(draw(*out.shape, dtype=dtype_of(name), seed=6)))
    gradients = jax.jit(lambda p, g: jax.vjp(of, *p)[1](g))(primals, g)
    dot = lambda x, y: float((np.asarray(x, np.float64) * np.asarray(y, np.float64)).sum())  # noqa: E731
    size = float(np.linalg.norm(np.asarray(g, np.float64)) * np.linalg.norm(np.asarray(moved, np.float64)))
    dual = sum(dot(x, y) for x, y in zip(gradients, tangents, strict=True))
    assert abs(dot(g, moved) - dual) <= float(jnp.finfo(out.dtype).eps) * size


@each_of([name for name in OPS if name not in ALIKE])
def test_vmap_over_each_argument(name, by_the_model):
    arrays = examples(name, 2)
    given = [[x if j == i else x[0] for j, x in enumerate(arrays)] for i in range(len(arrays))]
    each = [[jitted(name)(*(x[e] if j == i else x for j, x in enumerate(g))) for e in range(2)] for i, g in enumerate(given)]
    axes = [[0 if j == i else None for j in range(len(arrays))] for i in range(len(arrays))]
    mapped = jax.jit(lambda given: [jax.vmap(function(name), a)(*g) for a, g in zip(axes, given, strict=True)])
    assert_same(mapped(given), [stacked(results) for results in each])


@each_of([name for name in OPS if name not in ALIKE])
def test_vmap_nested(name, by_the_model):
    """Over all arguments in the last dimension, and over the first argument alone within."""
    arrays = examples(name, 4)
    first = arrays[0].reshape(2, 2, *arrays[0].shape[1:])
    rest = [x[:2] for x in arrays[1:]]
    expected = stacked([stacked([jitted(name)(first[i, j], *(x[i] for x in rest)) for j in range(2)]) for i in range(2)])
    inner = jax.vmap(function(name), (0, *[None] * len(rest)))
    outer = jax.jit(jax.vmap(inner, (-1, *[-1] * len(rest))))
    assert_same(outer(*(np.moveaxis(x, 0, -1) for x in (first, *rest))), expected)


@each_of([name for name in DIFFERENTIABLE if name not in ALIKE])
def test_vmap_of_a_gradient(name, by_the_model):
    arrays = examples(name, 2)
    each = [jitted_gradient(name)(*(x[i] for x in arrays)) for i in range(2)]
    assert_same(jax.vmap(jitted_gradient(name))(*arrays), stacked(each))


@each_of([name for name in DIFFERENTIABLE if name not in ALIKE])
def test_gradient_of_a_vmap(name, by_the_model):
    """What examples share has the sum over them; beside an example whose cotangent is 0, the gradient is the other's."""
    arrays, wanted = examples(name, 2), floats(name)
    of_one, _ = jitted_gradient(name)(*(x[0] for x in arrays))
    axes = [None if i in wanted[1:] else 0 for i in range(len(arrays))]

    def of_both(*moved):
        values, _ = jax.vmap(loss(name), axes)(*moved)
        return (values * np.array([1, 0], np.float32)).sum()

    gradients = jax.jit(jax.grad(of_both, wanted))(*(x if axis == 0 else x[0] for x, axis in zip(arrays, axes, strict=True)))
    for got, want in zip((gradients[0][0], *gradients[1:]), of_one, strict=True):
        assert_same(np.asarray(got) + np.zeros_like(got), np.asarray(want) + np.zeros_like(want))  # a sum has no -0


@each_of([name for name in OPS if name not in ALIKE])
def test_loops(name, by_the_model):
    arrays = examples(name, 3)
    each = [jitted(name)(*(x[i] for x in arrays)) for i in range(3)]

    @jax.jit
    def loops(arrays):
        def step(state):
            i, _ = state
            return i + 1, function(name)(*(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in arrays))

        start = 0, jax.tree.map(jnp.zeros_like, each[0])
        scanned = jax.lax.scan(lambda carry, x: (carry, function(name)(*x)), 0, arrays)[1]
        return scanned, jax.lax.while_loop(lambda state: state[0] < 3, step, start)[1]

    assert_same(loops(arrays), (stacked(each), each[-1]))


def test_ops_under_shard_map(by_the_model):
    """One call a device: the first array is its own, the others are on every device. Gradients too."""
    arrays = {name: examples(name, jax.device_count()) for name in OPS if name not in ALIKE}
    first = {name: x[0] for name, x in arrays.items()}
    rest = {name: [y[0] for y in x[1:]] for name, x in arrays.items()}

    def all_ops(first, rest):
        results = {}
        for name in arrays:
            own = first[name].reshape(first[name].shape[1:])
            if 0 in floats(name) and OPS[name].differentiable:
                gradient = jax.grad(lambda x, name=name: loss(name)(x, *rest[name]), has_aux=True)
                results[name] = jax.tree.map(lambda y: y[None], gradient(own))
            else:
                results[name] = jax.tree.map(lambda y: y[None], function(name)(own, *rest[name]))
        return results

    actual = sharded(all_ops, first, rest, AxisType.Explicit, check_vma=True)
    for name in arrays:
        run = jitted(name)
        if 0 in floats(name) and OPS[name].differentiable:
            run = lambda *x, name=name: ((g := jitted_gradient(name)(*x))[0][0], g[1])  # noqa: E731
        assert_same(actual[name], stacked([run(x, *rest[name]) for x in first[name]]))
