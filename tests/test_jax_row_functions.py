"""The row functions of `bi_jax`: values, gradients, shapes, arguments and errors. The reference model is the engine."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bi_jax
from bi_jax.rows import embedding, embedding_kernel
from shared_specs.programs import pointwise
from tests.interpreters.mosaic import interpreted
from tests.model_engines import model_engines
from tests.test_jax_rows import assert_same, draw


@pytest.fixture(scope="module", autouse=True)
def _by_the_model():
    """That the engine has the model's bits is the business of other tests."""
    with model_engines():
        yield


ROW_FUNCTIONS = {name for name in bi_jax.__all__ if getattr(bi_jax, name).__module__.startswith("bi_jax.rows.")}

STOCK = {
    "sum": (lambda x: bi_jax.sum(x, (0, 2)), lambda x: jnp.sum(x, (0, 2))),
    "mean": (lambda x: bi_jax.mean(x, -2, keepdim=True), lambda x: jnp.mean(x, -2, keepdims=True)),
    "amax": (lambda x: bi_jax.amax(x, 1), lambda x: jnp.max(x, 1)),
    "amin": (lambda x: bi_jax.amin(x), lambda x: jnp.min(x)),
    "var": (lambda x: bi_jax.var(x, (1, 2), correction=2), lambda x: jnp.var(x, (1, 2), ddof=2)),
    "logsumexp": (lambda x: bi_jax.logsumexp(x, 1), lambda x: jax.nn.logsumexp(x, 1)),
    "softmax": (lambda x: bi_jax.softmax(x, 0), lambda x: jax.nn.softmax(x, 0)),
    "log_softmax": (lambda x: bi_jax.log_softmax(x, 1), lambda x: jax.nn.log_softmax(x, 1)),
    "token_logprobs": (
        lambda x: bi_jax.token_logprobs(x, TARGET, 0.7),
        lambda x: jnp.take_along_axis(jax.nn.log_softmax(x / 0.7), TARGET[..., None], -1)[..., 0],
    ),
    "cross_entropy": (
        lambda x: bi_jax.cross_entropy(x.reshape(12, 10), TARGET.reshape(12), ignore_index=3, label_smoothing=0.1),
        lambda x: smoothed_loss(x.reshape(12, 10), TARGET.reshape(12)),
    ),
    "layer_norm": (
        lambda x: bi_jax.layer_norm(x, (4, 10), x[0], x[1]),
        lambda x: (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5) * x[0] + x[1],
    ),
    "rms_norm": (
        lambda x: bi_jax.rms_norm(x, (10,), x[0, 0], 1e-3),
        lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * x[0, 0],
    ),
    "fused_add_rms_norm": (
        lambda x: sum(bi_jax.fused_add_rms_norm(x, x[::-1])),
        lambda x: (lambda h: h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) + h)(x + x[::-1]),
    ),
    "embedding": (lambda x: bi_jax.embedding(TARGET, x.reshape(12, 10)), lambda x: x.reshape(12, 10)[TARGET]),
    "gelu": (lambda x: bi_jax.gelu(x, "tanh") + bi_jax.gelu(x), lambda x: jax.nn.gelu(x) + jax.nn.gelu(x, approximate=False)),
    "silu_mul": (lambda x: bi_jax.silu_mul(x, x[::-1]), lambda x: jax.nn.silu(x) * x[::-1]),
    "rotary_embedding": (
        lambda x: bi_jax.rotary_embedding(x, *TABLES) + bi_jax.rotary_embedding(x, *TABLES, interleaved=True),
        lambda x: rotated(x),
    ),
    "exp": (bi_jax.exp, jnp.exp),
    "log": (lambda x: bi_jax.log(abs(x) + 0.1), lambda x: jnp.log(abs(x) + 0.1)),
    "rsqrt": (lambda x: bi_jax.rsqrt(abs(x) + 0.1), lambda x: jax.lax.rsqrt(abs(x) + 0.1)),
    "erf": (bi_jax.erf, jax.scipy.special.erf),
    "tanh": (bi_jax.tanh, jnp.tanh),
    "sin": (bi_jax.sin, jnp.sin),
    "cos": (bi_jax.cos, jnp.cos),
    "sigmoid": (bi_jax.sigmoid, jax.nn.sigmoid),
    "silu": (bi_jax.silu, jax.nn.silu),
}
TARGET = jnp.asarray(np.random.default_rng(0).integers(0, 10, (3, 4)))
TABLES = tuple(jnp.asarray(f(np.arange(20.0)).reshape(4, 5), jnp.float32) for f in (np.cos, np.sin))


