"""The CPU engine of `bi_jax` for rows against the reference model, and the promises that rest on XLA leaving it alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bi_jax
from bi_jax.float64 import decode, encode, round32, storage_bits
from bi_jax.narrow import narrow
from bi_jax.rows import cpu
from bi_jax.rows.cpu_arithmetic import CpuArithmetic
from shared_specs.formats import FLOAT32, FORMATS, float_format
from shared_specs.inputs import operand_bits
from shared_specs.programs import attention, norm, reduce, softmax
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, SCALARS
from shared_specs.reference import NumpyArithmetic
from shared_specs.reference import rows as reference
from shared_specs.rows import ColumnProgram, RowContract
from tests.model_engines import model_engines
from tests.row_programs import ROW_PROGRAMS, uneven_rows
from tests.test_scalar import fma_triples, patterns

KINDS = ("normal", "wide", "cancel", "subnormal", "zeros", "special", "bits")
LENGTHS = (1, 128, 1025, 8193)


def draw(*shape, dtype="float32", kind="normal", seed=0):
    fmt = float_format(dtype)
    bits = operand_bits(kind, (1, *shape), fmt, seed + 10 * len(shape))[0]
    return jnp.asarray(np.asarray(bits).view(jnp.dtype(dtype)))


def bits(x):
    return np.ascontiguousarray(x).view(float_format(x.dtype.name).storage)


def assert_same(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(bits(actual), bits(expected))


def inputs_of(program, rows, n, dtype, kind):
    """Arrays; ids lie in -1..n, some of them outside the row."""
    inputs = {}
    for shape, names in (((rows, n), program.elements), ((n,), program.columns)):
        inputs |= {name: draw(*shape, dtype=dtype, kind=kind, seed=len(inputs) + i) for i, name in enumerate(names)}
    inputs |= {name: draw(rows, kind=kind, seed=len(inputs) + i) for i, name in enumerate(program.rows)}
    ids = np.random.default_rng(n).integers(-1, n + 1, rows, dtype=np.int32)
    return inputs | {name: jnp.asarray(ids) for name in getattr(program, "ids", ())}


def scalars_of(program):
    return {name: SCALARS[name] for name in (*program.scalars, *getattr(program, "integers", ()))}


def model(program, inputs, dtypes):
    """The outputs by the reference model."""
    values = {
        name: np.asarray(x) if x.dtype == np.int32 else float_format(x.dtype.name).decode(bits(x)) for name, x in inputs.items()
    }
    run = reference.run_columns if isinstance(program, ColumnProgram) else reference.run_rows
    outputs = run(program, values, scalars_of(program))
    return {name: float_format(dtypes.get(name, "float32")).encode(x) for name, x in outputs.items()}


def engine(program, dtypes):
    run = cpu.run_columns if isinstance(program, ColumnProgram) else cpu.run_rows
    return jax.jit(lambda inputs: run(program, inputs, scalars_of(program), dtypes))


def check(program, rows, n, dtype, kinds=KINDS):
    dtypes = dict.fromkeys(program.sums if isinstance(program, ColumnProgram) else program.outputs, dtype)
    compiled = engine(program, dtypes)
    for kind in kinds:
        inputs = inputs_of(program, rows, n, dtype, kind)
        outputs, expected = compiled(inputs), model(program, inputs, dtypes)
        assert outputs.keys() == expected.keys()
        for name, want in expected.items():
            np.testing.assert_array_equal(bits(outputs[name]), want.reshape(outputs[name].shape), f"{name} {kind}")


@pytest.mark.parametrize(
    ("program", "n", "dtype"),
    [(p, (5, 130, 1025)[i % 3], list(FORMATS)[i % 3]) for i, p in enumerate(ROW_PROGRAMS)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_row_programs(program, n, dtype):
    check(program, 4, n, dtype)


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, ids=lambda program: program.name)
def test_column_programs(program):
    check(program, 130, 4, "bfloat16")


@pytest.mark.parametrize("n", [0, *LENGTHS, cpu.BLOCK + 8200])
def test_lengths(n):
    """Sums, sums of exponentials and maxima; rows in parts where they are longer than a block."""
    dtype = "float16" if n % 2 else "float32"
    for program in (softmax.LOGSUMEXP, reduce.AMIN if n % 2 else reduce.SUM):
        check(program, 3, n, dtype, ("wide", "special") if n else ("normal",))


@pytest.mark.parametrize("block", [cpu.BLOCK, 16_384])
def test_segments_of_different_maxima(block, monkeypatch):
    """In several rows at a time, and in parts of a row."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    length = jnp.array([20_000, 16_385, 9000, 20_000, 5, 20_000], jnp.int32)
    inputs = {"x": jnp.asarray(uneven_rows(20_000).numpy()), "length": length}
    program, dtypes = attention.attention_softmax(True), {"y": "float32"}
    got, wanted = engine(program, dtypes)(inputs)["y"], model(program, inputs, dtypes)["y"]
    np.testing.assert_array_equal(bits(got), wanted)


