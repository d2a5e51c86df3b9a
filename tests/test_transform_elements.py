"""bi_jax.batch_invariant on single elements, as XLA compiles it: bits that neither shapes nor neighbours change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bi_jax
from bi_jax.transform.coverage import COMPUTED, Options
from bi_jax.transform.elementwise import FUNCTIONS
from bi_jax.transform.rewrite import rewritten
from shared_specs.formats import float_format
from shared_specs.inputs import operand_bits
from shared_specs.reference.rows import run_rows
from tests.model_engines import model_engines
from tests.row_programs import pow_inputs
from tests.test_transform import assert_same, block, draw, primitives

invariant = bi_jax.batch_invariant
portable = functools.partial(bi_jax.batch_invariant, portable=True)
BOTH = pytest.mark.parametrize("transform", [invariant, portable], ids=["default", "portable"])


ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_CUDA])
def device(request):
    """The platform that a test computes on."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture
def params(device):
    return {"embedding": draw(50, 256, dtype="float32"), "head": draw(40, 256, dtype="float32", seed=1)}


def test_a_row_does_not_depend_on_the_batch(params, device):
    tokens = np.random.default_rng(2).integers(0, 50, 8)

    def model(params, tokens):
        return jnp.exp(params["embedding"][tokens] @ params["head"].T)

    f, stock = invariant(model), jax.jit(model)
    whole, alone = f(params, tokens), f(params, tokens[3:4])
    assert_same(alone, whole[3:4])
    for place in range(8):
        assert_same(f(params, np.roll(tokens, place))[(3 + place) % 8], whole[3])
    with jax.default_matmul_precision("highest"):  # on a GPU, XLA's products are TF32 otherwise
        stock_whole, stock_alone = stock(params, tokens), stock(params, tokens[3:4])
    np.testing.assert_allclose(whole, stock_whole, rtol=1e-4, atol=1e-4)
    if device == "cpu":  # whether the row alone has other bits on a GPU is up to cuBLAS
        assert (stock_alone != stock_whole[3:4]).any()


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_portable_models_have_the_same_bits_on_a_cpu_and_on_a_gpu(dtype):
    params = {"embedding": draw(50, 256, dtype=dtype), "head": draw(40, 256, dtype=dtype, seed=1)}
    tokens = np.arange(8)

    def loss(params, tokens):
        logprobs = block(params, tokens)
        return logprobs.astype("float32")[:, 0].sum(), logprobs

    results = []
    for device in ("cpu", "cuda"):
        placed = jax.device_put((params, tokens), jax.devices(device)[0])
        results.append(jax.device_get(portable(jax.value_and_grad(loss, has_aux=True))(*placed)))
    assert_same(*results)


@pytest.mark.gpu
@BOTH
def test_rows_on_a_gpu(transform):
    """In batches of several sizes, at any place."""
    params = {"embedding": draw(500, 1024), "head": draw(2000, 1024, seed=1)}
    f, tokens = transform(block), np.random.default_rng(0).integers(0, 500, 64)
    want = f(params, tokens[5:6])[0]
    for batch in (2, 8, 64):
        for place in (0, batch - 1):
            assert_same(f(params, np.roll(tokens[5 : 5 + batch] if batch < 64 else np.roll(tokens, -5), place))[place], want)


def contracted(a, b, c):
    return a * b + c, a * b - c, c - a * b


def constants(a, b, c):
    return (a * np.float32(0.1)) * np.float32(0.3), (a + np.float32(1e4)) - np.float32(1e4), a / np.float32(3.3)


def one_divisor(a, b, c):
    return a / c[..., :1], (a / c[..., :1]) / b[..., :1], 1 / a


def powers(a, b, c):
    return a**3 + c, 1 - a * a, a**-2


def in_float32(f, *arrays):
    """Each operation rounded, by NumPy."""
    return f(*map(np.asarray, arrays))


@BOTH
@pytest.mark.parametrize("f", [contracted, constants, one_divisor], ids=lambda f: f.__name__)
def test_each_operation_is_rounded(f, transform, device):
    if (device, transform) == ("cuda", invariant) and f is not contracted:
        pytest.skip("XLA's quotients on a GPU are not rounded to nearest")
    arrays = [draw(1, 1000, dtype="float32", seed=i) for i in range(3)]
    assert_same(transform(f)(*arrays), in_float32(f, *arrays))
    if device == "cpu":  # what XLA contracts there it may leave alone on a GPU
        assert not all((x == y).all() for x, y in zip(jax.jit(f)(*arrays), in_float32(f, *arrays), strict=True))