def smoothed_loss(x, target):
    log_probabilities = jax.nn.log_softmax(x)
    nll = -jnp.take_along_axis(log_probabilities, target[:, None], -1)[:, 0]
    losses = jnp.where(target == 3, 0, 0.9 * nll - 0.1 * log_probabilities.mean(-1))
    return losses.sum() / (target != 3).sum()


def rotated(x):
    cos, sin = TABLES

    def turn(a, b):
        return a * cos - b * sin, b * cos + a * sin

    halves, pairs = turn(x[..., :5], x[..., 5:]), turn(x[..., ::2], x[..., 1::2])
    return jnp.concatenate(halves, -1) + jnp.stack(pairs, -1).reshape(x.shape)


def test_every_function_is_tested():
    assert STOCK.keys() == ROW_FUNCTIONS - {"adamw", "sgd", "clip_by_global_norm", "rotary_tables"}


@pytest.mark.parametrize("name", STOCK)
def test_values_and_gradients(name):
    """Against jax.numpy in float64."""
    ours, stock = STOCK[name]
    x = draw(3, 4, 10, seed=5)
    g = draw(*jax.eval_shape(ours, x).shape, seed=6)

    def both(function):
        def run(x, g):
            y, pullback = jax.vjp(function, x)
            return y, pullback(g)[0]

        return jax.jit(run)

    actual = both(ours)(x, g)
    with jax.enable_x64(True):
        expected = jax.device_get(both(stock)(*(np.asarray(v, np.float64) for v in (x, g))))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * abs(want).max())


def test_gradients_of_half_inputs_have_their_dtypes():
    x, w, b = draw(5, 20, dtype="bfloat16"), draw(20, seed=1), draw(20, dtype="bfloat16", seed=2)
    grads = jax.grad(lambda *a: bi_jax.layer_norm(a[0], (20,), *a[1:]).astype(jnp.float32).sum(), argnums=(0, 1, 2))(x, w, b)
    assert [g.dtype.name for g in grads] == ["bfloat16", "float32", "bfloat16"]
    y = bi_jax.softmax(x, -1, dtype="float32")
    assert y.dtype == jnp.float32
    assert jax.grad(lambda x: bi_jax.softmax(x, -1, dtype=jnp.float32)[0, 0])(x).dtype == x.dtype


def test_vmap_folds_into_rows_or_maps():
    x, w = draw(3, 5, 20, kind="wide"), draw(3, 20, seed=1)
    norm_of = functools.partial(bi_jax.rms_norm, normalized_shape=(20,))
    one = lambda x, w: norm_of(x, weight=w)  # noqa: E731
    assert_same(jax.jit(jax.vmap(one, (0, None)))(x, w[0]), one(x, w[0]))
    each = jnp.stack([one(a, b) for a, b in zip(x, w, strict=True)])
    assert_same(jax.vmap(one)(x, w), each)
    assert_same(jax.vmap(lambda x: bi_jax.sum(x, 0), in_axes=1)(x), bi_jax.sum(x, 0))
    grads = jax.vmap(jax.grad(lambda w, x: one(x, w).sum()), (None, 0))(w[0], x)
    assert_same(grads, jnp.stack([jax.grad(lambda w, x=a: one(x, w).sum())(w[0]) for a in x]))
    ids = jnp.array([[0, 1, 0], [2, 2, 2], [4, 0, 9]])
    gradient = jax.grad(lambda w, ids: bi_jax.embedding(ids, w).sum())
    assert_same(jax.vmap(gradient, (0, 0))(x, ids), jnp.stack([gradient(a, b) for a, b in zip(x, ids, strict=True)]))