@pytest.mark.parametrize("rows", [0, 1, 1025, 8193])
def test_columns_of_any_length(rows):
    check(norm.COLUMN_SUM, rows, 3, "float32", ("wide", "special") if rows else ("normal",))


@pytest.mark.parametrize(("program", "shape"), [(reduce.SUM, (3, 64)), (norm.COLUMN_SUM, (2, 3))], ids=["rows", "columns"])
def test_sums_start_at_positive_zero(program, shape):
    """So the sum over -0 is +0, in one chunk of lanes too, where XLA would leave out the addition."""
    run = cpu.run_columns if isinstance(program, ColumnProgram) else cpu.run_rows
    y = jax.jit(lambda x: run(program, {"x": x}, {}, {"y": "float32"})["y"])(jnp.full(shape, -0.0, jnp.float32))
    assert not np.asarray(y).view(np.uint32).any()


@pytest.mark.parametrize(("rows", "n"), [(70, 1000), (1030, 130)])
def test_blocks_of_rows_and_columns(rows, n):
    """More rows than a block holds, not a multiple of what it holds; more columns than are summed at a time."""
    check(reduce.MEAN, rows, n, "bfloat16", ("wide",))
    check(norm.RMS_NORM_PARAMETERS, rows, n, "bfloat16", ("wide",))


def test_a_contract_is_data():
    inputs = {"x": draw(3, 100, kind="wide")}
    contract = RowContract(lanes=4, segment=16)
    expected = reference.run_rows(reduce.SUM, {"x": np.asarray(inputs["x"])}, contract=contract)
    assert_same(cpu.run_rows(reduce.SUM, inputs, {}, {}, contract)["y"], expected["y"])
    columns = {"x": inputs["x"].T}
    assert_same(cpu.run_columns(norm.COLUMN_SUM, columns, {}, {"y": "float32"}, contract)["y"], expected["y"])


# --------------------------------------------------------------------------------------------------------- arithmetic


def in_jax(function):
    """A function of float64 values that hold float32 ones, as a function of float32 arrays."""

    @jax.jit
    def run(*arguments):
        with jax.enable_x64(True):
            return jax.lax.bitcast_convert_type(
                encode(function(*(decode(storage_bits(x), FLOAT32) for x in arguments)), FLOAT32), jnp.float32
            )

    return run


@pytest.fixture(scope="module")
def triples():
    with np.errstate(all="ignore"):
        hard = fma_triples()
    special = np.array([0, -0.0, 1, np.inf, -np.inf, np.nan, 2.0**-149, 2.0**-126, 3.4028235e38, 0.5, 3], np.float32)
    grid = np.stack([x.ravel() for x in np.meshgrid(special, special, special)], 1)
    return np.ascontiguousarray(np.concatenate([hard, grid]).T)


F, G = NumpyArithmetic(), CpuArithmetic()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "fma", "max", "min", "sqrt", "neg", "abs"])
def test_operations(name, triples):
    count = {"fma": 3, "sqrt": 1, "neg": 1, "abs": 1}.get(name, 2)
    got = in_jax(getattr(G, name))(*triples[:count])
    np.testing.assert_array_equal(bits(got), FLOAT32.encode(getattr(F, name)(*triples[:count])))