@BOTH
def test_16_bit_intermediates_are_rounded(transform, device):
    a, b, c = (draw(7, 33, seed=i) for i in range(3))

    def f(a, b, c):
        return (a + b) + c, (a * b) * c, jnp.exp(a) * b + c, (a.astype("float32") * 3).astype("bfloat16").astype("float32") + 1

    steps = [invariant(g) if transform is invariant else portable(g) for g in (jnp.add, jnp.multiply, jnp.exp)]
    add, multiply, exp = steps
    by_step = (
        add(add(a, b), c),
        multiply(multiply(a, b), c),
        add(multiply(exp(a), b), c),
        (a.astype("float32") * 3).astype("bfloat16").astype("float32") + 1,
    )
    assert_same(transform(f)(a, b, c), by_step)


def surroundings(f):
    """f on rows, by itself, and within programs of other shapes and neighbours; each gives the first row."""
    yield "alone", lambda *rows: f(*(x[:1] for x in rows))[0]
    yield "batch", lambda *rows: f(*rows)[0]
    yield "scan", lambda *rows: lax.map(lambda row: f(*row), rows)[0]
    yield "fused", lambda *rows: (lambda y: jnp.where(jnp.isnan(y + 1), 0, y) * 1)(f(*(x * 1 for x in rows)))[0]


@BOTH
def test_the_surrounding_program_does_not_matter(transform, device):
    def f(x, y):
        z = (x * y + 1) / (jnp.sqrt(x * x + y * y) + 1)
        return z * x - jnp.exp(-z) * y

    rows = draw(5, 133, dtype="float32"), draw(5, 133, dtype="float32", seed=1)
    results = {name: transform(g)(*rows) for name, g in surroundings(f)}
    for name, result in results.items():
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint32) for x in (result, results["alone"])), name)


# ------------------------------------------------------------------------------------------- elementary functions

DEPENDING = ("exp", "atan")
"""XLA's own depend on where an element is."""


def apply(names, x):
    """Each function on arguments that it has a value for."""
    positive, small = jnp.abs(x) + jnp.asarray(0.01, x.dtype), jnp.tanh(x)
    arguments = dict.fromkeys(("log", "log1p", "log2", "rsqrt"), (positive,)) | dict.fromkeys(
        ("acos", "asin", "atanh", "erf_inv"), (small,)
    )
    arguments |= {"pow": (positive, x), "rem": (x, positive)}
    return {name: getattr(lax, name)(*arguments.get(name, (x,))) for name in names}


def differing(f, x, size):
    """Functions that give other bits for pieces of x than for all of x."""
    whole, found = f(x), set()
    for i in range(0, x.size, size):
        found |= {name for name, y in f(x[i : i + size]).items() if (y != whole[name][i : i + size]).any()}
    return found


@pytest.mark.parametrize(("dtype", "size"), [("float32", 7), ("float16", 63)])
def test_places_of_elements(dtype, size, device):
    """In bulk, and in pieces that leave some elements over."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal(63 * 20) * 3, dtype)
    assert not differing(invariant(functools.partial(apply, COMPUTED)), x, size)
    if device == "cuda":
        assert not differing(invariant(functools.partial(apply, FUNCTIONS)), x, size)
    elif size == 7:
        assert differing(jax.jit(functools.partial(apply, DEPENDING)), x, size) == set(DEPENDING)
        assert not primitives(rewritten(jax.make_jaxpr(functools.partial(apply, FUNCTIONS))(x), Options())) & FUNCTIONS.keys()


# ------------------------------------------------------------------------------------------------------- portable


def special(dtype, seed):
    fmt = float_format(dtype)
    drawn = [operand_bits(kind, (1, 300), fmt, seed)[0] for kind in ("normal", "wide", "subnormal", "special", "zeros", "bits")]
    return jnp.asarray(np.concatenate([np.asarray(x) for x in drawn]).view(jnp.dtype(dtype)))


def same_but_for_nan(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    nan = np.isnan(expected) if jnp.issubdtype(expected.dtype, jnp.inexact) else np.zeros(expected.shape, bool)
    assert (np.isnan(actual[nan])).all()
    assert_same(actual[~nan], expected[~nan])


def test_portable_functions_are_the_contract(device):
    x, y = special("float32", 0), special("float32", 1)[::-1]

    def f(x, y):
        return {name: getattr(lax, name)(*(x, y)[: len(program.elements)]) for name, program in FUNCTIONS.items()}

    got = portable(f)(x, y)
    for name, program in FUNCTIONS.items():
        arguments = {key: np.asarray(value)[None] for key, value in zip(program.elements, (x, y), strict=False)}
        expected = run_rows(program, arguments, {})["y"][0]
        assert_same(got[name], float_format("float32").encode(expected).view(np.float32))


def same_values(got, x, y):
    """Those of XLA's pow, with its infinities, NaN and signs; but for subnormal ones, which it flushes on a CPU."""
    got, stock, exact = np.asarray(got), np.asarray(jax.jit(lax.pow)(x, y)), np.float64(x) ** np.float64(y)
    checked = (np.abs(x) != 2.0**-149) & ~((exact != 0) & (np.abs(exact) < 2.0**-126))
    np.testing.assert_allclose(got[checked], stock[checked], rtol=1e-6, atol=0)
    checked &= ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(got[checked]), np.signbit(stock[checked]))