def test_vmap_over_scalars_and_ids():
    logits, temperatures = draw(4, 30), jnp.array([0.5, 1.0, 2.0])
    f = lambda t: bi_jax.token_logprobs(logits, jnp.arange(4), t)  # noqa: E731
    assert_same(jax.vmap(f)(temperatures), jnp.stack([f(t) for t in temperatures]))
    ids = jnp.arange(8).reshape(2, 4)
    g = lambda ids: bi_jax.token_logprobs(logits, ids)  # noqa: E731
    assert_same(jax.vmap(g)(ids), jnp.stack([g(i) for i in ids]))


def test_scan_checkpoint_and_donation():
    x, w = draw(3, 5, 20), draw(20, seed=1)

    def loss(w, x):
        return bi_jax.rms_norm(x, (20,), w).sum()

    expected = jnp.stack([jax.grad(loss)(w, a) for a in x])
    assert_same(jax.lax.scan(lambda carry, a: (carry, jax.grad(loss)(w, a)), 0, x)[1], expected)
    assert_same(jax.grad(jax.checkpoint(loss))(w, x[0]), expected[0])
    step = jax.jit(functools.partial(bi_jax.adamw, lr=1e-2), donate_argnums=(0, 2, 3))
    p, g, m, v = ({"w": draw(20, seed=s), "b": draw(3, 2, seed=s)} for s in range(4))
    v = jax.tree.map(abs, v)
    expected = bi_jax.adamw(p, g, m, v, 3, lr=1e-2)
    jax.tree.map(assert_same, step(*(jax.tree.map(jnp.copy, t) for t in (p, g, m, v)), jnp.int32(3)), expected)


def test_embedding_sums_in_token_order():
    """float32 sums that any other order would round otherwise, and ids that are no rows."""
    ids = jnp.array([1, 0, 1, 1, 7, 1, -1, 0])
    g = draw(8, 3, dtype="bfloat16", kind="wide")
    weight = jnp.zeros((4, 3), jnp.bfloat16)
    got = jax.vjp(lambda w: bi_jax.embedding(ids, w, padding_idx=0), weight)[1](g)[0]
    total = np.zeros(3, np.float32)
    for i in (0, 2, 3, 5):
        total = total + np.asarray(g[i], np.float32)
    expected = np.zeros((4, 3), np.float32)
    expected[1] = total
    assert_same(got, jnp.asarray(expected).astype(jnp.bfloat16))
    assert np.isnan(np.asarray(bi_jax.embedding(ids, weight), np.float32)).any(1).tolist() == [False] * 4 + [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("dtype", "d"), [("bfloat16", 1030), ("float32", 5)])
def test_the_gpu_kernel_of_the_embedding_gradient(dtype, d):
    """Longer runs than it has cotangents on their way, rows without tokens, ids that are no rows."""
    ids = jnp.array([1, 0, 1, 1, 7, 1, -1, 0, *([3] * 17)])
    g = draw(ids.size, d, dtype=dtype, kind="wide")
    options = {"rows": 5, "out_dtype": jnp.dtype(dtype)}
    with interpreted():
        got = jax.jit(lambda g, ids: embedding_kernel.gradient(g, *embedding._sorted_tokens(ids, 5), **options))(g, ids)
    assert_same(got, jax.jit(functools.partial(embedding._on_cpu, **options))(g, ids))