@pytest.mark.parametrize("constant", [6.0, 0.75, float(np.float32(0.1)), 1.5 * 2.0**23, 2.0**-149])
def test_xla_does_not_rewrite_constants(constant, triples):
    """Quotients by constants and by scalars, chains of constants, and sums that cancel; with subnormal values too."""
    x = triples[0]
    small = np.random.default_rng(0).integers(0, 1 << 24, 20000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, small])

    def chains(f, x, scalar):
        yield f.div(x, constant)
        yield f.div(x, scalar)
        yield f.div(constant, x)
        yield f.sub(f.add(x, constant), constant)
        yield f.mul(f.mul(x, constant), constant)
        yield f.fma(x, constant, f.neg(f.mul(x, constant)))
        yield f.fma(x, x, constant)

    scalar = np.float32(constant)
    expected = list(chains(F, x, scalar))
    for i, want in enumerate(expected):
        got = in_jax(lambda x, s, i=i: list(chains(G, x, s))[i])(x, scalar)
        np.testing.assert_array_equal(bits(got), FLOAT32.encode(want), f"chain {i}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing(dtype):
    fmt = float_format(dtype)
    values = fmt.decode(np.arange(1 << 16).astype(fmt.storage))
    with np.errstate(all="ignore"):
        middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
        x = np.concatenate([values, middles, np.nextafter(middles, np.float32(0)), patterns(1 << 18, 3)])
    got = jax.jit(lambda x: narrow(x, dtype))(x)
    np.testing.assert_array_equal(bits(got), fmt.encode(x))


def test_rounding_of_float64():
    exact = np.random.default_rng(0).standard_normal(1 << 18) * np.exp2(np.random.default_rng(1).integers(-155, 132, 1 << 18))
    with jax.enable_x64(True), np.errstate(all="ignore"):
        np.testing.assert_array_equal(np.asarray(jax.jit(round32)(exact)), exact.astype(np.float32).astype(np.float64))


# ----------------------------------------------------------------------------------------------------------- promises


def test_the_surrounding_program_does_not_matter():
    """Neighbours that XLA would fuse with, contract into or simplify against the operation."""
    x, w = draw(4, 130, kind="wide"), draw(130, seed=1)

    def alone(x, w):
        return bi_jax.rms_norm(x, (130,), w), bi_jax.sum(x, -1), bi_jax.silu(x)

    @jax.jit
    def surrounded(x, w):
        y, total, z = alone((x + 0.0) * 1.0 / 1.0, w * 1.0)
        other = (y * 3.0 + total[:, None] / 3.0 - z) * 0.1
        return y, total, z, other

    for got, want in zip(surrounded(x + 0.0, w), jax.jit(alone)(x + 0.0, w), strict=False):
        assert_same(got, want)


def test_a_row_does_not_depend_on_the_batch():
    x = np.asarray(draw(70, 300, dtype="bfloat16"))
    f = jax.jit(lambda x: (bi_jax.softmax(x, -1), bi_jax.mean(x, -1, dtype="float32")))
    whole = f(x)
    for row in (69, 5, 60):
        for part, full in zip(f(x[row : row + 1]), whole, strict=True):
            assert_same(part, full[row : row + 1])


@pytest.fixture
def by_the_model():
    """For what follows from the order of the sums, which the engine shares with the reference model at all lengths above."""
    with model_engines():
        yield


@pytest.mark.usefixtures("by_the_model")
def test_padding_behind_a_row_is_neutral():
    x = draw(3, 1000, kind="wide")
    longer = jnp.concatenate([x, jnp.zeros((3, 9000))], axis=1)
    assert_same(bi_jax.sum(longer, -1), bi_jax.sum(x, -1))
    logits = draw(3, 1000)
    masked = jnp.concatenate([logits, jnp.full((3, 9000), -jnp.inf)], axis=1)
    assert_same(bi_jax.softmax(masked, -1)[:, :1000], bi_jax.softmax(logits, -1))


@pytest.mark.usefixtures("by_the_model")
def test_padding_behind_a_batch_leaves_weight_gradients_alone():
    x, w, g = draw(5, 20), draw(20, seed=1), draw(5, 20, seed=2)

    def weight_gradient(x, g):
        return jax.vjp(lambda w: bi_jax.layer_norm(x, (20,), w, w), w)[1](g)[0]

    pad = functools.partial(jnp.pad, pad_width=((0, 8), (0, 0)))
    assert_same(weight_gradient(pad(x), pad(g)), weight_gradient(x, g))


@pytest.mark.usefixtures("by_the_model")
def test_token_logprobs_are_gathered_log_softmax():
    logits, ids = draw(6, 50, dtype="bfloat16"), jnp.arange(6) * 9
    gathered = bi_jax.log_softmax(logits, -1, dtype="float32")[jnp.arange(6), ids]
    assert_same(bi_jax.token_logprobs(logits, ids), gathered)
    assert np.isnan(bi_jax.token_logprobs(logits, jnp.array([-1, 50, 0, 1, 2, 1 << 30]))[jnp.array([0, 1, 5])]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradient_keeps_signs_of_zeros_and_canonical_nans(interleaved):
    cos, sin = jnp.ones(5), jnp.zeros(5)
    g = jnp.array([-0.0, jnp.nan, 1, 2, 3, 0, 5, 2.0**-140, 7, 8])
    dx = jax.vjp(lambda x: bi_jax.rotary_embedding(x, cos, sin, interleaved), g)[1](g)[0]
    assert np.all(bits(dx)[np.isnan(dx)] == FLOAT32.nan)
    assert bits(dx)[7] == bits(g)[7]