@np.errstate(all="ignore")
def test_special_values_of_pow(device):
    """The contract's bits, and lax's values: zeros, infinities, NaN, negative bases, exponents that are integers or not."""
    pairs = {name: x.numpy() for name, x in pow_inputs().items()}
    x, y = (x[0] for x in pairs.values())
    got = portable(lax.pow)(x, y)
    assert_same(got, float_format("float32").encode(run_rows(FUNCTIONS["pow"], pairs, {})["y"][0]).view("f4"))
    same_values(got, x, y)
    n = np.resize(np.array([0, 1, -1, 2, -2, 3, -3, 5, -7, 2**24, 2**24 + 1], np.int32), x.size)
    with model_engines():
        same_values(portable(lax.pow)(x, n), x, n)


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNARY = {"neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "square": np.square}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_portable_arithmetic_is_ieee(dtype, device):
    """Subnormals, infinities and NaN; 16-bit results are float32's, rounded."""
    x, y = special(dtype, 0), special(dtype, 1)[::-1]

    def f(x, y):
        results = {name: getattr(lax, name)(x, y) for name in BINARY} | {name: getattr(lax, name)(x) for name in UNARY}
        wide = x.astype("float32")
        return results | {"round": lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), "sign": lax.sign(x), "wide": wide}

    got = portable(f)(x, y)
    fmt = float_format(dtype)
    a, b = (fmt.decode(np.asarray(v).view(fmt.storage)) for v in (x, y))
    with np.errstate(all="ignore"):
        expected = {name: g(a, b) for name, g in BINARY.items()} | {name: g(a) for name, g in UNARY.items()}
        expected |= {"round": np.round(a), "sign": np.where(a == 0, a, np.sign(a)), "wide": a}
    for name, want in expected.items():
        want = want if want.dtype == bool or name == "wide" else fmt.encode(want).view(x.dtype)
        same_but_for_nan(got[name], want)


def test_portable_conversions_and_extremes(device):
    x, y = special("float32", 2), special("float32", 3)[::-1]

    def f(x, y):
        integers = jnp.arange(-(1 << 25), 1 << 25, 100003)
        narrowed = x.astype("bfloat16"), x.astype("float16"), integers.astype("float32"), integers.astype("bfloat16")
        return narrowed, lax.max(x, y), lax.min(x, y), lax.clamp(np.float32(-1), x, np.float32(1)), x.astype("int32")

    narrowed, largest, smallest, clamped, truncated = portable(f)(x, y)
    integers = np.arange(-(1 << 25), 1 << 25, 100003, dtype=np.int32)
    a, b = np.asarray(x), np.asarray(y)
    for got, values in zip(narrowed, (a, a, integers.astype("float32"), integers.astype("float32")), strict=True):
        same_but_for_nan(got, float_format(got.dtype.name).encode(values).view(got.dtype))
    zeros = (a == 0) & (b == 0)
    same_but_for_nan(largest, np.where(zeros, (a.view("u4") & b.view("u4")).view("f4"), np.maximum(a, b)))
    same_but_for_nan(smallest, np.where(zeros, (a.view("u4") | b.view("u4")).view("f4"), np.minimum(a, b)))
    same_but_for_nan(clamped, np.clip(a, -1, 1))
    assert_same(truncated, jax.jit(lambda x: x.astype("int32"))(x))


def test_functions_without_a_contract_are_not_portable():
    for name in COMPUTED:
        with pytest.raises(bi_jax.UncoveredOperationError, match=rf"^{name}\("):
            jax.jit(portable(functools.partial(apply, [name]))).trace(draw(3, dtype="float32"))