def test_optimizers_follow_their_definitions():
    p, g, m, v = (draw(6, seed=s) for s in range(4))
    v = abs(v)
    new, new_m, new_v = bi_jax.adamw(p, g, m, v, 2, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    p64, g64, m64, v64 = (np.asarray(x, np.float64) for x in (p, g, m, v))
    m64, v64 = 0.8 * m64 + 0.2 * g64, 0.9 * v64 + 0.1 * g64**2
    want = p64 * (1 - 0.01) - 0.1 * (m64 / (1 - 0.8**2)) / (np.sqrt(v64 / (1 - 0.9**2)) + 1e-3)
    for got, exact in ((new, want), (new_m, m64), (new_v, v64)):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
    assert_same(bi_jax.sgd(p, g, lr=0.1, momentum=0.9)[1], g)
    moved = bi_jax.sgd(p, g, g, lr=0.1, momentum=0.9, nesterov=True)[0]
    np.testing.assert_allclose(moved, p64 - 0.1 * 2.71 * g64, rtol=1e-4)
    assert bi_jax.sgd(p, g, lr=0.1)[1] is None
    clipped, norm_of = bi_jax.clip_by_global_norm({"a": p, "b": [g]}, 0.5)
    exact = math.sqrt((p64**2).sum() + (g64**2).sum())
    np.testing.assert_allclose(norm_of, exact, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"][0], g64 * 0.5 / (exact + 1e-6), rtol=1e-5)


def test_shapes():
    x = jnp.ones((2, 0, 3))
    assert bi_jax.sum(x, 1).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert np.isnan(bi_jax.mean(x, 1)).all()
    assert bi_jax.softmax(x, 1).shape == (2, 0, 3)
    assert bi_jax.amax(x, 0).shape == (0, 3)
    assert bi_jax.exp(x).shape == (2, 0, 3)
    assert bi_jax.sum(jnp.float32(3)).shape == ()
    assert bi_jax.softmax(jnp.float32(3), 0) == 1
    assert bi_jax.var(jnp.ones((1, 3)), 0).shape == (3,)
    assert bi_jax.sum(jnp.ones((2, 3, 4)), (-1, 0), keepdim=True).shape == (1, 3, 1)
    assert jax.grad(lambda x: bi_jax.mean(x, 1).sum())(x).shape == x.shape
    assert bi_jax.embedding(jnp.zeros((2, 0), jnp.int32), jnp.ones((4, 3))).shape == (2, 0, 3)
    cos, sin = bi_jax.rotary_tables(jnp.arange(6).reshape(2, 3), 8)
    assert cos.shape == sin.shape == (2, 3, 4)


def test_integers():
    x = np.array([[1 << 30, 5], [1 << 30, -7]], np.int32)
    assert bi_jax.sum(x, 1).tolist() == [(1 << 30) + 5, (1 << 30) - 7]
    assert bi_jax.sum(x > 0).dtype == jnp.int32
    assert bi_jax.sum(x, dtype="float32").dtype == jnp.float32
    assert bi_jax.amax(x, 0).tolist() == [1 << 30, 5]
    with jax.enable_x64(True):
        assert bi_jax.sum(x, 0).tolist() == [1 << 31, -2]
    with pytest.raises(TypeError, match=r"bi_jax\.mean: input must be bfloat16, float16 or float32, got int32"):
        bi_jax.mean(x)


X, IDS = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((3,), "int32")
ERRORS = [
    (lambda x: bi_jax.sum(x, 2), ValueError, r"sum: dim must be in -2\.\.1 for shape \(3, 4\), got 2"),
    (lambda x: bi_jax.mean(x, (0, -2)), ValueError, "mean: dim 0 appears twice"),
    (lambda x: bi_jax.softmax(x, "a"), TypeError, "softmax: dim must be int, got str"),
    (lambda x: bi_jax.softmax(x, 0, dtype="int32"), TypeError, "softmax: dtype must be bfloat16, float16 or float32"),
    (lambda x: bi_jax.sum(x, dtype="int32"), TypeError, "sum: dtype must be floating for input of float32"),
    (lambda x: bi_jax.amax(x[:, :0], 1), ValueError, r"amax: the reduced dimensions \(1,\) must not be empty"),
    (
        lambda x: bi_jax.token_logprobs(x, jnp.zeros(4, int)),
        ValueError,
        r"token_logprobs: ids must have shape \(3,\), got \(4,\)",
    ),
    (lambda x: bi_jax.token_logprobs(x, x[:, 0]), TypeError, "token_logprobs: ids must be int32 or int64, got float32"),
    (lambda x: bi_jax.token_logprobs(x, jnp.zeros(3, int), 0.0), ValueError, "token_logprobs: temperature must be"),
    (lambda x: bi_jax.cross_entropy(x, jnp.zeros(3, int), reduction="a"), ValueError, "cross_entropy: reduction must be"),
    (lambda x: bi_jax.layer_norm(x, 4), TypeError, "layer_norm: normalized_shape must be a sequence"),
    (lambda x: bi_jax.rms_norm(x, (3,)), ValueError, r"rms_norm: input must have shape \[\*, 3\], got \(3, 4\)"),
    (lambda x: bi_jax.rms_norm(x, (4,), x[0].astype("bfloat16")), TypeError, "rms_norm: weight must be float32"),
    (lambda x: bi_jax.fused_add_rms_norm(x, x[1:]), ValueError, r"fused_add_rms_norm: residual must have shape \(3, 4\)"),
    (lambda x: bi_jax.gelu(x, "exact"), ValueError, "gelu: approximate must be 'none' or 'tanh'"),
    (lambda x: bi_jax.silu_mul(x, x[0]), ValueError, r"silu_mul: up must have shape \(3, 4\), got \(4,\)"),
    (lambda x: bi_jax.rotary_embedding(x, x, x), ValueError, r"rotary_embedding: cos must broadcast to \(3, 2\)"),
    (lambda x: bi_jax.embedding(jnp.zeros(2, int), x[0]), ValueError, "embedding: weight must have 2 dimensions"),
    (lambda x: bi_jax.sgd(x, x, nesterov=True, lr=1), ValueError, "sgd: nesterov needs momentum"),
    (lambda x: bi_jax.sgd({"a": x}, [x], lr=1), ValueError, "sgd: grad must have the structure of param"),
    (lambda x: bi_jax.adamw(x, x, x, x, 0), ValueError, "adamw: step must be between 1"),
    (lambda x: bi_jax.clip_by_global_norm([], 1.0), ValueError, "clip_by_global_norm: grads must not be empty"),
    (lambda x: bi_jax.exp(1.0), TypeError, "exp: input must be an array, got float"),
    (lambda x: bi_jax.exp(np.ones(2)), TypeError, "exp: input must be .*, got float64"),
    (jax.grad(lambda x: bi_jax.sgd(x, x, lr=1)[0].sum()), TypeError, "sgd: no derivative with respect to g, p"),
    (jax.grad(lambda x: bi_jax.token_logprobs(x, jnp.zeros(3, int), x[0, 0]).sum()), TypeError, "with respect to temperature"),
    (jax.hessian(lambda x: bi_jax.exp(x).sum()), TypeError, "exp: no derivative with respect to x"),
    (jax.grad(lambda x: jax.grad(lambda x: bi_jax.exp(x).sum())(x).sum()), TypeError, "exp: no derivative with respect to"),
]


@pytest.mark.parametrize(("function", "error", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors_at_trace_time(function, error, message):
    with pytest.raises(error, match=message):
        jax.jit(function).trace(X)


def lowered(platform, function=bi_jax.exp):
    return jax.jit(function).trace(X).lower(lowering_platforms=(platform,)).as_text()


def test_the_engine_is_that_of_the_platform_lowered_for():
    assert "mosaic_gpu" in lowered("cuda")
    assert "mosaic_gpu" not in lowered("cpu")
    with pytest.raises(NotImplementedError, match=r"bi_jax: no exp for .*'tpu'.*: supported are cpu and cuda \(sm_90\)"):
        lowered("tpu")


def test_arguments_are_those_of_bi_torch():
    expected = {
        "sum": "input dim keepdim dtype",
        "var": "input dim correction keepdim",
        "logsumexp": "input dim keepdim",
        "cross_entropy": "input target ignore_index reduction label_smoothing",
        "layer_norm": "input normalized_shape weight bias eps",
        "embedding": "ids weight padding_idx",
        "adamw": "param grad m v step lr betas eps weight_decay",
    }
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(bi_jax, name)).parameters) == arguments.split()
    assert pointwise.EXP.name == "exp"
